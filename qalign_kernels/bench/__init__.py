"""Microbenchmarks: `python -m qalign_kernels.bench`.

`ops` lists the measured calls, `checks` compares their results with float64, `measure` takes time and memory.
"""

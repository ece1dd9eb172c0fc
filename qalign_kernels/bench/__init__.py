"""Microbenchmarks: `python -m qalign_kernels.bench`.

`measure` has what every measurement shares, `ops` the calls that are measured.
"""

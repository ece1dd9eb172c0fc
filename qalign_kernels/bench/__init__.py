"""Microbenchmarks: `measure` has what every measurement shares, `ops` the calls that are measured, `python -m qalign_kernels.bench` runs them."""

"""Measurements: `python -m benchmarks static | speed | gpu | report | tune`."""

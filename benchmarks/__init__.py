"""Measurements: `python -m benchmarks static | speed | report`."""

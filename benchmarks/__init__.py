"""Measure the time and the memory of the losses: `python -m benchmarks`."""

"""What the losses cost beside their peers: `python -m benchmarks`."""

"""Benchmarks: one module per claim, each against a real peer. Run as `python -m bench.<claim>`."""

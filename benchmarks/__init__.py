"""Benchmarks: one file per subject, run as `python -m benchmarks.NAME [--json] [--quick]`."""

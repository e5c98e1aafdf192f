"""The benchmarks: `python -m bench --help` from a checkout, or `dante bench --help`; operators alone: `pytest bench`."""

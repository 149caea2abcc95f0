"""Measures and inspects std_kernels: `python -m bench --help`."""

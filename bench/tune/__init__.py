"""`python -m bench tune`: launch configurations for std_kernels/_tuning.py."""

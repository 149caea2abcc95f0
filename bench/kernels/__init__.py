"""`python -m bench kernels`: each op of std_kernels beside its rivals."""

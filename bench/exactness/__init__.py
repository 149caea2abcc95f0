"""`python -m bench exactness`: what "the same tokens" means where rounding is coarse."""

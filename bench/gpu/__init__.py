"""`python -m bench gpu`: one whole round on a GPU."""

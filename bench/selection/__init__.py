"""`python -m bench selection`: rules of re-selection, on the demo model."""

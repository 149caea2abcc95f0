"""`python -m bench decode`: decoding beside the ways of transformers."""

"""`python -m bench real`: a pretrained model on real texts."""

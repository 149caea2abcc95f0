"""`python -m bench roofline`: what drafting gains on paper."""

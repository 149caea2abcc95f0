"""All causal language models of transformers at tiny size: what `patch` makes of each.

``python -m tests.decode.survey`` goes through them and writes the list in docs/causal-lms.md.
"""

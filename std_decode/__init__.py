"""Faster ``model.generate()`` for video LLMs, with the same answer.

It drafts with sparse attention and verifies densely.

>>> import std_decode
>>> model = std_decode.patch(model)  # a transformers model, e.g. Qwen2VLForConditionalGeneration
>>> output = model.generate(**inputs)  # the tokens of the unpatched model
>>> print(std_decode.last_stats(model))
>>> std_decode.unpatch(model)
"""

from std_decode.patch import is_patched, last_stats, patch, patched, unpatch
from std_decode.stats import DecodeStats

__all__ = ["DecodeStats", "is_patched", "last_stats", "patch", "patched", "unpatch"]

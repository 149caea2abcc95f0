"""Faster ``model.generate()`` for video LLMs, with the same answer.

It drafts with sparse attention and verifies densely.

>>> import std_decode
>>> model = std_decode.patch(model)  # a transformers model, e.g. Qwen2VLForConditionalGeneration
>>> output = model.generate(**inputs)  # the tokens of the unpatched model
>>> print(std_decode.last_stats(model))
>>> std_decode.unpatch(model)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from std_decode.patching import is_patched, last_stats, patch, patched, unpatch
    from std_decode.stats import DecodeStats

__version__ = "0.1.0"
__all__ = ["DecodeStats", "is_patched", "last_stats", "patch", "patched", "unpatch"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; a typo on the command line need not wait for
    # them.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "std_decode.stats" if name == "DecodeStats" else "std_decode.patching"
    globals()[name] = value = getattr(import_module(module), name)
    return value

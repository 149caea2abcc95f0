"""Tiny random models of the families that are tested, with real inputs.

``python -m tests.decode.families`` prints them as the table in README.
"""

from tests.decode.families import frames, grids, text  # noqa: F401  (each enters its own)
from tests.decode.families.base import (
    FAMILIES,
    IMAGE,
    PAD,
    TEXT,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCABULARY,
    Family,
)

__all__ = [
    "FAMILIES",
    "IMAGE",
    "PAD",
    "TEXT",
    "VIDEO",
    "VISION_END",
    "VISION_START",
    "VOCABULARY",
    "Family",
]

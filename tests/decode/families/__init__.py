"""Tiny random models of the families that are tested, with real inputs.

``python -m tests.decode.families`` prints them as the table in docs/models.md.
"""

# Each enters its own models into the list.
from tests.decode.families import (  # noqa: F401
    frames,
    grids,
    grids_more,
    images,
    recurrent,
    text,
)
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

"""Random models and texts, of which the ordinary run takes the first few."""

from __future__ import annotations

from typing import Any

import pytest


def seeds(count: int, ordinary: int) -> list[Any]:
    """0 to `count`; those from `ordinary` on are the same path once more, and marked slow."""
    rest = (pytest.param(seed, marks=pytest.mark.slow) for seed in range(ordinary, count))
    return [*range(ordinary), *rest]

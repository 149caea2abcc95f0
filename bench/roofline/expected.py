"""What to expect of this code at a cell: `std_decode.costs.expected` of a model's shape."""

from __future__ import annotations

from dataclasses import replace

from bench.roofline.predictions import Cell, Prediction, best_round
from std_decode.costs import expected as costs
from std_decode.costs.expected import EXPECTED, UNFUSED, Efficiency
from std_decode.costs.workload import Workload


def _workload(cell: Cell, tokens: int = 1, four_bit: bool = False) -> Workload:
    """Of one pass: attention's own multiplications are no part of its products."""
    found = cell.workload(0, tokens, four_bit)
    return found if four_bit else replace(found, draft_weight_bytes=None)


def dense_seconds(cell: Cell, tokens: int = 1, by: Efficiency = EXPECTED) -> float:
    """A dense step, or a verification of `tokens` tokens of each row."""
    return costs.dense_seconds(_workload(cell, tokens), cell.together, tokens, by)


def draft_seconds(cell: Cell, four_bit: bool, by: Efficiency = EXPECTED) -> float:
    return costs.draft_seconds(_workload(cell, four_bit=four_bit), cell.together, by)


def _of_layers(cell: Cell, by: Efficiency) -> Efficiency:
    if cell.shape.recurrent is None:
        return by
    # Such layers are as transformers has them.
    names = ("dense_launches", "verify_launches", "draft_launches", "four_bit_launches")
    return replace(by, **{name: getattr(UNFUSED, name) for name in (*names, "launch")})


def step_seconds(cell: Cell, by: Efficiency = EXPECTED) -> float:
    """A step of dense decoding."""
    return dense_seconds(cell, by=_of_layers(cell, by)) + by.step


def drafting(
    cell: Cell,
    four_bit: bool,
    acceptance: float,
    length: int | None = None,
    by: Efficiency = EXPECTED,
) -> Prediction:
    """At this draft length, or the best of none to 63; the speedup is over our dense path."""
    by = _of_layers(cell, by)
    dense = step_seconds(cell, by)
    draft = draft_seconds(cell, four_bit, by) + by.draft
    rest = costs.select_seconds(_workload(cell), cell.together, by) + by.round

    def seconds(drafts: int) -> float:
        return drafts * draft + dense_seconds(cell, drafts + 1, by) + rest

    found = best_round(dense, seconds, acceptance, length)
    return found if length or found.speedup > 1 else Prediction(0, dense, 1.0, 1.0)

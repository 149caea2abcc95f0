"""What passes of today's code should take on a GPU: launches, small kernels, reached bandwidth.

The roofline knows bytes and multiplications only. A pass of small kernels waits for each of them,
and no kernel reaches the peak; here each part has an efficiency of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench.roofline.predictions import Cell, Prediction, best_round


@dataclass(frozen=True)
class Efficiency:
    """Of each part of a pass. No GPU has measured these for this code.

    They come from machine code compiled for sm_90 (what is in flight, instructions a weight), from
    counting launches on the real code, and from published speeds of 7B to 70B decoding on A100 and
    H100, which a longer version of this sum meets within 12%.

    Attributes:
        copy: share of the data sheet's bandwidth that a large copy reaches.
        product: of a copy's bandwidth, a product with bfloat16 weights.
        four_bit: bytes/s of 4-bit weights that PyTorch's kernel reads, which has one load of a
            lane in flight and so waits for memory, not for bandwidth: 28% of what an H200 copies.
            It reads them again for each `four_bit_rows` rows.
        attention, gather: the same of dense attention, and of attention over selected keys.
        partials: bytes of partial results over those of keys and values, for each token that is
            verified, in batches of `partials_from` rows or more.
        flops: share of the data sheet's throughput that a product reaches.
        launch: seconds that a small kernel and the gap before it take.
        dense_launches, verify_launches, draft_launches, four_bit_launches: of a layer, in a
            captured pass that is not compiled.
        select: seconds for the importance of a key in one layer, head and row.
        step, draft, round: seconds of the host and of choosing tokens, of a dense step, a draft
            and a round.
    """

    copy: float = 0.9
    product: float = 0.88
    four_bit: float = 1.21e12
    four_bit_rows: int = 16
    attention: float = 0.92
    gather: float = 0.6
    partials: float = 0.028
    partials_from: int = 8
    flops: float = 0.66
    launch: float = 2.0e-6
    dense_launches: int = 41
    verify_launches: int = 49
    draft_launches: int = 42
    four_bit_launches: int = 45
    select: float = 416e-6 / (112 * 132_352)
    step: float = 60e-6
    draft: float = 25e-6
    round: float = 250e-6


TODAY = Efficiency()


def dense_seconds(cell: Cell, tokens: int = 1, by: Efficiency = TODAY) -> float:
    """A dense step, or a verification of `tokens` tokens of each row."""
    rows, bandwidth = cell.batch * tokens, by.copy * cell.together.bandwidth
    read = cell.shape.weight_bytes(rows) / (by.product * bandwidth)
    multiplied = 2 * cell.shape.active * rows / (by.flops * cell.together.flops)
    partials = by.partials * tokens if cell.batch >= by.partials_from else 0.0
    keys = cell.batch * cell.context * cell.kv_bytes * (1 + partials)
    launches = by.verify_launches if tokens > 1 else by.dense_launches
    small = cell.shape.layers * launches * by.launch
    return max(read, multiplied) + keys / (by.attention * bandwidth) + small


def draft_seconds(cell: Cell, four_bit: bool, by: Efficiency = TODAY) -> float:
    bandwidth = by.copy * cell.together.bandwidth
    weights = cell.shape.weight_bytes(cell.batch, four_bit)
    read = weights / (by.product * bandwidth)
    if four_bit:
        reached = cell.gpus * min(by.four_bit, by.product * by.copy * cell.device.bandwidth)
        read = math.ceil(cell.batch / by.four_bit_rows) * weights / reached
    multiplied = 2 * cell.shape.active * cell.batch / (by.flops * cell.together.flops)
    keys = cell.batch * min(cell.keys, cell.context) * cell.kv_bytes
    launches = by.four_bit_launches if four_bit else by.draft_launches
    small = cell.shape.layers * launches * by.launch
    return max(read, multiplied) + keys / (by.gather * bandwidth) + small


def drafting(
    cell: Cell,
    four_bit: bool,
    acceptance: float,
    length: int | None = None,
    by: Efficiency = TODAY,
) -> Prediction:
    """At this draft length, or the best of none to 63; the speedup is over our dense path."""
    dense = dense_seconds(cell, by=by) + by.step
    draft = draft_seconds(cell, four_bit, by) + by.draft
    heads = cell.shape.layers * cell.shape.kv_heads * cell.batch
    select = by.select * heads * cell.context

    def seconds(drafts: int) -> float:
        return drafts * draft + dense_seconds(cell, drafts + 1, by) + select + by.round

    found = best_round(dense, seconds, acceptance, length)
    return found if length or found.speedup > 1 else Prediction(0, dense, 1.0, 1.0)

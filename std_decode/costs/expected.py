"""What passes should take on a GPU: the pace that each kind of kernel reaches, and its launches.

`workload` knows bytes and multiplications only, so what it says is a ceiling. A pass of small
kernels waits for each of them, and no kernel reaches the peak; here each part of a pass has an
efficiency of its own. `Efficiency` is the one place where they stand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from std_decode.costs.workload import Device, Workload, expected_tokens

FOUR_BIT_BYTES = 0.5 + (2 + 2) / 128  # of a weight: its bits, and scale and zero of a group
BFLOAT16_BYTES = 2


@dataclass(frozen=True)
class Efficiency:
    """Of each part of a pass. PREDICTED: no GPU has measured these for this code.

    They come from machine code compiled for sm_90 (what is in flight, instructions a weight or
    key), from counting launches, and from published speeds of 7B to 70B decoding on A100 and H100,
    which a longer sum, kernel by kernel, meets within 12%. Cycles are of one multiprocessor.

    Attributes:
        copy: share of the data sheet's bandwidth that a large copy reaches.
        product: of a copy's bandwidth, a product with bfloat16 weights.
        flops: share of the data sheet's throughput that a product reaches.
        overlap: of the shorter of reading and multiplying, what the longer does not hide.
        four_bit: of a copy's bandwidth, a product with 4-bit weights that nothing else limits.
        weight: cycles a 4-bit weight with one row, by multiply-adds: 3.88 instructions for 32
            lanes, 2.5 a cycle,
        weight_tile: and by matrix instructions, for up to `tile_rows` rows, of which each tile
            reads the weights anew.
        most_rows: with more, drafts multiply whole weights.
        attention, gather: of a copy's bandwidth, dense attention, and that over selected keys.
        tail: keys that a draft reads besides the selected: of the text, and generated ones.
        scores: of a verification, bytes of importance over those of keys and values,
        partials: and of partial results, for each token, in batches of `partials_from` or more.
        launch: seconds that a kernel takes besides its bytes, with the gap before it.
        dense_launches, verify_launches, draft_launches, four_bit_launches: of a layer, in a
            captured pass.
        select_key, select_row, select_launches: cycles of selecting, for a key and for a row of
            keys, in one layer and head; and launches.
        step, draft, round: seconds of the host and of choosing tokens, of a dense step, a draft
            and a round.
    """

    copy: float = 0.9
    product: float = 0.88
    flops: float = 0.66
    overlap: float = 0.15
    four_bit: float = 0.85
    weight: float = 3.88 / 32 / 2.5
    weight_tile: float = 5.13 / 32 / 2.2
    tile_rows: int = 32
    most_rows: int = 32
    attention: float = 0.92
    gather: float = 0.6
    tail: int = 256 + 64
    scores: float = 0.008
    partials: float = 0.007
    partials_from: int = 8
    launch: float = 2.5e-6
    dense_launches: int = 10
    verify_launches: int = 10
    draft_launches: int = 10
    four_bit_launches: int = 10
    select_key: float = 0.43
    select_row: float = 15e3
    select_launches: int = 3
    step: float = 60e-6
    draft: float = 25e-6
    round: float = 250e-6


EXPECTED = Efficiency()
# Layers that stay as transformers has them, and PyTorch's 4-bit product: one load of a lane in
# flight, so that it waits for memory at 28% of an H200's bandwidth, and again for each 16 rows.
UNFUSED = Efficiency(
    four_bit=0.88,
    weight=0.107,
    weight_tile=0.107,
    tile_rows=16,
    most_rows=1 << 30,
    partials=0.028,
    launch=2.0e-6,
    dense_launches=41,
    verify_launches=49,
    draft_launches=42,
    four_bit_launches=45,
    select_key=6.85,
    select_row=0.0,
    select_launches=5,
)


def product_seconds(
    weight_bytes: float, parameters: float, rows: int, device: Device, by: Efficiency
) -> float:
    """All products of `rows` tokens with bfloat16 weights."""
    read = weight_bytes / (by.product * by.copy * device.bandwidth)
    multiplied = 2 * parameters * rows / (by.flops * device.flops)
    return max(read, multiplied) + by.overlap * min(read, multiplied)


def four_bit_seconds(weights: float, rows: int, device: Device, by: Efficiency) -> float:
    """The same with so many 4-bit weights, which their bytes or instructions bound."""
    tiles = math.ceil(rows / by.tile_rows)
    read = tiles * weights * FOUR_BIT_BYTES / (by.four_bit * by.copy * device.bandwidth)
    cycles = by.weight if rows == 1 else tiles * by.weight_tile
    return max(read, weights * cycles / device.cycles)


def dense_seconds(
    workload: Workload, device: Device, tokens: int = 1, by: Efficiency = EXPECTED
) -> float:
    """A dense step, or a verification of `tokens` tokens of each row."""
    rows = workload.batch * tokens
    weight_bytes = workload.read(workload.weight_bytes, rows)
    more = by.scores if tokens > 1 else 0.0
    if workload.batch >= by.partials_from:
        more += by.partials * tokens
    keys = workload.context * workload.kv_bytes * (1 + more) + workload.window_bytes
    keys += 2 * workload.state_bytes
    launches = by.verify_launches if tokens > 1 else by.dense_launches
    computed = (
        product_seconds(weight_bytes, workload.parameters, rows, device, by)
        + workload.batch * keys / (by.attention * by.copy * device.bandwidth)
        + workload.layers * launches * by.launch
    )
    return max(computed, workload.link_bytes / device.link)


def draft_seconds(workload: Workload, device: Device, by: Efficiency = EXPECTED) -> float:
    """One draft of each row, with 4-bit weights where the workload has them."""
    rows = workload.batch
    whole = workload.read(workload.weight_bytes, rows)
    packed, launches = 0.0, by.draft_launches
    if workload.draft_weight_bytes is not None and rows <= by.most_rows:
        lean = workload.read(workload.draft_weight_bytes, rows)
        packed = (whole - lean) / (BFLOAT16_BYTES - FOUR_BIT_BYTES)  # weights
        launches = by.four_bit_launches
    rest = whole - BFLOAT16_BYTES * packed
    multiplied = workload.parameters - packed if packed else workload.parameters
    keys = min(workload.draft_keys + by.tail, workload.context) * workload.kv_bytes
    keys += workload.window_bytes + workload.state_bytes
    computed = (
        four_bit_seconds(packed, rows, device, by)
        + product_seconds(rest, max(0.0, multiplied), rows, device, by)
        + rows * keys / (by.gather * by.copy * device.bandwidth)
        + workload.layers * launches * by.launch
    )
    return max(computed, workload.draft_link_bytes / device.link)


def select_seconds(workload: Workload, device: Device, by: Efficiency = EXPECTED) -> float:
    """The keys of the next drafts, of all layers, heads and rows."""
    rows = workload.kv_heads * workload.batch
    cycles = rows * (by.select_row + by.select_key * workload.context)
    return cycles / device.cycles + by.select_launches * by.launch


def best_speedup(
    workload: Workload,
    device: Device,
    acceptance: float,
    most_drafts: int,
    by: Efficiency = EXPECTED,
) -> float:
    """Of the best draft length over dense steps; under 1 where none pays."""
    dense = dense_seconds(workload, device, by=by) + by.step
    draft = draft_seconds(workload, device, by) + by.draft
    rest = select_seconds(workload, device, by) + by.round
    return max(
        expected_tokens(acceptance, gamma)
        * dense
        / (gamma * draft + dense_seconds(workload, device, gamma + 1, by) + rest)
        for gamma in range(1, most_drafts + 1)
    )


def most_four_bit_rows(device: Device, by: Efficiency = EXPECTED) -> int:
    """Up to how many rows a product with 4-bit weights takes less time than with whole ones."""
    rows = 0
    while rows < by.most_rows:
        whole = product_seconds(BFLOAT16_BYTES, 1, rows + 1, device, by)
        if four_bit_seconds(1, rows + 1, device, by) >= whole:
            break
        rows += 1
    return rows

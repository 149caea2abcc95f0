"""select_topk in Triton: a sample of a row says which few of its scores to look at.

A score becomes a uint32 in the same order. `sample` takes one key of each of S equal parts of a
row and finds a floor that the k best should reach, and few others. `filter` reads every score
once and lists the positions that reach it. `list` takes the k best of the list: the k-th largest
key, found bit by bit in registers, then prefix sums in position order. A list that is too short
or too long, of luck or of scores that tie, is no good: then the same program reads its row again
and again, two bits at a time. So the floor decides the time and never the result.

Bytes moved: each score once, and a sector for each of the sample. Rows that fit a program's
registers take one launch, longer ones three.

Predicted for [28, 1, 4, 132352], k = 1024, on an H200 (132 SMs, 1.85 GHz, 2.5 instructions a
cycle and SM), by instructions of a warp in the machine code compiled for sm_90: filter 1904
programs of 8 warps, 1,100 each, 27 us; sample 112 of 8, 1,700 each, 3 us on an SM of its own;
list 112 of 8, 2,900 each, 5 us; three launches 6 us. Together 41 us, where 59 MB take 16.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from std_kernels import _tuning
from std_kernels._device import Spec, aot_spec

# What a key that may not be selected, and one that must be, counts as.
_NEVER = tl.constexpr(0)
_FORCED = tl.constexpr(0xFFFFFFFF)
_WORD = tl.constexpr(32)


@triton.jit
def _keys(
    scores_ptr, candidates_ptr, always_ptr,
    scores_at, candidates_at, always_at,  # where the row's [N] begin, from _row_at
    n, N,
):  # fmt: skip
    """Scores at n as uint32 in the same order: equal zeros, _NEVER and _FORCED by the op's rules.

    Positions of N or more are _NEVER.
    """
    in_row = n < N
    # On bits, not floats: a GPU may flush denormals, and NaN compares differ between backends.
    bits = tl.load(scores_ptr + scores_at + n, mask=in_row, other=float("-inf"))
    bits = bits.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # -0 has to tie with +0.
    bits = tl.where(magnitude == 0, magnitude, bits)
    negative = (bits >> 31) != 0
    keys = tl.where(negative, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    never = (magnitude > 0x7F800000) | (bits == 0xFF800000)
    if candidates_ptr is not None:
        never |= tl.load(candidates_ptr + candidates_at + n, mask=in_row, other=0) == 0
    keys = tl.where(never, _NEVER, keys)
    if always_ptr is not None:
        forced = tl.load(always_ptr + always_at + n, mask=in_row, other=0) != 0
        keys = tl.where(forced, _FORCED, keys)
    return keys.to(tl.uint32)


@triton.jit
def _threshold(keys, least, most):
    """The largest value that at least `least` keys reach, or one that at most `most` do too."""
    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    while bit > 0:
        trial = threshold | bit
        reached = tl.sum((keys >= trial).to(tl.int32), axis=0)
        enough = reached >= least
        threshold = tl.where(enough, trial, threshold)
        bit = tl.where(enough & (reached <= most), bit ^ bit, bit >> 1)
    return threshold


@triton.jit
def _write_block(
    indices_ptr,  # [K], the row's
    keys, n,  # [BLOCK_N]
    threshold, first, last,
    above, tied,
):  # fmt: skip
    """Writes the block's keys over the threshold, and ties of rank first < rank <= last.

    `above` and `tied` count both kinds in what lies before the block, and are returned advanced.
    """
    is_above = keys > threshold
    is_tied = keys == threshold
    # One scan for both counts, 16 bits each: a block has at most 2^15 keys.
    packed = is_above.to(tl.uint32) + (is_tied.to(tl.uint32) << 16)
    scan = tl.cumsum(packed, axis=0)
    rank = tied + (scan >> 16).to(tl.int32)
    taken = is_above | (is_tied & (rank > first) & (rank <= last))
    ties_taken = tl.minimum(tl.maximum(rank - first, 0), last - first)
    slot = above + (scan & 0xFFFF).to(tl.int32) + ties_taken - 1
    tl.store(indices_ptr + slot, n, mask=taken)
    total = tl.sum(packed, axis=0)
    return above + (total & 0xFFFF).to(tl.int32), tied + (total >> 16).to(tl.int32)


@triton.jit
def _tie_ranks(threshold, need, count):
    """Which of the `count` ties to take, by rank: first < rank <= last."""
    # Ties take the lowest positions, except that of too many forced keys the highest are kept.
    first = tl.where(threshold == _FORCED, count - need, 0)
    last = tl.where(threshold == _NEVER, 0, first + need)
    return first, last


@triton.jit
def _pad(indices_ptr, start, K, BLOCK_N: tl.constexpr):
    for k0 in tl.range(start, K, BLOCK_N):
        slot = k0 + tl.arange(0, BLOCK_N)
        tl.store(indices_ptr + slot, tl.full((BLOCK_N,), -1, tl.int32), mask=slot < K)


@triton.jit
def _row_at(
    stride_scores_l, stride_scores_b, stride_scores_h, stride_candidates_b, stride_always_b,
    row, B, Hkv,
):  # fmt: skip
    """Where row `row` of [L, B, Hkv] begins in scores, candidates and always."""
    h = row % Hkv
    b = (row // Hkv) % B
    at = row // (Hkv * B) * stride_scores_l + b * stride_scores_b + h * stride_scores_h
    return at, b * stride_candidates_b, b * stride_always_b


@triton.jit
def _take_best(indices_ptr, keys, n, K, BLOCK: tl.constexpr):
    """Writes the K best of keys [BLOCK] at ascending positions n; those of no row are _NEVER."""
    threshold = _threshold(keys, K, K)
    count = tl.sum((keys == threshold).to(tl.int32), axis=0)
    need = K - tl.sum((keys > threshold).to(tl.int32), axis=0)
    first, last = _tie_ranks(threshold, need, count)
    _write_block(indices_ptr, keys, n, threshold, first, last, 0, 0)
    _pad(indices_ptr, K - need + last - first, K, BLOCK)


@triton.jit
def _take_best_of_row(
    scores_ptr, candidates_ptr, always_ptr, scores_at, candidates_at, always_at,
    indices_ptr,  # [K], the row's
    N, K,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same of a whole row, which is read 18 times."""
    offsets = tl.arange(0, BLOCK_N)
    threshold = tl.full((), 0, tl.uint32)
    for p in tl.range(16):
        step = tl.full((), 1, tl.uint32) << (30 - 2 * p)
        one = tl.zeros((BLOCK_N,), tl.int32)
        two = tl.zeros((BLOCK_N,), tl.int32)
        three = tl.zeros((BLOCK_N,), tl.int32)
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + offsets
            keys = _keys(
                scores_ptr, candidates_ptr, always_ptr, scores_at, candidates_at, always_at, n, N
            )
            one += (keys >= threshold + step).to(tl.int32)
            two += (keys >= threshold + 2 * step).to(tl.int32)
            three += (keys >= threshold + 3 * step).to(tl.int32)
        digit = (tl.sum(one, axis=0) >= K).to(tl.uint32)
        digit += (tl.sum(two, axis=0) >= K).to(tl.uint32)
        digit += (tl.sum(three, axis=0) >= K).to(tl.uint32)
        threshold += digit * step

    above = tl.zeros((BLOCK_N,), tl.int32)
    tied = tl.zeros((BLOCK_N,), tl.int32)
    for n0 in tl.range(0, N, BLOCK_N):
        n = n0 + offsets
        keys = _keys(
            scores_ptr, candidates_ptr, always_ptr, scores_at, candidates_at, always_at, n, N
        )
        above += (keys > threshold).to(tl.int32)
        tied += (keys == threshold).to(tl.int32)
    need = K - tl.sum(above, axis=0)
    first, last = _tie_ranks(threshold, need, tl.sum(tied, axis=0))
    over = 0
    ties = 0
    for n0 in tl.range(0, N, BLOCK_N):
        n = n0 + offsets
        keys = _keys(
            scores_ptr, candidates_ptr, always_ptr, scores_at, candidates_at, always_at, n, N
        )
        over, ties = _write_block(indices_ptr, keys, n, threshold, first, last, over, ties)
    _pad(indices_ptr, K - need + last - first, K, BLOCK_N)


@triton.jit(do_not_specialize=["B", "Hkv", "K"])
def _select_topk_row_kernel(
    scores_ptr, candidates_ptr, always_ptr,  # [L, B, Hkv, N], [B, N] or None, [B, N] or None
    indices_ptr,  # [L * B * Hkv, K]
    stride_scores_l, stride_scores_b, stride_scores_h, stride_candidates_b, stride_always_b,
    B, Hkv, N, K,
    ROOM: tl.constexpr,
):  # fmt: skip
    """Grid (L * B * Hkv,): a row of at most ROOM scores per program."""
    row = tl.program_id(0).to(tl.int64)
    scores_at, candidates_at, always_at = _row_at(
        stride_scores_l, stride_scores_b, stride_scores_h, stride_candidates_b, stride_always_b,
        row, B, Hkv,
    )  # fmt: skip
    n = tl.arange(0, ROOM)
    keys = _keys(scores_ptr, candidates_ptr, always_ptr, scores_at, candidates_at, always_at, n, N)
    _take_best(indices_ptr + row * K, keys, n, K, ROOM)


@triton.jit(do_not_specialize=["B", "Hkv", "least", "most"])
def _select_topk_sample_kernel(
    scores_ptr, candidates_ptr, always_ptr,  # [L, B, Hkv, N], [B, N] or None, [B, N] or None
    state_ptr,  # [L * B * Hkv, 2]: the floor, and how many positions are listed
    stride_scores_l, stride_scores_b, stride_scores_h, stride_candidates_b, stride_always_b,
    B, Hkv, N, least, most,
    SAMPLE: tl.constexpr,
):  # fmt: skip
    """Grid (L * B * Hkv,): a floor that `least` to `most` keys of a row's sample reach."""
    row = tl.program_id(0).to(tl.int64)
    scores_at, candidates_at, always_at = _row_at(
        stride_scores_l, stride_scores_b, stride_scores_h, stride_candidates_b, stride_always_b,
        row, B, Hkv,
    )  # fmt: skip
    part = tl.arange(0, SAMPLE)
    start = (part.to(tl.int64) * N // SAMPLE).to(tl.int32)
    stop = ((part + 1).to(tl.int64) * N // SAMPLE).to(tl.int32)
    # Anywhere in its part: frames of a video repeat themselves, at any distance.
    chance = (part.to(tl.uint32) * 2654435769) >> 21
    n = start + (((stop - start) * chance.to(tl.int32)) >> 11)
    keys = _keys(scores_ptr, candidates_ptr, always_ptr, scores_at, candidates_at, always_at, n, N)
    # Above _NEVER: what may not be selected is not listed.
    floor = tl.maximum(_threshold(keys, least, most), 1)
    tl.store(state_ptr + 2 * row, floor.to(tl.int32, bitcast=True))
    tl.store(state_ptr + 2 * row + 1, 0)


@triton.jit
def _count_bits(words):
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    return ((((words + (words >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["B", "Hkv", "chunks"])
def _select_topk_filter_kernel(
    scores_ptr, candidates_ptr, always_ptr,  # [L, B, Hkv, N], [B, N] or None, [B, N] or None
    state_ptr, chunks_ptr,  # [L * B * Hkv, 2], [L * B * Hkv, chunks, 2]: where its list is, length
    list_ptr,  # [L * B * Hkv, ROOM]
    stride_scores_l, stride_scores_b, stride_scores_h, stride_candidates_b, stride_always_b,
    B, Hkv, N, chunks,
    BLOCK_N: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Grid (L * B * Hkv * chunks,): lists the positions of a chunk whose keys reach the floor."""
    row = tl.program_id(0).to(tl.int64) // chunks
    chunk = tl.program_id(0) % chunks
    scores_at, candidates_at, always_at = _row_at(
        stride_scores_l, stride_scores_b, stride_scores_h, stride_candidates_b, stride_always_b,
        row, B, Hkv,
    )  # fmt: skip
    floor = tl.load(state_ptr + 2 * row).to(tl.uint32, bitcast=True)
    begin = chunk * BLOCK_N + tl.arange(0, BLOCK_N // _WORD) * _WORD
    lanes = tl.arange(0, _WORD)
    keys = _keys(
        scores_ptr, candidates_ptr, always_ptr, scores_at, candidates_at, always_at,
        begin[:, None] + lanes[None, :], N,
    )  # fmt: skip
    # Bits of 32 keys a word: to scan words and take out what few bits they have is a tenth of
    # the instructions of scanning keys.
    bits = tl.full((_WORD,), 1, tl.uint32) << lanes.to(tl.uint32)
    words = tl.sum(tl.where(keys >= floor, bits[None, :], 0), axis=1)
    counts = _count_bits(words)
    length = tl.sum(counts, axis=0)
    # Chunks come in any order, and `list` puts them into theirs.
    at = tl.atomic_add(state_ptr + 2 * row + 1, length, sem="relaxed")
    tl.store(chunks_ptr + 2 * (row * chunks + chunk), at)
    tl.store(chunks_ptr + 2 * (row * chunks + chunk) + 1, length)
    slots = at + tl.cumsum(counts, axis=0) - counts
    for _ in tl.range(tl.max(counts, axis=0)):
        rest = words & (words - 1)
        n = begin + _count_bits((words ^ rest) - 1)
        tl.store(list_ptr + row * ROOM + slots, n, mask=(words != 0) & (slots < ROOM))
        slots += 1
        words = rest


@triton.jit(do_not_specialize=["B", "Hkv", "K", "chunks"])
def _select_topk_list_kernel(
    scores_ptr, candidates_ptr, always_ptr,  # [L, B, Hkv, N], [B, N] or None, [B, N] or None
    state_ptr, chunks_ptr,  # [L * B * Hkv, 2], [L * B * Hkv, chunks, 2]
    list_ptr,  # [L * B * Hkv, ROOM]
    indices_ptr,  # [L * B * Hkv, K]
    stride_scores_l, stride_scores_b, stride_scores_h, stride_candidates_b, stride_always_b,
    B, Hkv, N, K, chunks,
    ROOM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (L * B * Hkv,): the best of a row's list, or of the row if the list is no good."""
    row = tl.program_id(0).to(tl.int64)
    scores_at, candidates_at, always_at = _row_at(
        stride_scores_l, stride_scores_b, stride_scores_h, stride_candidates_b, stride_always_b,
        row, B, Hkv,
    )  # fmt: skip
    indices_ptr += row * K
    floor = tl.load(state_ptr + 2 * row)
    listed = tl.load(state_ptr + 2 * row + 1)
    if (listed <= ROOM) & ((listed >= K) | (floor == 1)):
        i = tl.arange(0, ROOM)
        at = i
        begin = 0
        for chunk in tl.range(chunks):
            start = tl.load(chunks_ptr + 2 * (row * chunks + chunk))
            at = tl.where(i >= begin, start - begin + i, at)
            begin += tl.load(chunks_ptr + 2 * (row * chunks + chunk) + 1)
        # Beyond the list nothing is in the row: a key of N on is _NEVER.
        n = tl.load(list_ptr + row * ROOM + at, mask=i < begin, other=N)
        keys = _keys(
            scores_ptr, candidates_ptr, always_ptr, scores_at, candidates_at, always_at, n, N
        )
        _take_best(indices_ptr, keys, n, K, ROOM)
    else:
        _take_best_of_row(
            scores_ptr, candidates_ptr, always_ptr, scores_at, candidates_at, always_at,
            indices_ptr, N, K, BLOCK_N,
        )  # fmt: skip


def _plan_sample(k: int, N: int, sample: int) -> tuple[int, int, int]:
    """How many of a sample are to reach the floor, at least and at most, and the list's room.

    Of the k best a sample has k * sample / N, give or take the root: four times that, and four for
    where that is little, make a floor too high for k keys in less than one row of 10^5. What is
    listed has as much room again.
    """
    best = k * sample / N
    least = math.ceil(best + 4 * math.sqrt(best) + 4)
    most = least + least // 16
    return least, most, math.ceil((most + 4 * math.sqrt(most)) * N / sample)


def _config(kernel: str, scores: Tensor, capacity: int) -> _tuning.Config:
    arch = _tuning.arch_of(scores.device)
    return _tuning.config("select_topk", kernel, arch, _tuning.FLOAT, 0, capacity)


def _list(inputs: tuple, sizes: tuple, R: int, least: int, most: int, room: int) -> tuple:
    """Samples and filters R rows: state, chunks and list as `list` takes them."""
    scores, N = inputs[0], sizes[-1]
    sample, chunk = (_config(kernel, scores, N) for kernel in ("sample", "filter"))
    count = triton.cdiv(N, chunk.block_n)
    state = scores.new_empty((R, 2), dtype=torch.int32)
    chunks = scores.new_empty((R, count, 2), dtype=torch.int32)
    positions = scores.new_empty((R, room), dtype=torch.int32)
    _select_topk_sample_kernel[(R,)](
        *inputs, state, *sizes, least, most,
        SAMPLE=sample.split, num_warps=sample.num_warps, num_stages=sample.num_stages,
    )  # fmt: skip
    _select_topk_filter_kernel[(R * count,)](
        *inputs, state, chunks, positions, *sizes, count,
        BLOCK_N=chunk.block_n, ROOM=room,
        num_warps=chunk.num_warps, num_stages=chunk.num_stages,
    )  # fmt: skip
    return state, chunks, positions


def select_topk(
    scores: Tensor, k: int, candidates: Tensor | None, always: Tensor | None
) -> Tensor:
    """Launches the kernels; arguments as the op's, checked by its public function."""
    B, Hkv, N = scores.shape[-3:]
    indices = scores.new_empty((*scores.shape[:-1], k), dtype=torch.int32)
    if indices.numel() == 0:
        return indices
    # Leading dimensions that do not fold into one stride cost a copy.
    rows = scores.reshape(-1, B, Hkv, N)
    R = rows.shape[0] * B * Hkv
    inputs = rows, candidates, always
    strides = (0 if mask is None else mask.stride(0) for mask in (candidates, always))
    sizes = *rows.stride()[:3], *strides, B, Hkv, N
    least, most, wanted = _plan_sample(k, N, _config("sample", scores, N).split)
    best = _config("few", scores, N)
    if min(wanted, N) > best.split:
        best = _config("many", scores, N)
    room = best.split
    options: dict[str, Any] = {"num_warps": best.num_warps, "num_stages": best.num_stages}
    if N <= room:
        _select_topk_row_kernel[(R,)](*inputs, indices, *sizes, k, ROOM=room, **options)
        return indices
    if wanted <= room:
        listed = _list(inputs, sizes, R, least, most, room)
    else:
        listed = (indices.new_zeros((R, 1, 2)),) * 3  # nothing is
    _select_topk_list_kernel[(R,)](
        *inputs, *listed, indices, *sizes, k, listed[1].shape[1],
        ROOM=room, BLOCK_N=best.block_n, **options,
    )  # fmt: skip
    return indices


def aot_specs(arch: str, dtype: str, row: _tuning.Row) -> list[Spec]:
    """What a launch from `row` compiles, with both masks and with none."""
    strides = ("scores_l", "scores_b", "scores_h", "candidates_b", "always_b")
    types = {
        **dict.fromkeys(("candidates_ptr", "always_ptr"), "*i1"),
        "scores_ptr": "*fp32",
        **dict.fromkeys(("state_ptr", "chunks_ptr", "list_ptr", "indices_ptr"), "*i32"),
        **dict.fromkeys((f"stride_{x}" for x in strides), "i32"),
        **dict.fromkeys(("B", "Hkv", "N", "K", "chunks", "least", "most"), "i32"),
    }
    launch = row.num_warps, row.num_stages
    lengths = sorted({split for _, split in row.splits})
    kernels: list[tuple[Any, dict[str, Any]]] = []
    if row.kernel == "sample":
        kernels = [(_select_topk_sample_kernel, {"SAMPLE": length}) for length in lengths]
    elif row.kernel == "filter":
        room = _tuning.config("select_topk", "few", arch, dtype, 0, 1).split
        kernels = [(_select_topk_filter_kernel, {"BLOCK_N": row.block_n, "ROOM": room})]
    else:
        for length in lengths:
            tile = {"ROOM": length, "BLOCK_N": row.block_n}
            kernels.append((_select_topk_row_kernel, {"ROOM": length}))
            kernels.append((_select_topk_list_kernel, tile))
    specs = []
    for kernel, tile in kernels:
        names = {parameter.name for parameter in kernel.params} - set(tile)
        for without in ((), ("candidates_ptr", "always_ptr")):
            given = {name: types[name] for name in names if name not in without}
            specs.append(aot_spec(kernel, given, {**tile, **dict.fromkeys(without)}, *launch))
    # A masked load is as wide as N allows: capacities are multiples of 16.
    for spec in specs:
        spec.attrs[(list(spec.signature).index("N"),)] = [["tt.divisibility", 16]]
    return specs

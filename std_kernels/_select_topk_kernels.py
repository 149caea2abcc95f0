"""select_topk in Triton: a radix select that counts in 8-bit digits, without atomics.

A score becomes a uint32 in the same order. Four passes count the digits of the keys that share
the digits found so far, which narrows the k-th largest down to one key; a last pass writes the
positions of what is over it and of as many equal to it as there is room for, by prefix sums in
position order. Bytes moved: each score five times, all but the first from L2 where the scores fit
it. Short rows take one launch, long ones five, a chunk of a row to a program.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from std_kernels import _tuning
from std_kernels._device import Spec, aot_spec

_BINS = tl.constexpr(256)
# What a key that may not be selected, and one that must be, counts as.
_NEVER = tl.constexpr(0)
_FORCED = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _keys(
    scores_ptr, candidates_ptr, always_ptr,
    scores_at, candidates_at, always_at,  # where the row's [N] begin, from _row_at
    n, in_row,  # [BLOCK_N]
):  # fmt: skip
    """Scores as uint32 in the same order: equal zeros, _NEVER and _FORCED by the op's rules."""
    # On bits, not floats: a GPU may flush denormals, and NaN compares differ between backends.
    bits = tl.load(scores_ptr + scores_at + n, mask=in_row, other=0.0).to(tl.uint32, bitcast=True)
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
def _count_digits(
    counts,  # [256]
    keys, in_row,  # [BLOCK_N]
    prefix,
    PASS: tl.constexpr,
):  # fmt: skip
    """Adds to `counts` the digits of pass PASS of the keys that agree with `prefix` so far."""
    digits = ((keys >> (24 - 8 * PASS)) & 255).to(tl.int32)
    if PASS == 0:
        counts += tl.histogram(digits, _BINS, mask=in_row)
    else:
        agree = in_row & ((keys >> (32 - 8 * PASS)) == (prefix >> (32 - 8 * PASS)))
        # From the second pass on most blocks hold none, and a histogram is 64 ballots a warp.
        if tl.max(agree.to(tl.int32), axis=0) > 0:
            counts += tl.histogram(digits, _BINS, mask=agree)
    return counts


@triton.jit
def _narrow(counts, prefix, need, PASS: tl.constexpr):
    """The digit of the need-th largest key: prefix with it, need within it, its bin, its count."""
    bins = tl.arange(0, _BINS)
    at_least = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
    digit = tl.max(tl.where(at_least >= need, bins, 0), axis=0)
    above = tl.sum(tl.where(bins > digit, counts, 0), axis=0)
    count = tl.sum(tl.where(bins == digit, counts, 0), axis=0)
    return prefix | (digit.to(tl.uint32) << (24 - 8 * PASS)), need - above, digit, count


@triton.jit
def _write_block(
    indices_ptr,  # [K], the row's
    keys, n, in_row,  # [BLOCK_N]
    threshold, first, last,
    above, tied,
):  # fmt: skip
    """Writes the block's keys over the threshold, and ties of rank first < rank <= last.

    `above` and `tied` count both kinds in what lies before the block, and are returned advanced.
    """
    is_above = in_row & (keys > threshold)
    is_tied = in_row & (keys == threshold)
    # One scan for both counts, 16 bits each: a block has fewer than 2^15 keys.
    packed = is_above.to(tl.int32) + (is_tied.to(tl.int32) << 16)
    scan = tl.cumsum(packed, axis=0)
    rank = tied + (scan >> 16)
    taken = is_above | (is_tied & (rank > first) & (rank <= last))
    ties_taken = tl.minimum(tl.maximum(rank - first, 0), last - first)
    slot = above + (scan & 0xFFFF) + ties_taken - 1
    tl.store(indices_ptr + slot, n, mask=taken)
    total = tl.sum(packed, axis=0)
    return above + (total & 0xFFFF), tied + (total >> 16)


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


@triton.jit(do_not_specialize=["B", "Hkv", "K"])
def _select_topk_row_kernel(
    scores_ptr, candidates_ptr, always_ptr,  # [L, B, Hkv, N], [B, N] or None, [B, N] or None
    indices_ptr,  # [L * B * Hkv, K]
    stride_scores_l, stride_scores_b, stride_scores_h, stride_candidates_b, stride_always_b,
    B, Hkv, N, K,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (L * B * Hkv,): a row per program, everything in one launch."""
    row = tl.program_id(0).to(tl.int64)
    scores_at, candidates_at, always_at = _row_at(
        stride_scores_l, stride_scores_b, stride_scores_h, stride_candidates_b, stride_always_b,
        row, B, Hkv,
    )  # fmt: skip
    indices_ptr += row * K
    offsets = tl.arange(0, BLOCK_N)
    prefix = tl.full((), 0, tl.uint32)
    need = K
    count = 0
    for p in tl.static_range(4):
        counts = tl.zeros((_BINS,), tl.int32)
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + offsets
            keys = _keys(
                scores_ptr,
                candidates_ptr,
                always_ptr,
                scores_at,
                candidates_at,
                always_at,
                n,
                n < N,
            )
            counts = _count_digits(counts, keys, n < N, prefix, p)
        prefix, need, _, count = _narrow(counts, prefix, need, p)

    first, last = _tie_ranks(prefix, need, count)
    above = 0
    tied = 0
    for n0 in tl.range(0, N, BLOCK_N):
        n = n0 + offsets
        keys = _keys(
            scores_ptr, candidates_ptr, always_ptr, scores_at, candidates_at, always_at, n, n < N
        )
        above, tied = _write_block(indices_ptr, keys, n, n < N, prefix, first, last, above, tied)
    _pad(indices_ptr, K - need + last - first, K, BLOCK_N)


@triton.jit
def _finish_pass(
    counts_ptr, state_ptr,  # [2, CHUNKS, 256], the row's; [3], the program's
    chunk, K,
    PASS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Narrows by the digits that the launch before this one counted in all chunks of the row.

    Returns prefix, need and count as of _narrow, and how many keys of the chunks before this one
    are over the bins chosen so far, and in the last one.
    """
    chunks = tl.arange(0, CHUNKS)[:, None]
    bins = tl.arange(0, _BINS)[None, :]
    counts = tl.load(counts_ptr + (PASS % 2 * CHUNKS + chunks) * _BINS + bins)
    prefix = tl.full((), 0, tl.uint32)
    need = K
    above = 0
    if PASS > 0:
        prefix = tl.load(state_ptr).to(tl.uint32, bitcast=True)
        need = tl.load(state_ptr + 1)
        above = tl.load(state_ptr + 2)
    prefix, need, digit, count = _narrow(tl.sum(counts, axis=0), prefix, need, PASS)
    earlier = tl.where(chunks < chunk, counts, 0)
    above += tl.sum(tl.sum(tl.where(bins > digit, earlier, 0), axis=1), axis=0)
    tied = tl.sum(tl.sum(tl.where(bins == digit, earlier, 0), axis=1), axis=0)
    return prefix, need, count, above, tied


@triton.jit(do_not_specialize=["B", "Hkv", "K"])
def _select_topk_count_kernel(
    scores_ptr, candidates_ptr, always_ptr,  # [L, B, Hkv, N], [B, N] or None, [B, N] or None
    counts_ptr, state_ptr,  # [L * B * Hkv, 2, CHUNKS, 256], [L * B * Hkv, CHUNKS, 3]
    stride_scores_l, stride_scores_b, stride_scores_h, stride_candidates_b, stride_always_b,
    B, Hkv, N, K,
    PASS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (L * B * Hkv * CHUNKS,): counts the digits of pass PASS, a chunk of a row each."""
    row = tl.program_id(0).to(tl.int64) // CHUNKS
    chunk = tl.program_id(0) % CHUNKS
    scores_at, candidates_at, always_at = _row_at(
        stride_scores_l, stride_scores_b, stride_scores_h, stride_candidates_b, stride_always_b,
        row, B, Hkv,
    )  # fmt: skip
    counts_ptr += row * (2 * CHUNKS * _BINS)
    # The program of the same row and chunk finds its state here in the next launch.
    state_ptr += (row * CHUNKS + chunk) * 3
    prefix = tl.full((), 0, tl.uint32)
    if PASS > 0:
        prefix, need, _, above, _ = _finish_pass(counts_ptr, state_ptr, chunk, K, PASS - 1, CHUNKS)
        tl.store(state_ptr, prefix.to(tl.int32, bitcast=True))
        tl.store(state_ptr + 1, need)
        tl.store(state_ptr + 2, above)
    counts = tl.zeros((_BINS,), tl.int32)
    for n0 in tl.range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, N), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        keys = _keys(
            scores_ptr, candidates_ptr, always_ptr, scores_at, candidates_at, always_at, n, n < N
        )
        counts = _count_digits(counts, keys, n < N, prefix, PASS)
    bins = tl.arange(0, _BINS)
    # Two buffers take turns: other programs still read the other one.
    tl.store(counts_ptr + (PASS % 2 * CHUNKS + chunk) * _BINS + bins, counts)


@triton.jit(do_not_specialize=["B", "Hkv", "K"])
def _select_topk_write_kernel(
    scores_ptr, candidates_ptr, always_ptr,  # [L, B, Hkv, N], [B, N] or None, [B, N] or None
    counts_ptr, state_ptr,  # [L * B * Hkv, 2, CHUNKS, 256], [L * B * Hkv, CHUNKS, 3]
    indices_ptr,  # [L * B * Hkv, K]
    stride_scores_l, stride_scores_b, stride_scores_h, stride_candidates_b, stride_always_b,
    B, Hkv, N, K,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (L * B * Hkv * CHUNKS,): writes the positions a chunk of a row contributes."""
    row = tl.program_id(0).to(tl.int64) // CHUNKS
    chunk = tl.program_id(0) % CHUNKS
    scores_at, candidates_at, always_at = _row_at(
        stride_scores_l, stride_scores_b, stride_scores_h, stride_candidates_b, stride_always_b,
        row, B, Hkv,
    )  # fmt: skip
    indices_ptr += row * K
    threshold, need, count, above, tied = _finish_pass(
        counts_ptr + row * (2 * CHUNKS * _BINS), state_ptr + (row * CHUNKS + chunk) * 3,
        chunk, K, 3, CHUNKS,
    )  # fmt: skip
    first, last = _tie_ranks(threshold, need, count)
    # Ranks of ties start at `first`, so those before it take no slot.
    for n0 in tl.range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, N), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        keys = _keys(
            scores_ptr, candidates_ptr, always_ptr, scores_at, candidates_at, always_at, n, n < N
        )
        above, tied = _write_block(
            indices_ptr, keys, n, n < N, threshold, first, last, above, tied
        )
    if chunk == 0:
        _pad(indices_ptr, K - need + last - first, K, BLOCK_N)


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
    sizes = (
        *rows.stride()[:3],
        0 if candidates is None else candidates.stride(0),
        0 if always is None else always.stride(0),
        B, Hkv, N, k,
    )  # fmt: skip
    arch = _tuning.arch_of(scores.device)
    row = _tuning.config("select_topk", "row", arch, _tuning.FLOAT, 0, N)
    if N <= row.split:
        _select_topk_row_kernel[(R,)](
            *inputs, indices, *sizes,
            BLOCK_N=row.block_n, num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
        return indices
    chunk = _tuning.config("select_topk", "chunk", arch, _tuning.FLOAT, 0, N)
    chunks = triton.next_power_of_2(triton.cdiv(N, chunk.split))
    counts = scores.new_empty((R, 2, chunks, 256), dtype=torch.int32)
    state = scores.new_empty((R, chunks, 3), dtype=torch.int32)
    options: dict[str, Any] = {
        "CHUNK": chunk.split,
        "CHUNKS": chunks,
        "BLOCK_N": chunk.block_n,
        "num_warps": chunk.num_warps,
        "num_stages": chunk.num_stages,
    }
    grid = (R * chunks,)
    for p in range(4):
        _select_topk_count_kernel[grid](*inputs, counts, state, *sizes, PASS=p, **options)
    _select_topk_write_kernel[grid](*inputs, counts, state, indices, *sizes, **options)
    return indices


def aot_specs(arch: str, dtype: str, row: _tuning.Row) -> list[Spec]:
    """What a launch from `row` compiles, with both masks and with none."""
    strides = ("scores_l", "scores_b", "scores_h", "candidates_b", "always_b")
    types = {
        "scores_ptr": "*fp32",
        "candidates_ptr": "*i1",
        "always_ptr": "*i1",
        "indices_ptr": "*i32",
        **dict.fromkeys((f"stride_{x}" for x in strides), "i32"),
        **dict.fromkeys(("B", "Hkv", "N", "K"), "i32"),
    }
    launch = row.num_warps, row.num_stages
    masks = ("candidates_ptr", "always_ptr")
    if row.kernel == "row":
        kernels = [(_select_topk_row_kernel, {"BLOCK_N": row.block_n})]
    else:
        types |= {"counts_ptr": "*i32", "state_ptr": "*i32"}
        capacity, split = row.splits[0]
        tile = {"CHUNK": split, "CHUNKS": capacity // split, "BLOCK_N": row.block_n}
        kernels = [(_select_topk_count_kernel, {**tile, "PASS": p}) for p in range(4)]
        kernels.append((_select_topk_write_kernel, tile))
    specs = []
    for kernel, tile in kernels:
        names = {parameter.name for parameter in kernel.params} - set(tile)
        for without in ((), masks):
            given = {name: types[name] for name in names if name not in without}
            specs.append(aot_spec(kernel, given, {**tile, **dict.fromkeys(without)}, *launch))
    # A masked load is as wide as N allows: capacities are multiples of 16.
    for spec in specs:
        spec.attrs[(list(spec.signature).index("N"),)] = [["tt.divisibility", 16]]
    return specs

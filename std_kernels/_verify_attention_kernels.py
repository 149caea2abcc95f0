"""Triton kernels of verify_attention: split over the keys, then a merge of the splits.

One program reads the keys of one split once for a tile of query rows; row r of a KV head is query
token r // G of head r % G of its group. Bytes moved: K and V of the visible keys, and for each
split and query row one float32 row of D + 4 that the merge reads back.

A row's result does not depend on T or on the other rows, bit for bit: tiles and splits are fixed
by (device, dtype, D, B, Hkv, N, window) and stand at absolute positions; no argument that varies
with T, or with where in a batch a row stands, is specialised; the loop over keys is not peeled, so
that every tile takes the same instructions; a tile in which a row sees nothing leaves its bits
alone; and splits are merged in ascending order. How many rows there are does count: the more
there are to fill the GPU with, the longer the splits, and the fewer partial results.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from std_kernels._device import (
    PARTIAL_PAD,
    Spec,
    aot_spec,
    base2_logits,
    cast,
    check_grid,
    dot,
    in_units,
    load_query,
    logit_scales,
    merge_kernel,
    online_softmax,
    padded,
    query_rows,
    store_partial,
    stride_unit,
    visible_range,
)
from std_kernels._packed import out_like
from std_kernels._tuning import (
    Row,
    arch_of,
    config,
    launches_early,
    precision,
    target_launches_early,
)

MERGED_AT_ONCE = 16


@triton.jit(
    do_not_specialize=[
        *("T", "window", "num_splits"),
        *("stride_query_b", "stride_query_h", "stride_query_t"),
    ],
    do_not_specialize_on_alignment=["kv_len_ptr", "kv_start_ptr", "score_lse_ptr"],
)
def _verify_split_kernel(
    query_ptr,  # [B, Hq, T, D]
    key_ptr, value_ptr,  # [B, Hkv, N, D]
    kv_len_ptr, kv_start_ptr,  # [B]; [B] or None
    score_lse_ptr,  # [B, Hq, T], contiguous, or None
    partial_ptr,  # [B * Hkv, num_splits, T * G, BLOCK_D + PARTIAL_PAD]
    scores_ptr,  # [row tiles, B, Hkv, N], contiguous, or None
    stride_query_b, stride_query_h, stride_query_t,
    stride_key_b, stride_key_h, stride_key_n,
    stride_value_b, stride_value_h, stride_value_n,
    T, N, window, num_splits,
    scale, softcap,  # from logit_scales
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
    UNIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:  # the merge's launch is under way while this runs; it waits for the end by itself
        gdc_launch_dependents()
    # Row tiles are neighbours in launch order: the second finds the keys in L2.
    tile, bh = tl.program_id(0), tl.program_id(2).to(tl.int64)
    b, h = bh // HKV, bh % HKV
    start, stop = visible_range(b, kv_len_ptr, kv_start_ptr, T, window)
    s = tl.program_id(1)
    if window is not None and scores_ptr is None:
        # The grid covers as many splits as a window can touch.
        s += start // SPLIT
    low = s * SPLIT
    o = tl.arange(0, BLOCK_N)
    if scores_ptr is not None:
        scores_ptr += (tile * tl.num_programs(2) + bh) * N
        for n0 in tl.range(low, tl.minimum(low + SPLIT, N), BLOCK_N):
            if (n0 + BLOCK_N <= start) | (n0 >= stop) | (start >= stop):
                tl.store(scores_ptr + n0 + o, tl.zeros([BLOCK_N], tl.float32), mask=n0 + o < N)
    if (low >= stop) | (low + SPLIT <= start) | (start >= stop):
        return

    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t, g = r // G, r % G
    d = tl.arange(0, BLOCK_D)
    query = load_query(
        query_ptr, b, h * G, t, g, T, stride_query_b, stride_query_h, stride_query_t, d, D
    )  # [BLOCK_M, BLOCK_D]
    position = stop - T + t
    key_ptr += b * in_units(stride_key_b, UNIT) + h * in_units(stride_key_h, UNIT)
    value_ptr += b * in_units(stride_value_b, UNIT) + h * in_units(stride_value_h, UNIT)
    stride_key_n = in_units(stride_key_n, UNIT)
    stride_value_n = in_units(stride_value_n, UNIT)
    if scores_ptr is not None:
        at = (bh * G + g) * T + t
        cut = tl.load(score_lse_ptr + at, mask=t < T, other=float("inf")) * 1.4426950408889634
        cut = tl.where(cut < float("inf"), cut, float("inf"))  # NaN switches a row off too

    top = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first = tl.maximum(low, start // BLOCK_N * BLOCK_N)
    last = tl.minimum(low + SPLIT, stop)
    # Were the loop passed by, acc would get a value on the way to the last wait for a product, and
    # ptxas then has every wgmma of the loop wait for the one before. Where there are scores it
    # does not, and to say it costs registers: 121 spills on sm_100 at D = 128.
    if scores_ptr is None:
        tl.assume(first < last)
    for n0 in tl.range(first, last, BLOCK_N):
        n = n0 + o
        valid = (n >= start) & (n < stop)
        key = tl.load(
            key_ptr + n.to(tl.int64)[None, :] * stride_key_n + d[:, None],
            mask=valid[None, :] & (d < D)[:, None],
            other=0.0,
        )  # [BLOCK_D, BLOCK_N]
        product = dot(query, key, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        x = base2_logits(product, scale, softcap)
        seen = valid[None, :] & (n[None, :] <= position[:, None])
        if window is not None:
            seen = seen & (n[None, :] > position[:, None] - window)
        if scores_ptr is not None:
            share = 1.0 / (1.0 + tl.exp2(cut[:, None] - x))
            tl.store(scores_ptr + n, tl.sum(tl.where(seen, share, 0.0), 0), mask=n < N)
        x = tl.where(seen, x, float("-inf"))
        weights, factor, top, total = online_softmax(x, top, total)
        # Masked as the keys are: what is stale may be NaN, and NaN times a weight of 0 is NaN.
        value = tl.load(
            value_ptr + n.to(tl.int64)[:, None] * stride_value_n + d[None, :],
            mask=valid[:, None] & (d < D)[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_D]
        acc = dot(cast(weights, value_ptr.dtype.element_ty), value, acc * factor[:, None])

    row = (bh * num_splits + s - start // SPLIT) * (T * G) + r
    store_partial(partial_ptr, row, t < T, acc, top, total, BLOCK_D)


def verify_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_len: Tensor,
    kv_start: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Two launches; the arguments are those of the op's schema."""
    return _launch(query, key, value, kv_len, None, kv_start, window, scale, softcap, sinks, None)


def verify_attention_with_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_len: Tensor,
    score_lse: Tensor,
    kv_start: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    scores: Tensor,
) -> tuple[Tensor, Tensor]:
    """Two launches, and a sum over row tiles where T * G rows do not fit one."""
    return _launch(
        query, key, value, kv_len, score_lse, kv_start, window, scale, softcap, sinks, scores
    )


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_len: Tensor,
    score_lse: Tensor | None,
    kv_start: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    scores: Tensor | None,
) -> tuple[Tensor, Tensor]:
    B, Hq, T, D = query.shape
    _, Hkv, N, _ = key.shape
    query = query_rows(query)
    plan = _plan(query.device, query.dtype, B, Hq, Hkv, T, D, N, window, scores is not None)
    grid, merge_grid, partial_size, options, merge_options = plan
    out = out_like(query)
    lse = torch.empty((B, Hq, T), dtype=torch.float32, device=query.device)
    if not lse.numel():
        return out, lse
    tiles = scores
    if scores is not None and score_lse is not None:
        score_lse = score_lse.contiguous()
        if grid[0] > 1:
            tiles = scores.new_empty((grid[0], *scores.shape))
    partial = lse.new_empty(partial_size)
    scale, softcap = logit_scales(scale, softcap)
    if N:
        _verify_split_kernel[grid](
            query, key, value, kv_len, kv_start, score_lse, partial, tiles,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            T, N, window, grid[1], scale, softcap, **options, UNIT=stride_unit(D, key, value),
        )  # fmt: skip
    merge_kernel[merge_grid](
        partial, kv_len, kv_start, sinks, out, lse, T, window, grid[1], **merge_options
    )
    if tiles is not scores:
        torch.sum(tiles, 0, out=scores)
    return out, lse


@lru_cache(maxsize=1024)
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    B: int,
    Hq: int,
    Hkv: int,
    T: int,
    D: int,
    N: int,
    window: int | None,
    scored: bool,
) -> tuple[tuple, tuple, int, dict[str, Any], dict[str, Any]]:
    """Everything a launch needs that follows from shapes: a decoder has few, and asks often."""
    check_grid("verify_attention", B, Hkv)
    # Never of T: see the promise above.
    keys = B * Hkv * (N if window is None else min(N, window))
    row = config("verify_attention", "split", arch_of(device), precision(dtype), D, keys)
    G, block_d, early = Hq // Hkv, padded(D), launches_early(device)
    num_splits = -(-N // row.split)
    if window is not None and not scored:
        # T rows of a window each see window + T - 1 keys between them, wherever those start.
        num_splits = min(num_splits, (window + T - 2) // row.split + 2)
    grid = (-(-T * G // row.block_m), num_splits, B * Hkv)
    shared = dict(HKV=Hkv, G=G, D=D, BLOCK_D=block_d, SPLIT=row.split, PDL=early)
    options = dict(
        **shared,
        BLOCK_M=row.block_m,
        BLOCK_N=row.block_n,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
    )
    size = B * Hkv * num_splits * T * G * (block_d + PARTIAL_PAD)
    merge_options = dict(**shared, BLOCK_S=MERGED_AT_ONCE, num_warps=4)
    if early:
        merge_options["launch_pdl"] = True
    return grid, (T * G, B * Hkv), size, options, merge_options


def aot_specs(arch: str, dtype: str, row: Row) -> list[Spec]:
    """The plain op, the op with scores, one with every option, and the merge."""
    half, tile = f"*{dtype}", row.config()
    early = target_launches_early(arch)
    shared = dict(HKV=4, G=7, D=row.head_dim, BLOCK_D=padded(row.head_dim), SPLIT=tile.split)
    shared |= dict(PDL=early)
    sizes = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, UNIT=stride_unit(row.head_dim))
    strides = [f"stride_{x}" for x in ("query_b", "query_h", "query_t")]
    strides += [f"stride_{x}_{i}" for x in ("key", "value") for i in "bhn"]
    types = dict.fromkeys(strides, "i32") | dict.fromkeys(("T", "N", "num_splits"), "i32")
    types |= dict(query_ptr=half, key_ptr=half, value_ptr=half, partial_ptr="*fp32", scale="fp32")
    types |= dict(kv_len_ptr="*i32", kv_start_ptr="*i32")
    scores = dict(score_lse_ptr="*fp32", scores_ptr="*fp32")
    options = dict(window="i32", softcap="fp32")
    off = dict.fromkeys
    specs = [
        aot_spec(_verify_split_kernel, types | present, shared | sizes | off(absent), *tile[3:])
        for present, absent in (({}, {**scores, **options}), (scores, options), (options, scores))
    ]
    types = dict(partial_ptr="*fp32", lse_ptr="*fp32", sinks_ptr="*fp32", out_ptr=half)
    types |= dict(kv_len_ptr="*i32", kv_start_ptr="*i32")
    types |= dict.fromkeys(("T", "window", "num_splits"), "i32")
    shared |= dict(BLOCK_S=MERGED_AT_ONCE)
    merge = aot_spec(merge_kernel, types, shared, 4, launch_pdl=early)
    return [*specs, merge]

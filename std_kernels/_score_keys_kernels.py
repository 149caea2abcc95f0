"""score_keys in Triton: three launches, no atomics, and the W x N matrix stays in registers.

    lse[r] = log-sum-exp of row r's logits     per split of the keys, then merged over the splits
    scores[n] = sum over r of exp(logit[r, n] - lse[r])     a key tile stays, the rows stream by

Rows are r = w * G + g, so that all G heads share each key. Compute-bound: 4 W G Hkv D operations a
key in two passes over the keys, against 4 D Hkv bytes of keys read in 16 bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from std_kernels import _tuning
from std_kernels._device import (
    LOG2E,
    NEG_INF,
    NO_KEY,
    Spec,
    aot_spec,
    base2_logits,
    check_grid,
    dot,
    in_units,
    logit_scales,
    online_softmax,
    padded,
    query_rows,
    stride_unit,
)

_MERGE_ROWS = 128
_MERGE_WARPS = 4


@triton.jit
def _ranges(kv_len_ptr, kv_start_ptr, num_queries_ptr, b, W):
    """Row b's valid keys low <= n < high, its first query that counts and sees one, the count."""
    high = tl.load(kv_len_ptr + b)
    low = 0
    if kv_start_ptr is not None:
        low = tl.load(kv_start_ptr + b)
    count = W
    if num_queries_ptr is not None:
        count = tl.load(num_queries_ptr + b)
    # Query w stands at high - W + w. Those that see nothing count in the mean, but go unread.
    first = tl.maximum(W - count, low - high + W)
    return low, high, first, count


@triton.jit
def _load_tile(
    base_ptr, at,  # [ROWS] where each row begins
    keep,  # [ROWS] bool
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows [ROWS, BLOCK_D], 0 where not kept: stale memory may be NaN."""
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = keep[:, None]
    if D != BLOCK_D:
        mask = mask & (d < D)
    return tl.load(base_ptr + at[:, None] + d, mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=[
        *("W", "num_splits", "stride_query_b", "stride_query_h", "stride_query_w"),
    ],
    do_not_specialize_on_alignment=["kv_len_ptr", "kv_start_ptr", "num_queries_ptr"],
)
def _score_keys_lse_kernel(
    query_ptr, key_ptr,  # [B, Hq, W, D], [B, Hkv, N, D]
    kv_len_ptr, kv_start_ptr, num_queries_ptr,  # [B], [B] or None, [B] or None
    partial_ptr,  # [B * Hkv, num_splits, W * G] float32, base-2 lse
    stride_query_b, stride_query_h, stride_query_w,
    stride_key_b, stride_key_h, stride_key_n,
    W, num_splits,
    scale, softcap,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows, num_splits, B * Hkv): one split's lse of BLOCK_M rows."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // HKV, bh % HKV
    low, high, first, _ = _ranges(kv_len_ptr, kv_start_ptr, num_queries_ptr, b, W)
    start = tl.maximum(split * SPLIT, low)
    stop = tl.minimum(split * SPLIT + SPLIT, high)
    # The merge does not read what is not written here.
    if (start >= stop) | (tile * BLOCK_M + BLOCK_M <= first * G):
        return

    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    w = r // G
    counted = (w >= first) & (w < W)
    at = (h * G + r % G) * in_units(stride_query_h, 8)
    at += b * in_units(stride_query_b, 8) + w.to(tl.int64) * in_units(stride_query_w, 8)
    rows = _load_tile(query_ptr, at, counted, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    key_ptr += b * in_units(stride_key_b, UNIT) + h * in_units(stride_key_h, UNIT)
    stride_key_n = in_units(stride_key_n, UNIT)
    top = tl.full((BLOCK_M,), NO_KEY, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for n0 in tl.range(start, stop, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        keys = _load_tile(key_ptr, n.to(tl.int64) * stride_key_n, n < stop, D, BLOCK_D)
        product = dot(rows, tl.trans(keys), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        visible = (n < stop)[None, :] & (n[None, :] <= (high - W + w)[:, None])
        logits = tl.where(visible, base2_logits(product, scale, softcap), NEG_INF)
        _weights, _factor, top, total = online_softmax(logits, top, total)

    seen = total > 0.0
    lse = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), NEG_INF)
    tl.store(partial_ptr + (bh * num_splits + split) * (W * G) + r, lse, mask=counted)


@triton.jit(
    do_not_specialize=["W", "num_splits"],
    do_not_specialize_on_alignment=["kv_len_ptr", "kv_start_ptr", "num_queries_ptr", "sinks_ptr"],
)
def _score_keys_merge_kernel(
    partial_ptr, lse_ptr,  # [B * Hkv, num_splits, W * G], [B * Hkv, W * G], base 2
    kv_len_ptr, kv_start_ptr, num_queries_ptr, sinks_ptr,  # [B], 2 [B] or None, [Hq] or None
    W, num_splits,
    HKV: tl.constexpr, G: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows, B * Hkv): merges the splits; +inf for a row that gives no key any."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // HKV, bh % HKV
    low, high, first, _ = _ranges(kv_len_ptr, kv_start_ptr, num_queries_ptr, b, W)
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    counted = (r // G >= first) & (r // G < W)
    top = tl.full((BLOCK_M,), NO_KEY, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if sinks_ptr is not None:
        top = tl.maximum(tl.load(sinks_ptr + h * G + r % G) * LOG2E, NO_KEY)
        total += 1.0
    for split in tl.range(low // SPLIT, tl.cdiv(high, SPLIT)):
        at = partial_ptr + (bh * num_splits + split) * (W * G) + r
        part = tl.load(at, mask=counted, other=NEG_INF)
        new_top = tl.maximum(top, part)
        total = total * tl.exp2(top - new_top) + tl.exp2(part - new_top)
        top = new_top
    seen = counted & (total > 0.0)
    lse = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("inf"))
    tl.store(lse_ptr + bh * (W * G) + r, lse, mask=r < W * G)


@triton.jit(
    do_not_specialize=["W", "stride_query_b", "stride_query_h", "stride_query_w"],
    do_not_specialize_on_alignment=["kv_len_ptr", "kv_start_ptr", "num_queries_ptr"],
)
def _score_keys_column_kernel(
    query_ptr, key_ptr,  # [B, Hq, W, D], [B, Hkv, N, D]
    kv_len_ptr, kv_start_ptr, num_queries_ptr,  # [B], [B] or None, [B] or None
    lse_ptr, scores_ptr,  # [B * Hkv, W * G] base 2, [B * Hkv, N]
    stride_query_b, stride_query_h, stride_query_w,
    stride_key_b, stride_key_h, stride_key_n,
    W, N,
    scale, softcap,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of keys, B * Hkv): the mean probability of BLOCK_N keys over all rows."""
    tile = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // HKV, bh % HKV
    low, high, first, count = _ranges(kv_len_ptr, kv_start_ptr, num_queries_ptr, b, W)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    shares = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if (tile * BLOCK_N < high) & (tile * BLOCK_N + BLOCK_N > low):
        valid = (n >= low) & (n < high)
        key_ptr += b * in_units(stride_key_b, UNIT) + h * in_units(stride_key_h, UNIT)
        stride_key_n = in_units(stride_key_n, UNIT)
        keys = _load_tile(key_ptr, n.to(tl.int64) * stride_key_n, valid, D, BLOCK_D)
        stride_query_h = in_units(stride_query_h, 8)
        stride_query_w = in_units(stride_query_w, 8)
        query_ptr += b * in_units(stride_query_b, 8) + h * G * stride_query_h
        for r0 in tl.range(first * G // BLOCK_M * BLOCK_M, W * G, BLOCK_M):
            r = r0 + tl.arange(0, BLOCK_M)
            w = r // G
            at = (r % G).to(tl.int64) * stride_query_h + w.to(tl.int64) * stride_query_w
            rows = _load_tile(query_ptr, at, (w >= first) & (w < W), D, BLOCK_D)
            lse = tl.load(lse_ptr + bh * (W * G) + r, mask=w < W, other=float("inf"))
            product = dot(rows, tl.trans(keys), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            visible = valid[None, :] & (n[None, :] <= (high - W + w)[:, None])
            share = tl.exp2(base2_logits(product, scale, softcap) - lse[:, None])
            # Rows are in different warps: summed here, every tile would cost a reduction.
            shares += tl.where(visible, share, 0.0)
    total = tl.sum(shares, axis=0)
    mean = total / (tl.maximum(count, 1) * G)
    tl.store(scores_ptr + bh * N + n, mean, mask=n < N)


def score_keys(
    query: Tensor,
    key: Tensor,
    kv_len: Tensor,
    kv_start: Tensor | None,
    num_queries: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Launches the kernels; arguments as the op's, checked by its public function."""
    B, Hq, W, D = query.shape
    Hkv, N = key.shape[1], key.shape[2]
    G = Hq // Hkv
    scores = key.new_empty((B, Hkv, N), dtype=torch.float32)
    if scores.numel() == 0:
        return scores
    check_grid("score_keys", B, Hkv)
    arch, precision = _tuning.arch_of(query.device), _tuning.precision(query.dtype)
    partly = _tuning.config("score_keys", "lse", arch, precision, D, N)
    column = _tuning.config("score_keys", "column", arch, precision, D, N)
    splits = triton.cdiv(N, partly.split)
    partial = key.new_empty((B * Hkv, splits, W * G), dtype=torch.float32)
    lse = key.new_empty((B * Hkv, W * G), dtype=torch.float32)
    ranges = kv_len, kv_start, num_queries
    query = query_rows(query)
    strides = (*query.stride()[:3], *key.stride()[:3])
    scales = logit_scales(scale, softcap)
    sizes: dict[str, Any] = {"HKV": Hkv, "G": G, "D": D, "BLOCK_D": padded(D)}
    sizes["UNIT"] = stride_unit(D, key)

    _score_keys_lse_kernel[(triton.cdiv(W * G, partly.block_m), splits, B * Hkv)](
        query, key, *ranges, partial, *strides, W, splits, *scales, **sizes,
        BLOCK_M=partly.block_m, BLOCK_N=partly.block_n, SPLIT=partly.split,
        num_warps=partly.num_warps, num_stages=partly.num_stages,
    )  # fmt: skip
    _score_keys_merge_kernel[(triton.cdiv(W * G, _MERGE_ROWS), B * Hkv)](
        partial, lse, *ranges, sinks, W, splits, HKV=Hkv, G=G,
        SPLIT=partly.split, BLOCK_M=_MERGE_ROWS, num_warps=_MERGE_WARPS, num_stages=1,
    )  # fmt: skip
    _score_keys_column_kernel[(triton.cdiv(N, column.block_n), B * Hkv)](
        query, key, *ranges, lse, scores, *strides, W, N, *scales, **sizes,
        BLOCK_M=column.block_m, BLOCK_N=column.block_n,
        num_warps=column.num_warps, num_stages=column.num_stages,
    )  # fmt: skip
    return scores


def aot_specs(arch: str, dtype: str, row: _tuning.Row) -> list[Spec]:
    """What a launch from `row` compiles, at the row's head dim and a group of 7."""
    shape: dict[str, Any] = {"HKV": 4, "G": 7}
    types = {
        **dict.fromkeys(("query_ptr", "key_ptr"), f"*{dtype}"),
        **dict.fromkeys(("kv_len_ptr", "kv_start_ptr", "num_queries_ptr"), "*i32"),
        **dict.fromkeys((f"stride_query_{x}" for x in "bhw"), "i32"),
        # A cache of more than 2^31 elements.
        **dict.fromkeys((f"stride_key_{x}" for x in "bhn"), "i64"),
        "W": "i32",
        "scale": "fp32",
    }
    tile = {
        **shape,
        "D": row.head_dim,
        "BLOCK_D": padded(row.head_dim),
        "UNIT": stride_unit(row.head_dim),
        "BLOCK_M": row.block_m,
        "BLOCK_N": row.block_n,
    }
    launch = row.num_warps, row.num_stages
    if row.kernel == "column":
        types |= {"lse_ptr": "*fp32", "scores_ptr": "*fp32", "N": "i32"}
        kernel = _score_keys_column_kernel
        return [
            aot_spec(kernel, types, {**tile, "softcap": None}, *launch),
            aot_spec(kernel, {**types, "softcap": "fp32"}, tile, *launch),
        ]
    split = row.config().split
    partial = types | {"partial_ptr": "*fp32", "num_splits": "i32"}
    merge = {
        **dict.fromkeys(("partial_ptr", "lse_ptr", "sinks_ptr"), "*fp32"),
        **dict.fromkeys(("kv_len_ptr", "kv_start_ptr", "num_queries_ptr"), "*i32"),
        **dict.fromkeys(("W", "num_splits"), "i32"),
    }
    return [
        aot_spec(
            _score_keys_lse_kernel, partial, {**tile, "SPLIT": split, "softcap": None}, *launch
        ),
        aot_spec(
            _score_keys_merge_kernel,
            merge,
            {**shape, "SPLIT": split, "BLOCK_M": _MERGE_ROWS},
            _MERGE_WARPS,
        ),
    ]

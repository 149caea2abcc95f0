"""Triton kernels of sparse_attention: split over the list and the tail, then a merge.

Bytes moved: K + tail rows of K and of V for each KV head, read in place by pointer; what they are
short of is parallelism, so the list is cut into few keys a program. The tail's length is known on
the device only: a fixed number of programs share it, tile by tile in turn, and one that finds
none leaves at once. A merge of its own rather than in the last program to finish: that needs a
counter that outlives the call, which two streams or two graphs could share.
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
# Tail positions that are read in one tile a program; a longer tail takes turns.
_TAIL_AT_ONCE = 512


@triton.jit(
    do_not_specialize=[
        *("T", "K", "list_splits", "tail_splits"),
        *("stride_query_b", "stride_query_h", "stride_query_t"),
        *("stride_indices_b", "stride_indices_h"),
    ],
    do_not_specialize_on_alignment=["indices_ptr", "tail_start_ptr", "kv_len_ptr"],
)
def _sparse_split_kernel(
    query_ptr,  # [B, Hq, T, D]
    key_ptr, value_ptr,  # [B, Hkv, N, D]
    indices_ptr,  # [B, Hkv, K]
    tail_start_ptr, kv_len_ptr,  # [B], [B]
    partial_ptr,  # [B * Hkv, list_splits + tail_splits, T * G, BLOCK_D + PARTIAL_PAD]
    stride_query_b, stride_query_h, stride_query_t,
    stride_key_b, stride_key_h, stride_key_n,
    stride_value_b, stride_value_h, stride_value_n,
    stride_indices_b, stride_indices_h,
    T, K, list_splits, tail_splits,
    scale, softcap,  # from logit_scales
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
    UNIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:  # as in verify_attention
        gdc_launch_dependents()
    s, bh = tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = bh // HKV, bh % HKV
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    t, g = r // G, r % G
    row = (bh * tl.num_programs(1) + s) * (T * G) + r
    # Asked for before the lengths are there: where there is little to read, waits are what counts.
    d = tl.arange(0, BLOCK_D)
    query = load_query(
        query_ptr, b, h * G, t, g, T, stride_query_b, stride_query_h, stride_query_t, d, D
    )  # [BLOCK_M, BLOCK_D]
    tail_start = tl.maximum(tl.load(tail_start_ptr + b), 0)
    kv_len = tl.load(kv_len_ptr + b)
    is_list = s < list_splits
    first = tl.where(is_list, s * SPLIT, tail_start + (s - list_splits) * BLOCK_N)
    last = tl.where(is_list, tl.minimum((s + 1) * SPLIT, K), kv_len)
    step = tl.where(is_list, BLOCK_N, tail_splits * BLOCK_N)

    top = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if first >= last:
        store_partial(partial_ptr, row, t < T, acc, top, total, BLOCK_D)
        return

    position = kv_len - T + t
    key_ptr += b * in_units(stride_key_b, UNIT) + h * in_units(stride_key_h, UNIT)
    value_ptr += b * in_units(stride_value_b, UNIT) + h * in_units(stride_value_h, UNIT)
    stride_key_n = in_units(stride_key_n, UNIT)
    stride_value_n = in_units(stride_value_n, UNIT)
    indices_ptr += b * stride_indices_b + h * stride_indices_h
    for e0 in tl.range(first, last, step):
        e = e0 + tl.arange(0, BLOCK_N)
        # Not `is_list & ...`: of a scalar, Triton 3.9's interpreter makes a mask of integers.
        listed = tl.load(indices_ptr + e, mask=e < tl.where(is_list, last, 0), other=-1)
        n = tl.where(is_list, listed, e)
        valid = (n >= 0) & (n < tl.where(is_list, tail_start, kv_len))
        n = tl.where(valid, n, 0)
        key = tl.load(
            key_ptr + n.to(tl.int64)[None, :] * stride_key_n + d[:, None],
            mask=valid[None, :] & (d < D)[:, None],
            other=0.0,
        )  # [BLOCK_D, BLOCK_N]
        product = dot(query, key, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        # Causal in the tail only: a listed key may stand after a query, where T > tail.
        seen = valid[None, :] & (is_list | (n[None, :] <= position[:, None]))
        x = tl.where(seen, base2_logits(product, scale, softcap), float("-inf"))
        weights, factor, top, total = online_softmax(x, top, total)
        value = tl.load(
            value_ptr + n.to(tl.int64)[:, None] * stride_value_n + d[None, :],
            mask=valid[:, None] & (d < D)[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_D]
        acc = dot(cast(weights, value_ptr.dtype.element_ty), value, acc * factor[:, None])
    store_partial(partial_ptr, row, t < T, acc, top, total, BLOCK_D)


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    tail_start: Tensor,
    kv_len: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Two launches; the arguments are those of the op's schema."""
    B, Hq, T, D = query.shape
    _, Hkv, N, _ = key.shape
    K = indices.shape[2]
    query = query_rows(query)
    grid, merge_grid, partial_size, sizes, options, merge_options = _plan(
        query.device, query.dtype, B, Hq, Hkv, T, D, N, K
    )
    out = out_like(query)
    lse = torch.empty((B, Hq, T), dtype=torch.float32, device=query.device)
    if not lse.numel():
        return out, lse
    partial = lse.new_empty(partial_size)
    scale, softcap = logit_scales(scale, softcap)
    if grid[1]:
        _sparse_split_kernel[grid](
            query, key, value, indices, tail_start, kv_len, partial,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *indices.stride()[:2],
            T, K, *sizes, scale, softcap, **options, UNIT=stride_unit(D, key, value),
        )  # fmt: skip
    merge_kernel[merge_grid](
        partial, None, None, sinks, out, lse, T, None, grid[1], **merge_options
    )
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
    K: int,
) -> tuple[tuple, tuple, int, tuple[int, int], dict[str, Any], dict[str, Any]]:
    """Everything a launch needs that follows from shapes."""
    check_grid("sparse_attention", B, Hkv)
    G, block_d, early = Hq // Hkv, padded(D), launches_early(device)
    kernel = "few rows" if T * G <= 16 else "many rows"
    # The more KV heads there are to fill the GPU with, the longer the splits.
    row = config("sparse_attention", kernel, arch_of(device), precision(dtype), D, B * Hkv)
    list_splits = -(-K // row.split)
    tail_splits = min(-(-N // row.block_n), -(-_TAIL_AT_ONCE // row.split))
    num_splits = list_splits + tail_splits
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
    return grid, (T * G, B * Hkv), size, (list_splits, tail_splits), options, merge_options


def aot_specs(arch: str, dtype: str, row: Row) -> list[Spec]:
    """The plain op, one with softcap, and the merge."""
    half, tile = f"*{dtype}", row.config()
    early = target_launches_early(arch)
    shared = dict(HKV=4, G=7, D=row.head_dim, BLOCK_D=padded(row.head_dim), SPLIT=tile.split)
    shared |= dict(PDL=early)
    sizes = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, UNIT=stride_unit(row.head_dim))
    strides = ["stride_query_b", "stride_query_h", "stride_query_t"]
    strides += [f"stride_{x}_{i}" for x in ("key", "value") for i in "bhn"]
    strides += ["stride_indices_b", "stride_indices_h"]
    numbers = ("T", "K", "list_splits", "tail_splits")
    types = dict.fromkeys(strides, "i32") | dict.fromkeys(numbers, "i32")
    types |= dict(query_ptr=half, key_ptr=half, value_ptr=half, partial_ptr="*fp32", scale="fp32")
    types |= dict.fromkeys(("indices_ptr", "tail_start_ptr", "kv_len_ptr"), "*i32")
    plain = aot_spec(_sparse_split_kernel, types, shared | sizes | dict(softcap=None), *tile[3:])
    types |= dict(softcap="fp32")
    capped = aot_spec(_sparse_split_kernel, types, shared | sizes, *tile[3:])
    types = dict(partial_ptr="*fp32", lse_ptr="*fp32", sinks_ptr="*fp32", out_ptr=half)
    types |= dict(T="i32", num_splits="i32")
    absent = dict(kv_len_ptr=None, kv_start_ptr=None, window=None)
    shared |= dict(BLOCK_S=MERGED_AT_ONCE)
    merge = aot_spec(merge_kernel, types, shared | absent, 4, launch_pdl=early)
    return [plain, capped, merge]

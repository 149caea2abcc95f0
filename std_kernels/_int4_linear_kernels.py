"""Triton kernels of int4_linear: split over K, one read of the weights, float32 partial sums.

Bytes moved: the packed weights and scales once for each tile of rows, and 8 * S bytes a result for
partials that another launch adds. One row takes plain multiply-adds: 128 + q is a float32 whose
mantissa is the nibble where it stands, one LOP3, and what 128 adds is taken off once for 32
weights. More rows take the tensor cores, on weights rounded to bfloat16.

Packed, 16 rows of a group lie together, so that 16 bytes are 4 words of a row. Nibble j of word i
of a row's group is column i + j * group / 8.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from std_kernels._device import INTERPRET, Spec, aot_spec, cast, dot, in_units
from std_kernels._tuning import BF16, Row, arch_of, config

ROWS = 16  # that are packed together
ADDED_AT_ONCE = 256
# Programs that there are to be for each multiprocessor, by kernel: what hides the way to memory.
PROGRAMS = {"one row": 3, "few rows": 2, "many rows": 2}
MOST_SPLITS = 8  # partials of more rows would be as many bytes as the weights
_MERGE = dict(MOST=MOST_SPLITS, BLOCK=ADDED_AT_ONCE)
_INTERPRETED = 4  # multiprocessors, so that small tests have several splits


@triton.jit
def _masked(v, MASK: tl.constexpr, PTX: tl.constexpr):
    """128 + a nibble, which counts 1 at bits 16 to 19 and 1/16 at bits 12 to 15, as float32."""
    if PTX:
        # Left to the compiler, shift and mask change places and become two instructions.
        if MASK == 0xF000:
            v = tl.inline_asm_elementwise(
                "lop3.b32 $0, $1, 0x0000F000, 0x43000000, 0xEA;", "=r,r", [v],
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            v = tl.inline_asm_elementwise(
                "lop3.b32 $0, $1, 0x000F0000, 0x43000000, 0xEA;", "=r,r", [v],
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
    else:
        v = (v & MASK) | 0x43000000
    return v.to(tl.float32, bitcast=True)


@triton.jit
def _nibble(words, J: tl.constexpr, PTX: tl.constexpr):
    """128 + nibble J of each word, or 128 + nibble / 16 where J is 1, 3 or 5: 4 shifts for 8."""
    MASK: tl.constexpr = 0xF000 if J == 1 or J == 3 or J == 5 else 0xF0000
    if J == 0:
        return _masked(words << 16, MASK, PTX)
    elif J <= 2:
        return _masked(words << 8, MASK, PTX)
    elif J <= 4:
        return _masked(words, MASK, PTX)
    elif J <= 6:
        return _masked(words >> 8, MASK, PTX)
    else:
        return _masked(words >> 12, MASK, PTX)


@triton.jit
def _scale_and_zero(pair):
    """The two bfloat16 of a group, scale in the low half, as float32."""
    scale = (pair << 16).to(tl.float32, bitcast=True)
    return scale, (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _at_rows(words_ptr, n, K, GROUP: tl.constexpr):
    """The first word of rows n of a packed weight."""
    start = (n // 16).to(tl.int64) * (K * 2)  # 16 rows of K / 8 words
    return words_ptr + start + (n % 16) * (GROUP // 8)


@triton.jit(do_not_specialize=["stride_scales_g", "N", "K", "R", "per_split"])
def _int4_linear_row_kernel(
    input_ptr,  # [K]
    words_ptr, scales_ptr,  # [N, K / 8] packed, [K / GROUP, N]: pairs
    bias_ptr, out_ptr,  # [N] or None, [S, N]
    stride_scales_g,
    N, K, R, per_split,  # R: 1; groups of a split
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    KG: tl.constexpr = BLOCK_K // GROUP
    KU: tl.constexpr = GROUP // 32  # pieces of 4 words, of which a thread has one
    split = tl.program_id(1)
    N, K, stride_scales_g = in_units(N, 16), in_units(K, 32), in_units(stride_scales_g, 16)
    first = split * per_split
    last = tl.minimum(first + per_split, K // GROUP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = tl.arange(0, KG)
    word = 4 * tl.arange(0, KU)[:, None] + tl.arange(0, 4)[None, :]
    # Of two dimensions, whose order no version of the compiler changes: lanes lie along columns.
    k = tl.arange(0, KG * KU * 4)
    words_at = _at_rows(words_ptr, n, K, GROUP)[:, None]
    words_at += (k // (GROUP // 8) * (2 * GROUP) + k % (GROUP // 8))[None, :]
    scales_at = scales_ptr + n[:, None] + g[None, :] * stride_scales_g
    input_at = input_ptr + g[:, None, None] * GROUP + word[None]
    acc = tl.zeros([BLOCK_N, KG, KU], tl.float32)
    for g0 in tl.range(first, last, KG, num_stages=STAGES):
        live = g0 + g < last
        there = (n < N)[:, None] & live[None, :]
        words = tl.load(
            words_at + g0 * (2 * GROUP),
            mask=(n < N)[:, None] & (g0 + k // (GROUP // 8) < last)[None, :],
            other=0,
        )
        words = tl.reshape(words, [BLOCK_N, KG, KU, 4])
        scale, zero = _scale_and_zero(
            tl.load(scales_at + g0 * stride_scales_g, mask=there, other=0)
        )  # [BLOCK_N, KG]
        zero = tl.fma(scale, tl.full(scale.shape, -8.0, tl.float32), zero)
        products = tl.zeros([BLOCK_N, KG, KU, 4], tl.float32)
        near = tl.zeros([KG, KU, 4], tl.float32)
        far = tl.zeros([KG, KU, 4], tl.float32)  # of nibbles that count 1/16
        for j in tl.static_range(8):
            x = tl.load(
                input_at + g0 * GROUP + j * (GROUP // 8), mask=live[:, None, None], other=0.0
            ).to(tl.float32)  # [KG, KU, 4]
            if j == 1 or j == 3 or j == 5:
                far += x
                x = x * 16.0
            else:
                near += x
            q = _nibble(words, j, PTX)
            products = tl.fma(q, tl.broadcast_to(x[None], q.shape), products)
        offset = tl.fma(near, tl.full(near.shape, 128.0, tl.float32), far * 2048.0)
        total = tl.sum(near + far, 2)[None]
        sums = tl.sum(products, 3) - tl.sum(offset, 2)[None]  # [BLOCK_N, KG, KU]
        acc = tl.fma(
            tl.broadcast_to(zero[:, :, None], acc.shape), tl.broadcast_to(total, acc.shape), acc
        )
        acc = tl.fma(sums, tl.broadcast_to(scale[:, :, None], acc.shape), acc)
    out = tl.sum(tl.sum(acc, 2), 1)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + split * N + n, cast(out, out_ptr.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["stride_scales_g", "N", "K", "R", "per_split"])
def _int4_linear_rows_kernel(
    input_ptr,  # [R, K]
    words_ptr, scales_ptr,  # [N, K / 8] packed, [K / GROUP, N]: pairs
    bias_ptr, out_ptr,  # [N] or None, [S, R, N]
    stride_scales_g,
    N, K, R, per_split,  # groups of a split
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    KG: tl.constexpr = BLOCK_K // GROUP
    WORDS: tl.constexpr = GROUP // 8
    split = tl.program_id(1)
    N, K, stride_scales_g = in_units(N, 16), in_units(K, 32), in_units(stride_scales_g, 16)
    first = split * per_split
    last = tl.minimum(first + per_split, K // GROUP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, KG * WORDS)
    g, word, group = k // WORDS, k % WORDS, tl.arange(0, KG)
    words_at = _at_rows(words_ptr, n, K, GROUP)[:, None]
    words_at += (g * (2 * GROUP) + word)[None, :]
    scales_at = scales_ptr + n[:, None] + group[None, :] * stride_scales_g
    input_at = input_ptr + (g * GROUP + word)[:, None] + m.to(tl.int64)[None, :] * K
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for g0 in tl.range(first, last, KG, num_stages=STAGES):
        live = g0 + g < last
        words = tl.load(
            words_at + g0 * (2 * GROUP),
            mask=(n < N)[:, None] & live[None, :],
            other=0,
        )  # [BLOCK_N, KG * WORDS]
        pair = tl.load(
            scales_at + g0 * stride_scales_g,
            mask=(n < N)[:, None] & (g0 + group < last)[None, :],
            other=0,
        )  # [BLOCK_N, KG]
        pair = tl.broadcast_to(pair[:, :, None], [BLOCK_N, KG, WORDS])
        scale, zero = _scale_and_zero(tl.reshape(pair, [BLOCK_N, KG * WORDS]))
        near = tl.fma(scale, tl.full(scale.shape, -136.0, tl.float32), zero)
        far = tl.fma(scale, tl.full(scale.shape, -2056.0, tl.float32), zero)
        for j in tl.static_range(8):
            x = tl.load(
                input_at + g0 * GROUP + j * WORDS,
                mask=live[:, None] & (m < R)[None, :],
                other=0.0,
            )  # [KG * WORDS, BLOCK_M]
            q = _nibble(words, j, PTX)
            if j == 1 or j == 3 or j == 5:
                weight = tl.fma(q, scale * 16.0, far)
            else:
                weight = tl.fma(q, scale, near)
            acc = dot(cast(weight, tl.bfloat16), x, acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = (split * R + m).to(tl.int64)[None, :] * N + n[:, None]
    keep = (m < R)[None, :] & (n < N)[:, None]
    tl.store(out_ptr + at, cast(acc, out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["N", "size", "S"])
def _int4_linear_merge_kernel(
    partial_ptr, bias_ptr, out_ptr,  # [S, size], [N] or None, [size]
    N, size, S,  # size: R * N
    MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Unrolled, so that all parts are asked for before the first is added.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    out = tl.load(partial_ptr + at, mask=inside, other=0.0)
    for split in tl.static_range(1, MOST):
        partial_ptr += size
        # Not `inside & ...`: of a scalar, Triton 3.9's interpreter makes a mask of integers.
        out += tl.load(partial_ptr + at, mask=at < tl.where(split < S, size, 0), other=0.0)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, cast(out, out_ptr.dtype.element_ty), mask=inside)


def pack_int4(values: Tensor, group: int) -> Tensor:
    """Columns to nibbles of int32 words, 16 rows together; the arguments are the op's."""
    N, half = values.shape
    q = torch.stack((values >> 4, values & 15), dim=-1).view(N // ROWS, ROWS, -1, 8, group // 8)
    # A byte has two nibbles of a word, the lower one in its low half.
    bytes_ = q[..., 0::2, :] | q[..., 1::2, :] << 4
    return bytes_.permute(0, 2, 1, 4, 3).reshape(N, half)


def int4_linear(input: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """A launch, and another that adds where K is split; the arguments are those of the schema."""
    N = len(packed)
    out = input.new_empty((*input.shape[:-1], N))
    rows = input.reshape(-1, input.shape[-1])
    plan = _plan_of(rows, packed, scales)
    if not out.numel():
        return out
    if plan.splits == 1:
        _launch(plan, rows, packed, scales, bias, out)
        return out
    partial = _launch(plan, rows, packed, scales, None, None)
    size = out.numel()
    _int4_linear_merge_kernel[(-(-size // ADDED_AT_ONCE),)](
        partial, bias, out, N, size, plan.splits, **_MERGE, num_warps=2, num_stages=1
    )
    return out


def int4_linear_partials(input: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """One launch; the arguments are those of the schema."""
    rows = input.reshape(-1, input.shape[-1])
    return _launch(_plan_of(rows, packed, scales), rows, packed, scales, None, None)


def splits(device: torch.device, R: int, N: int, K: int, group: int) -> int:
    """Into how many parts K is cut, by the device, the weight and which kernel R rows take."""
    return _plan(device, _kernel_of(R), N, K, group).splits


class _Plan(NamedTuple):
    """Everything a launch needs that follows from shapes.

    Attributes:
        blocks, splits, block_m: the grid is ``(blocks, splits, R / block_m)``.
        groups: of a split.
    """

    kernel: Any
    blocks: int
    splits: int
    block_m: int
    groups: int
    options: dict[str, Any]


def _kernel_of(R: int) -> str:
    return "one row" if R == 1 else "few rows" if R <= 16 else "many rows"


def _plan_of(rows: Tensor, packed: Tensor, scales: Tensor) -> _Plan:
    N, K = len(packed), rows.shape[1]
    return _plan(rows.device, _kernel_of(len(rows)), N, K, K // len(scales))


@lru_cache(maxsize=1024)
def _plan(device: torch.device, kernel: str, N: int, K: int, group: int) -> _Plan:
    row = config("int4_linear", kernel, arch_of(device), BF16, 0, N)
    tiles, blocks = -(-K // row.split), -(-N // row.block_n)
    wanted = PROGRAMS[kernel] * _multiprocessors(device)
    each = min(tiles, max(1, tiles * blocks // wanted, -(-tiles // MOST_SPLITS)))
    options = _options(row.block_m, row.block_n, row.split, row.num_stages, group)
    # The stages of its loop are the row's; there is no other.
    options |= dict(PTX=_is_nvidia(device), num_warps=row.num_warps, num_stages=1)
    return _Plan(
        _kernel(kernel),
        blocks,
        -(-tiles // each),
        row.block_m,
        each * (row.split // group),
        options,
    )


def _kernel(name: str) -> Any:
    return _int4_linear_row_kernel if name == "one row" else _int4_linear_rows_kernel


def _options(
    block_m: int, block_n: int, block_k: int, stages: int, group: int
) -> dict[str, Any]:  # fmt: skip
    sizes = dict(BLOCK_N=block_n, BLOCK_K=block_k, STAGES=stages, GROUP=group)
    return sizes if block_m == 1 else sizes | dict(BLOCK_M=block_m)


def _is_nvidia(device: torch.device) -> bool:
    return not INTERPRET.value and torch.version.hip is None


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return _INTERPRETED
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(
    plan: _Plan,
    rows: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """Into `out`, or partials ``[S, R, N]``."""
    R, K = rows.shape
    N = len(packed)
    if out is None:
        out = rows.new_empty((plan.splits, R, N), dtype=torch.float32)
    if out.numel():
        plan.kernel[(plan.blocks, plan.splits, -(-R // plan.block_m))](
            rows.to(torch.bfloat16).contiguous(), packed.view(torch.int32),
            scales.view(torch.int32), bias, out, scales.stride(0) // 2,
            N, K, R, plan.groups, **plan.options,
        )  # fmt: skip
    return out


def aot_specs(arch: str, dtype: str, row: Row) -> list[Spec]:
    """Partials of groups of 128, the whole of groups of 32 with a bias, and the merge."""
    tile = row.config()
    types = dict(input_ptr="*bf16", words_ptr="*i32", scales_ptr="*i32", out_ptr="*fp32")
    types |= dict.fromkeys(("stride_scales_g", "N", "K", "R", "per_split"), "i32")
    found = []
    for group in (128, 32):
        sizes = _options(tile.block_m, tile.block_n, tile.split, tile.num_stages, group)
        sizes |= dict(PTX=arch.startswith("sm_"))
        bias = dict(bias_ptr=None)
        if group == 32:
            types, bias = types | dict(bias_ptr="*bf16", out_ptr="*bf16"), {}
        found.append(aot_spec(_kernel(row.kernel), types, sizes | bias, tile.num_warps))
    types = dict(partial_ptr="*fp32", bias_ptr="*bf16", out_ptr="*bf16")
    types |= dict.fromkeys(("N", "size", "S"), "i32")
    merge = aot_spec(_int4_linear_merge_kernel, types, _MERGE, 2)
    return [*found, merge]

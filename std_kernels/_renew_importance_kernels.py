"""Triton kernels of renew_importance: sums of chunks of the scores, then the new importance.

Two launches for all layers, as a chunk's shares need the sum of its whole row. The sums could be
had without a pass over the scores, from verify_attention's kernel, which has these in registers;
but it has 235 of 255 in use (sm_90, D = 128), and the pass is predicted to take 14 us of a
verification of 7 ms (7B, 1 x 128k, H200).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from std_kernels._device import Spec, aot_spec, check_grid
from std_kernels._tuning import arch_of

CHUNK, _WARPS = 8192, 8
_INTERPRETED = 32  # small, so that small tests have many chunks


@triton.jit(do_not_specialize_on_alignment=["stop_ptr", "sums_ptr"])
def _sum_kernel(
    scores_ptr, stop_ptr, sums_ptr,  # [L, B, Hkv, N], [B], [L * B * Hkv, chunks]
    B, HKV, S, N,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, L * B * Hkv): what the chunk's keys below `stop` got."""
    row = tl.program_id(1).to(tl.int64)
    stop = tl.minimum(tl.load(stop_ptr + row // HKV % B), S)
    n = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    # S is a multiple of 16, mostly, so that these loads are wide; `stop` is any number.
    scores = tl.load(scores_ptr + row * N + n, mask=n < S, other=0.0)
    scores = tl.where(n < stop, scores, 0.0)
    tl.store(sums_ptr + row * tl.num_programs(0) + tl.program_id(0), tl.sum(scores, 0))


@triton.jit(do_not_specialize_on_alignment=["stop_ptr", "sums_ptr"])
def _renew_kernel(
    importance_ptr, scores_ptr,  # [L, B, Hkv, S], [L, B, Hkv, N]
    stop_ptr, sums_ptr,  # [B], [L * B * Hkv, chunks]
    B, HKV, S, N,
    fade,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, L * B * Hkv); CHUNKS is a power of two from the number of chunks on."""
    row, chunks = tl.program_id(1).to(tl.int64), tl.num_programs(0)
    stop = tl.minimum(tl.load(stop_ptr + row // HKV % B), S)
    n = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    c = tl.arange(0, CHUNKS)
    total = tl.sum(tl.load(sums_ptr + row * chunks + c, mask=c < chunks, other=0.0), 0)
    total = tl.where(total < 1e-30, 1e-30, total)  # NaN stays NaN
    scores = tl.load(scores_ptr + row * N + n, mask=n < S, other=0.0)
    at = importance_ptr + row * S + n
    before = tl.load(at, mask=n < S, other=0.0)
    faded = before * fade
    share = scores / total
    # A comparison with NaN is false: of two numbers the larger, else the one that is one.
    newest = (share > faded) | (faded != faded)
    renewed = tl.where(newest, share, faded)
    tl.store(at, tl.where(n < stop, renewed, before), mask=n < S)


def renew_importance(importance: Tensor, scores: Tensor, stop: Tensor, fade: float) -> None:
    """Launches the kernels; arguments as the op's, checked by its public function."""
    L, B, Hkv, S = importance.shape
    if importance.numel() == 0:
        return
    check_grid("renew_importance", L * B, Hkv, "importance")
    chunk = _INTERPRETED if arch_of(importance.device) == "interpreter" else CHUNK
    chunks = triton.cdiv(S, chunk)
    sums = importance.new_empty((L * B * Hkv, chunks), dtype=torch.float32)
    grid, sizes = (chunks, L * B * Hkv), (B, Hkv, S, scores.shape[3])
    _sum_kernel[grid](scores, stop, sums, *sizes, CHUNK=chunk, num_warps=_WARPS)
    _renew_kernel[grid](
        importance, scores, stop, sums, *sizes, fade,
        CHUNK=chunk, CHUNKS=triton.next_power_of_2(chunks), num_warps=_WARPS,
    )  # fmt: skip


def aot_specs() -> list[Spec]:
    """Both kernels, for rows of 17 chunks whose length is a multiple of 16."""
    types: dict[str, str] = dict.fromkeys(("B", "HKV", "S", "N"), "i32")
    types |= dict(scores_ptr="*fp32", stop_ptr="*i32", sums_ptr="*fp32")
    tile: dict[str, Any] = dict(CHUNK=CHUNK)
    specs = [aot_spec(_sum_kernel, types, tile, _WARPS)]
    types |= dict(importance_ptr="*fp32", fade="fp32")
    specs.append(aot_spec(_renew_kernel, types, tile | dict(CHUNKS=32), _WARPS))
    for spec in specs:
        for name in ("S", "N"):
            spec.attrs[(list(spec.signature).index(name),)] = [["tt.divisibility", 16]]
    return specs

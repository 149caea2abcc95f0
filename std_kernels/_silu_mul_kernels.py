"""The Triton kernel of silu_mul: a piece of a row in each program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from std_kernels._device import (
    ROW_UNIT,
    Spec,
    aot_spec,
    cast,
    exp,
    in_units,
    partials,
    product_of,
    row_unit,
)
from std_kernels._tuning import Row, arch_of, config, precision


@triton.jit(do_not_specialize=["stride_gate_up_r", "stride_gate_up_s"])
def _silu_mul_kernel(
    gate_up_ptr,  # [R, 2 I] or [S, R, 2 I]
    bias_ptr,  # [2 I] or None
    out_ptr,  # [R, I], contiguous
    stride_gate_up_r, stride_gate_up_s,
    N,  # I
    S: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = n < N
    dtype = out_ptr.dtype.element_ty
    at, stride_s = r * in_units(stride_gate_up_r, UNIT), in_units(stride_gate_up_s, UNIT)
    gate = product_of(gate_up_ptr, at, keep, stride_s, bias_ptr, n, S)
    up = product_of(gate_up_ptr, at, keep, stride_s, bias_ptr, N + n, S)
    gate, up = cast(gate, dtype).to(tl.float32), cast(up, dtype).to(tl.float32)
    gate = cast(tl.div_rn(gate, 1.0 + exp(-gate)), dtype).to(tl.float32)
    tl.store(out_ptr + r * N + n, cast(gate * up, dtype), mask=keep)


def silu_mul(gate_up: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One launch; the arguments are those of the op's schema."""
    R, N = gate_up.shape[-2], gate_up.shape[-1] // 2
    out = gate_up.new_empty((R, N), dtype=dtype)
    if not out.numel():
        return out
    tile = config("silu_mul", "piece", arch_of(gate_up.device), precision(dtype), 0, N)
    S, stride_r, stride_s = partials(gate_up)
    _silu_mul_kernel[(R, -(-N // tile.split))](
        gate_up, bias, out, stride_r, stride_s, N,
        S=S, BLOCK_N=tile.split, UNIT=row_unit(stride_r, stride_s),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def aot_specs(arch: str, dtype: str, row: Row) -> list[Spec]:
    """Of a product, and of one of 7 partials with a bias."""
    half = f"*{dtype}"
    types = dict.fromkeys(("stride_gate_up_r", "stride_gate_up_s", "N"), "i32")
    types |= dict(gate_up_ptr=half, out_ptr=half)
    fixed: dict = dict(BLOCK_N=row.splits[0][1], UNIT=ROW_UNIT)
    split = types | dict(gate_up_ptr="*fp32", bias_ptr=half)
    specs = [
        aot_spec(_silu_mul_kernel, types, fixed | dict(bias_ptr=None, S=0), *row[7:9]),
        aot_spec(_silu_mul_kernel, split, fixed | dict(S=7), *row[7:9]),
    ]
    for spec in specs:
        spec.attrs[(list(spec.signature).index("N"),)] = [["tt.divisibility", 16]]
    return specs

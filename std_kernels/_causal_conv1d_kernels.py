"""The Triton kernel of causal_conv1d and its launcher."""

import triton
import triton.language as tl
from torch import Tensor

from std_kernels import _tuning
from std_kernels._device import Spec, aot_spec, cast


@triton.jit(
    do_not_specialize=["T", "P", "stride_inputs_b", "stride_inputs_p", "stride_weight_c"],
    do_not_specialize_on_alignment=["kv_len_ptr"],
)
def _causal_conv1d_kernel(
    inputs_ptr, weight_ptr, bias_ptr,  # [B, P, C], [C, W], [C] or None
    kv_len_ptr, out_ptr,  # [B], [B, T, C]
    stride_inputs_b, stride_inputs_p, stride_weight_c,
    T, P, C,
    W: tl.constexpr, SILU: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (pieces of C, T, B): one token's sum, from its oldest input to itself."""
    t = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.load(kv_len_ptr + b) - T + t
    total = tl.zeros([BLOCK_C], tl.float32)
    for w in tl.static_range(W):
        at = n - (W - 1 - w)
        # Not `(c < C) & ...`: of a scalar, Triton 3.9's interpreter makes a mask of integers.
        here = c < tl.where(at >= 0, C, 0)
        slot = tl.maximum(at, 0) % P
        inputs = inputs_ptr + b * stride_inputs_b + slot.to(tl.int64) * stride_inputs_p + c
        x = tl.load(inputs, mask=here, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + c.to(tl.int64) * stride_weight_c + w, mask=c < C, other=0.0)
        total = tl.fma(x, weight.to(tl.float32), total)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    out = cast(total, out_ptr.dtype.element_ty)
    if SILU:
        x = out.to(tl.float32)
        out = cast(x / (1.0 + tl.exp(-x)), out_ptr.dtype.element_ty)
    tl.store(out_ptr + (b * T + t) * C + c, out, mask=c < C)


def causal_conv1d(
    inputs: Tensor, weight: Tensor, kv_len: Tensor, tokens: int, bias: Tensor | None, silu: bool
) -> Tensor:
    """One launch; the arguments are those of the op's schema."""
    B, P, C = inputs.shape
    out = inputs.new_empty((B, tokens, C))
    if not out.numel():
        return out
    arch, precision = _tuning.arch_of(inputs.device), _tuning.precision(inputs.dtype)
    row = _tuning.config("causal_conv1d", "token", arch, precision, 0, C)
    _causal_conv1d_kernel[(triton.cdiv(C, row.block_n), tokens, B)](
        inputs, weight, bias, kv_len, out, *inputs.stride()[:2], weight.stride(0), tokens, P, C,
        W=weight.shape[1], SILU=silu, BLOCK_C=row.block_n,
        num_warps=row.num_warps, num_stages=row.num_stages,
    )  # fmt: skip
    return out


def aot_specs(arch: str, dtype: str, row: _tuning.Row) -> list[Spec]:
    """That of Qwen3.5, which has no bias, and one with it."""
    tile = row.config()
    types = dict.fromkeys(("inputs_ptr", "weight_ptr", "out_ptr"), f"*{dtype}")
    strides = ("stride_inputs_b", "stride_inputs_p", "stride_weight_c")
    types |= dict.fromkeys((*strides, "T", "P", "C"), "i32") | dict(kv_len_ptr="*i32")
    sizes = dict(W=4, SILU=True, BLOCK_C=tile.block_n)
    launch = tile.num_warps, tile.num_stages
    kernel = _causal_conv1d_kernel
    return [
        aot_spec(kernel, types, sizes | dict(bias_ptr=None), *launch),
        aot_spec(kernel, {**types, "bias_ptr": f"*{dtype}"}, sizes, *launch),
    ]

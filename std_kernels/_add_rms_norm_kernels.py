"""The Triton kernel of add_rms_norm: a row in one program, read once."""

import triton
import triton.language as tl
from torch import Tensor

from std_kernels._device import (
    ROW_UNIT,
    Spec,
    aot_spec,
    cast,
    in_units,
    partials,
    product_of,
    rms_scale,
    row_unit,
)
from std_kernels._tuning import Row, arch_of, config, precision


@triton.jit(
    do_not_specialize=["stride_residual_r", "stride_delta_r", "stride_delta_s", "eps", "inverse"],
)
def _add_rms_norm_kernel(
    residual_ptr,  # [R, H]
    delta_ptr,  # [R, H] or [S, R, H] or None
    bias_ptr, weight_ptr,  # [H] or None, [H]
    sum_ptr, normed_ptr,  # [R, H], both contiguous
    stride_residual_r, stride_delta_r, stride_delta_s,
    H, eps, inverse,  # inverse: 1 / H
    S: tl.constexpr, BLOCK_H: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    keep = h < H
    dtype = sum_ptr.dtype.element_ty
    # Asked for first: the weight waits for nothing that is computed here.
    weight = tl.load(weight_ptr + h, mask=keep, other=0.0).to(tl.float32)
    at = r * in_units(stride_residual_r, UNIT)
    x = tl.load(residual_ptr + at + h, mask=keep, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        at = r * in_units(stride_delta_r, UNIT)
        stride_s = in_units(stride_delta_s, UNIT)
        delta = product_of(delta_ptr, at, keep, stride_s, bias_ptr, h, S)
        x = cast(x + cast(delta, dtype).to(tl.float32), dtype).to(tl.float32)
    tl.store(sum_ptr + r * H + h, cast(x, dtype), mask=keep)
    normed = cast(x * rms_scale(x, inverse, eps), dtype).to(tl.float32)
    tl.store(normed_ptr + r * H + h, cast(normed * weight, dtype), mask=keep)


def add_rms_norm(
    residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One launch; the arguments are those of the op's schema."""
    R, H = residual.shape
    total, normed = residual.new_empty((R, H)), residual.new_empty((R, H))
    if not R:
        return total, normed
    dtype = precision(residual.dtype)
    tile = config("add_rms_norm", "row", arch_of(residual.device), dtype, 0, H)
    S, stride_r, stride_s = partials(delta)
    unit = row_unit(residual.stride(0), stride_r, stride_s)
    _add_rms_norm_kernel[(R,)](
        residual, delta, bias, weight, total, normed,
        residual.stride(0), stride_r, stride_s, H, eps, 1 / H,
        S=S, BLOCK_H=tile.split, UNIT=unit,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return total, normed


def aot_specs(arch: str, dtype: str, row: Row) -> list[Spec]:
    """A norm alone, after a product, and after one of 7 partials with a bias."""
    names = ("residual", "weight", "sum", "normed")
    types = {f"{name}_ptr": f"*{dtype}" for name in names}
    types |= dict.fromkeys(("stride_residual_r", "stride_delta_r", "stride_delta_s", "H"), "i32")
    types |= dict.fromkeys(("eps", "inverse"), "fp32")
    specs = []
    for size in (row.splits[0][1], row.splits[2][1]):
        fixed: dict = dict(BLOCK_H=size, UNIT=ROW_UNIT)
        for S, given in ((0, {}), (0, dict(delta_ptr=f"*{dtype}")),
                         (7, dict(delta_ptr="*fp32", bias_ptr=f"*{dtype}"))):  # fmt: skip
            absent = dict.fromkeys({"delta_ptr", "bias_ptr"} - set(given))
            spec = aot_spec(
                _add_rms_norm_kernel, types | given, fixed | absent | dict(S=S), *row[7:9]
            )
            spec.attrs[(list(spec.signature).index("H"),)] = [["tt.divisibility", 16]]
            specs.append(spec)
    return specs

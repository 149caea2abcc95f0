"""The residual addition of a decoder layer and the RMS norm behind it.

    sum = residual + delta,  normed = sum / sqrt(mean(sum^2) + eps) * weight

Rounded where transformers' eager layer rounds: the sum; the quotient, from float32; the product
with the weight. RMSNorm: Zhang and Sennrich, NeurIPS 2019, arXiv 1910.07467. Bytes moved: four
rows of H, where eager moves fourteen in seven launches.
"""

from torch import Tensor

from std_kernels import cpu_layer
from std_kernels._checks import (
    check_bias,
    check_eps,
    check_no_grad,
    check_product,
    check_rows,
    check_tensor,
)
from std_kernels._errors import bad_shape
from std_kernels._library import register

MAX_H = 16384


def _fake(residual, delta, weight, eps, bias):
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


_OP = register(
    "add_rms_norm(Tensor residual, Tensor? delta, Tensor weight, float eps, Tensor? bias) "
    "-> (Tensor, Tensor)",
    cpu_layer.add_rms_norm,
    _fake,
    "std_kernels._add_rms_norm_kernels",
)


def add_rms_norm(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds to the residual stream what a block computed, and normalises it for the next block.

    Args:
        residual: [R, H] float16, bfloat16 or float32, inner stride 1; H at most 16384.
        delta: [R, H] in residual's dtype; or float32 [S, R, H], partials of a product split S ways
            (at most 64), which are added in ascending order; inner stride 1. None at a model's
            first layer, where there is nothing to add.
        weight: [H], residual's dtype.
        eps: added to the mean of squares, at least 0.
        bias: [H], residual's dtype, added to delta before delta is rounded; None for none.

    Returns:
        The new residual stream, and the same normalised: both [R, H] in residual's dtype.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device, stride or range.
        RuntimeError: an input requires grad while gradients are enabled; there is no backward.

    Note:
        One launch, one program a row: a row's bits do not depend on R. The sum's bits are eager's.
        Those of the normalised row are where the mean of squares is, which float32 adds up in
        another order.
    """
    op = "add_rms_norm"
    R, H = check_rows(op, "residual", residual)
    if not 1 <= H <= MAX_H:
        remedy = "use the model's own norm"
        raise bad_shape(op, "residual", residual, f"1 <= H <= {MAX_H}", remedy)
    if delta is not None:
        check_product(op, "delta", delta, residual, residual.dtype, R, H, "H")
    check_tensor(op, "weight", weight, residual, residual.dtype, (H,), "[H]")
    check_eps(op, eps)
    check_bias(op, bias, residual, residual.dtype, H, "[H]")
    if bias is not None and delta is None:
        remedy = "pass the delta that it belongs to"
        raise bad_shape(op, "bias", bias, "None where delta is None", remedy)
    check_no_grad(op, residual, delta, weight, bias)
    return _OP(residual, delta, weight, float(eps), bias)

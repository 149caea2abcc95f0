"""The gated activation between the products of a SwiGLU MLP.

    out = silu(gate) * up,  silu(x) = x / (1 + exp(-x))

Rounded where transformers' eager MLP rounds: the activation, from float32, and the product.
Shazeer 2020, arXiv 2002.05202. Bytes moved: three rows of I, where eager moves five in two
launches.
"""

import torch
from torch import Tensor

from std_kernels import cpu_layer
from std_kernels._checks import FLOATS, check_bias, check_no_grad, check_product
from std_kernels._errors import bad_shape, bad_type, not_a_tensor
from std_kernels._library import register


def _fake(gate_up, bias, dtype):
    return gate_up.new_empty((gate_up.shape[-2], gate_up.shape[-1] // 2), dtype=dtype)


_OP = register(
    "silu_mul(Tensor gate_up, Tensor? bias, ScalarType dtype) -> Tensor",
    cpu_layer.silu_mul,
    _fake,
    "std_kernels._silu_mul_kernels",
)


def silu_mul(
    gate_up: Tensor, *, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Computes silu(gate) * up of a product that holds both side by side.

    Args:
        gate_up: [R, 2 I] float16, bfloat16 or float32, the gate's features first; or float32
            [S, R, 2 I], partials of a product split S ways (at most 64), which are added in
            ascending order. Inner stride 1.
        bias: [2 I] in the result's dtype, added before gate and up are rounded; None for none.
        dtype: of the result; needed where gate_up is partials, else gate_up's.

    Returns:
        [R, I].

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device or stride.
        RuntimeError: an input requires grad while gradients are enabled; there is no backward.

    Note:
        One launch; a row's bits do not depend on R. On a GPU by the exponential and the division
        that PyTorch's own kernel has, so with its bits; the CPU path is PyTorch's own, row by row.
    """
    op = "silu_mul"
    if not isinstance(gate_up, Tensor):
        raise not_a_tensor(op, "gate_up", gate_up, "a tensor [R, 2 I]")
    if dtype is None and gate_up.dim() == 2:
        dtype = gate_up.dtype
    if dtype not in FLOATS:
        found = "is missing" if dtype is None else f"is {dtype}"
        expected = "torch.float16, bfloat16 or float32"
        raise bad_type(op, "dtype", found, expected, "pass the dtype that the result is to have")
    if gate_up.dim() not in (2, 3) or gate_up.shape[-1] % 2:
        remedy = "pass the products with gate_proj and up_proj side by side"
        raise bad_shape(op, "gate_up", gate_up, "[R, 2 I] or partials [S, R, 2 I]", remedy)
    R, N = gate_up.shape[-2:]
    check_product(op, "gate_up", gate_up, gate_up, dtype, R, N, "2 I")
    check_bias(op, bias, gate_up, dtype, N, "[2 I]")
    check_no_grad(op, gate_up, bias)
    return _OP(gate_up, bias, dtype)

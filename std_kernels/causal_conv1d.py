"""The short causal convolution before linear attention, over a ring of its inputs.

    out_n[c] = act(bias[c] + sum over w of weight[c, w] * x_(n - W + 1 + w)[c])

Mixes a token with the W - 1 before it, channel by channel (Gated DeltaNet, arXiv 2412.06464). No
window is kept or rolled back: the inputs lie in a ring, as those of `gated_delta_rule` do.
Bytes moved: W inputs and one result for each token and channel.
"""

import torch
from torch import Tensor

from std_kernels import cpu_recurrent
from std_kernels._checks import MAX_TOKENS, check_no_grad, check_tensor
from std_kernels._errors import bad_dtype, bad_shape, bad_type, bad_value, not_a_tensor
from std_kernels._library import register

MAX_WIDTH = 8
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _fake(inputs, weight, kv_len, tokens, bias, silu):
    return inputs.new_empty((inputs.shape[0], tokens, inputs.shape[2]))


_OP = register(
    "causal_conv1d(Tensor inputs, Tensor weight, Tensor kv_len, SymInt tokens, Tensor? bias, "
    "bool silu) -> Tensor",
    cpu_recurrent.causal_conv1d,
    _fake,
    "std_kernels._causal_conv1d_kernels",
)


def causal_conv1d(
    inputs: Tensor,
    weight: Tensor,
    kv_len: Tensor,
    tokens: int,
    *,
    bias: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """Computes the causal convolution of a row's last T tokens.

    Args:
        inputs: [B, P, C] float16, bfloat16 or float32, inner stride 1: token n of a row is in slot
            n mod P. P is at least tokens + W - 1. What comes before token 0 counts as zero.
        weight: [C, W] in inputs' dtype, inner stride 1, the newest token's last. W from 1 to 8.
        kv_len: [B] int32, tokens of the row, the new ones included; at least T.
        tokens: T, how many of the row's last tokens are asked for, 1 to 64.
        bias: [C] in inputs' dtype; None for none.
        silu: whether the result goes through x * sigmoid(x).

    Returns:
        out [B, T, C] in inputs' dtype, contiguous.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device, stride or range. Values inside tensors are not checked.
        RuntimeError: an input requires grad while gradients are enabled; there is no backward.

    Note:
        A token's bits do not depend on T. As in a model, the sum is rounded to inputs' dtype
        before the activation. One launch, which a CUDA graph can hold: nothing is read back.
    """
    op = "causal_conv1d"
    if not isinstance(inputs, Tensor):
        raise not_a_tensor(op, "inputs", inputs, "a tensor [B, P, C]")
    if inputs.dim() != 3:
        raise bad_shape(op, "inputs", inputs, "3 dimensions [B, P, C]", "pass channels last")
    if inputs.dtype not in _FLOATS:
        raise bad_dtype(op, "inputs", inputs, "float16, bfloat16 or float32")
    B, P, C = inputs.shape
    if not isinstance(weight, Tensor):
        raise not_a_tensor(op, "weight", weight, "a tensor [C, W]")
    if weight.dim() != 2 or not 1 <= weight.shape[1] <= MAX_WIDTH:
        expected = f"2 dimensions [C, W] with 1 <= W <= {MAX_WIDTH}"
        raise bad_shape(op, "weight", weight, expected, "pass conv.weight[:, 0]")
    W = weight.shape[1]
    check_tensor(op, "weight", weight, inputs, inputs.dtype, (C, W), "[C, W]")
    check_tensor(op, "inputs", inputs, inputs, inputs.dtype, (B, P, C), "[B, P, C]")
    check_tensor(op, "kv_len", kv_len, inputs, torch.int32, (B,), "[B]")
    if isinstance(tokens, bool) or not isinstance(tokens, (int, torch.SymInt)):
        found = f"is of type {type(tokens).__name__}"
        raise bad_type(op, "tokens", found, "an int", "pass how many tokens are new")
    if not 1 <= tokens <= min(MAX_TOKENS, P - W + 1):
        expected = f"1 <= tokens <= {MAX_TOKENS} and at most P - W + 1 = {P - W + 1}"
        raise bad_value(op, "tokens", f"is {tokens}", expected, "pass inputs with more slots")
    if bias is not None:
        check_tensor(op, "bias", bias, inputs, inputs.dtype, (C,), "[C]")
    if not isinstance(silu, bool):
        found = f"is of type {type(silu).__name__}"
        raise bad_type(op, "silu", found, "a bool", "pass False for no activation")
    check_no_grad(op, inputs, weight, bias)
    return _OP(inputs, weight, kv_len, tokens, bias, silu)

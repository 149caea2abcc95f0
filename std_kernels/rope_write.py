"""From a layer's query, key and value product to rotated queries and keys and values in the cache.

    y = rotate(norm(x)),  rotate(x) = x * cos + rotate_half(x) * sin,
    rotate_half(x) = (-x2, x1) of x = (x1, x2)

Rounded where transformers' eager attention rounds: the head norm, each of the two products, and
their sum. RoPE: Su et al. 2021, arXiv 2104.09864, in the layout of GPT-NeoX. Bytes moved: the
product once in and once out, where eager moves it some five times in twelve launches or more.
"""

import torch
from torch import Tensor

from std_kernels import cpu_layer
from std_kernels._checks import (
    FLOATS,
    check_bias,
    check_eps,
    check_no_grad,
    check_product,
    check_tensor,
)
from std_kernels._errors import bad_dtype, bad_shape, bad_stride, bad_value, not_a_tensor
from std_kernels._library import register


def _fake(qkv, cos, sin, slots, keys, values, bias, q_norm, k_norm, eps):
    B, Hkv, _, D = keys.shape
    return keys.new_empty((B, qkv.shape[-1] // D - 2 * Hkv, slots.shape[1], D))


_OP = register(
    "rope_write(Tensor qkv, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) keys, "
    "Tensor(b!) values, Tensor? bias, Tensor? q_norm, Tensor? k_norm, float eps) -> Tensor",
    cpu_layer.rope_write,
    _fake,
    "std_kernels._rope_write_kernels",
)


def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    bias: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Rotates queries and keys, and writes keys and values to their slots of the KV cache.

    Args:
        qkv: [B * T, (Hq + 2 Hkv) * D] in keys' dtype, query heads first, then key heads, then
            value heads; or float32 [S, B * T, (Hq + 2 Hkv) * D], partials of a product split S
            ways (at most 64), which are added in ascending order. Inner stride 1.
        cos, sin: [B, T, Dr] or [1, T, Dr] in keys' dtype, inner stride 1, as a model's rotary
            embedding gives them (for positions on several axes, put together already). Dr is even
            and at most D; features from Dr on are not rotated.
        slots: [B, T] int64, where each token's key and value go, 0 to N - 1, none twice in a row.
        keys, values: [B, Hkv, N, D] float16, bfloat16 or float32, inner stride 1, D a multiple of
            8 from 16 to 512. Written to at `slots`.
        bias: [(Hq + 2 Hkv) * D] in keys' dtype, added before the product is rounded.
        q_norm, k_norm: [D] in keys' dtype, weights of an RMS norm of each query and key head,
            before the rotation; both or neither.
        eps: of these norms, at least 0.

    Returns:
        The rotated queries, [B, Hq, T, D] in keys' dtype.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device, stride or range. Values inside tensors are not checked:
            a slot beyond N writes outside of the cache.
        RuntimeError: an input requires grad while gradients are enabled; there is no backward.

    Note:
        One launch, one program for each token and head, whose bits depend on no other. Without
        head norms they are eager's; with them where their means of squares are.
    """
    op = "rope_write"
    B, Hkv, _, D = _check_cache(op, keys, values)
    if not isinstance(slots, Tensor):
        raise not_a_tensor(op, "slots", slots, "an int64 tensor [B, T]")
    if slots.dim() != 2:
        raise bad_shape(op, "slots", slots, "2 dimensions [B, T]", "give each row its T slots")
    T = slots.shape[1]
    check_tensor(op, "slots", slots, keys, torch.int64, (B, T), "[B, T]", inner_dense=False)
    if not isinstance(qkv, Tensor):
        raise not_a_tensor(op, "qkv", qkv, "a tensor [B * T, (Hq + 2 Hkv) * D]")
    if qkv.dim() not in (2, 3) or qkv.shape[-1] % D or qkv.shape[-1] // D <= 2 * Hkv:
        expected = f"(Hq + 2 Hkv) * D features with D = {D}, Hkv = {Hkv} and Hq >= 1"
        remedy = "pass the products with q_proj, k_proj and v_proj side by side"
        raise bad_shape(op, "qkv", qkv, expected, remedy)
    N = qkv.shape[-1]
    check_product(op, "qkv", qkv, keys, keys.dtype, B * T, N, "(Hq + 2 Hkv) * D")
    _check_rotation(op, cos, sin, keys, T)
    check_bias(op, bias, keys, keys.dtype, N, "[(Hq + 2 Hkv) * D]")
    if (q_norm is None) != (k_norm is None):
        missing = "q_norm" if q_norm is None else "k_norm"
        raise bad_value(op, missing, "is None", "both norms or neither", "pass both weights")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check_tensor(op, name, norm, keys, keys.dtype, (D,), "[D]")
    check_eps(op, eps)
    check_no_grad(op, qkv, cos, sin, keys, values, bias, q_norm, k_norm)
    return _OP(qkv, cos, sin, slots, keys, values, bias, q_norm, k_norm, float(eps))


def _check_cache(op: str, keys: Tensor, values: Tensor) -> tuple[int, int, int, int]:
    if not isinstance(keys, Tensor):
        raise not_a_tensor(op, "keys", keys, "a tensor [B, Hkv, N, D]")
    if keys.dim() != 4:
        raise bad_shape(op, "keys", keys, "4 dimensions [B, Hkv, N, D]", "pass a layer's buffer")
    if keys.dtype not in FLOATS:
        raise bad_dtype(op, "keys", keys, "float16, bfloat16 or float32")
    B, Hkv, N, D = keys.shape
    if D % 8 or not 16 <= D <= 512:
        expected = "a head dim D from 16 to 512 that is a multiple of 8"
        raise bad_shape(op, "keys", keys, expected, "rotate and write with PyTorch's operators")
    if keys.stride(-1) != 1:
        raise bad_stride(op, "keys", keys)
    check_tensor(op, "values", values, keys, keys.dtype, (B, Hkv, N, D), "[B, Hkv, N, D]")
    return B, Hkv, N, D


def _check_rotation(op: str, cos: Tensor, sin: Tensor, keys: Tensor, T: int) -> None:
    B, D = keys.shape[0], keys.shape[3]
    if not isinstance(cos, Tensor):
        raise not_a_tensor(op, "cos", cos, "a tensor [B, T, Dr]")
    rows, rotated = (cos.shape[0], cos.shape[2]) if cos.dim() == 3 else (B, D)
    if rows not in (1, B) or rotated % 2 or not 2 <= rotated <= D:
        expected = f"[B, T, Dr] or [1, T, Dr] with B = {B} and an even Dr from 2 to D = {D}"
        raise bad_shape(op, "cos", cos, expected, "pass what the rotary embedding gives")
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_tensor(op, name, tensor, keys, keys.dtype, (rows, T, rotated), "[B, T, Dr]")

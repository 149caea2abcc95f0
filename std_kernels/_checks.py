"""Argument checks that several ops share; they word a message only on failure.

Only what the host knows is checked (shapes, dtypes, devices, strides, options). Values inside
tensors, such as a kv_len above the capacity, are not: reading them would synchronise a GPU.
"""

import torch
from torch import Tensor

from std_kernels._errors import (
    bad_device,
    bad_dtype,
    bad_shape,
    bad_stride,
    bad_type,
    bad_value,
    needs_grad,
    not_a_tensor,
)

MAX_GROUP = 16
MAX_HEAD_DIM = 512
MAX_TOKENS = 64
MAX_PARTIALS = 64
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_INF = float("inf")


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    like: Tensor,
    dtype: torch.dtype,
    shape: tuple,
    words: str,
    inner_dense: bool = True,
) -> None:
    """Raises unless `tensor` is `dtype [shape]` on `like`'s device; `words` names the shape."""
    if not isinstance(tensor, Tensor):
        raise not_a_tensor(op, name, tensor, f"a {str(dtype)[6:]} tensor {words}")
    if tensor.dtype is not dtype:
        raise bad_dtype(op, name, tensor, f"{str(dtype)[6:]} {words}")
    if tensor.shape != shape:
        expected = f"{words} = {list(shape)}"
        raise bad_shape(op, name, tensor, expected, f"make {name} agree with {list(like.shape)}")
    if tensor.device != like.device:
        raise bad_device(op, name, tensor, like)
    # A dimension of size 1 may carry any stride; no kernel steps along it.
    if inner_dense and tensor.stride(-1) != 1 and shape[-1] > 1:
        raise bad_stride(op, name, tensor)


def check_query_key(
    op: str, query: Tensor, key: Tensor, tokens: str = "T", max_tokens: int | None = MAX_TOKENS
) -> tuple[int, int, int, int, int, int]:
    """Checks the pair every attention op starts from; returns B, Hq, T, D, Hkv, N."""
    if not isinstance(query, Tensor):
        raise not_a_tensor(op, "query", query, f"a tensor [B, Hq, {tokens}, D]")
    if not isinstance(key, Tensor):
        raise not_a_tensor(op, "key", key, "a tensor [B, Hkv, N, D]")
    if query.dim() != 4:
        remedy = "pass the SDPA layout, heads before tokens"
        raise bad_shape(op, "query", query, f"4 dimensions [B, Hq, {tokens}, D]", remedy)
    if query.dtype not in FLOATS:
        raise bad_dtype(op, "query", query, "float16, bfloat16 or float32")
    B, Hq, T, D = query.shape
    if D % 8 or not 16 <= D <= MAX_HEAD_DIM:
        expected = f"a head dim D from 16 to {MAX_HEAD_DIM} that is a multiple of 8"
        raise bad_shape(op, "query", query, expected, "pad D with zeros and pass scale")
    if T < 1 or (max_tokens is not None and T > max_tokens):
        expected = f"{tokens} >= 1" if max_tokens is None else f"1 <= {tokens} <= {max_tokens}"
        raise bad_shape(op, "query", query, expected, "pass the tokens in several calls")
    if query.stride(-1) != 1:
        raise bad_stride(op, "query", query)
    if key.dim() != 4:
        raise bad_shape(op, "key", key, "4 dimensions [B, Hkv, N, D]", "pass the SDPA layout")
    Hkv, N = key.shape[1], key.shape[2]
    check_tensor(op, "key", key, query, query.dtype, (B, Hkv, N, D), "[B, Hkv, N, D]")
    if Hkv < 1 or Hq % Hkv or not 1 <= Hq // Hkv <= MAX_GROUP:
        expected = f"Hkv dividing Hq = {Hq} with a group Hq/Hkv from 1 to {MAX_GROUP}"
        raise bad_shape(op, "key", key, expected, "check the head dimensions")
    return B, Hq, T, D, Hkv, N


def check_options(
    op: str, query: Tensor, scale: float | None, softcap: float | None, sinks: Tensor | None
) -> None:
    """Checks the options every attention op has."""
    if scale is not None:
        if not isinstance(scale, (float, int)):
            found = f"is of type {type(scale).__name__}"
            raise bad_type(op, "scale", found, "a number", "pass a float or None for D**-0.5")
        if not -_INF < scale < _INF:
            raise bad_value(op, "scale", f"is {scale}", "a finite number", "pass None for D**-0.5")
    if softcap is not None:
        if not isinstance(softcap, (float, int)):
            found = f"is of type {type(softcap).__name__}"
            raise bad_type(op, "softcap", found, "a number", "pass a float or None for no cap")
        if not 0 < softcap < _INF:
            expected = "0 < softcap < inf"
            raise bad_value(op, "softcap", f"is {softcap}", expected, "pass None for no cap")
    if sinks is not None:
        check_tensor(op, "sinks", sinks, query, torch.float32, (query.shape[1],), "[Hq]")


def check_no_grad(op: str, *tensors: Tensor | None) -> None:
    """Raises when autograd would record the call: the ops have no backward."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise needs_grad(op)


def check_rows(op: str, name: str, tensor: Tensor) -> tuple[int, int]:
    """Checks rows of features; returns their number and their length."""
    if not isinstance(tensor, Tensor):
        raise not_a_tensor(op, name, tensor, "a tensor [R, H]")
    if tensor.dim() != 2:
        raise bad_shape(op, name, tensor, "2 dimensions [R, H]", "flatten batch and tokens")
    if tensor.dtype not in FLOATS:
        raise bad_dtype(op, name, tensor, "float16, bfloat16 or float32")
    if tensor.stride(-1) != 1 and tensor.shape[1] > 1:
        raise bad_stride(op, name, tensor)
    return tensor.shape[0], tensor.shape[1]


def check_product(
    op: str,
    name: str,
    product: Tensor,
    like: Tensor,
    dtype: torch.dtype,
    rows: int,
    features: int,
    words: str,
) -> None:
    """Raises unless `product` is `dtype [rows, features]` or float32 partials of it."""
    if isinstance(product, Tensor) and product.dim() == 3:
        S = product.shape[0]
        if not 1 <= S <= MAX_PARTIALS:
            expected = f"1 <= S <= {MAX_PARTIALS} partials [S, R, {words}]"
            raise bad_shape(op, name, product, expected, "add some of them up first")
        shape: tuple = (S, rows, features)
        check_tensor(op, name, product, like, torch.float32, shape, f"[S, R, {words}]")
        return
    check_tensor(op, name, product, like, dtype, (rows, features), f"[R, {words}]")


def check_bias(
    op: str, bias: Tensor | None, like: Tensor, dtype: torch.dtype, features: int, words: str
) -> None:
    """Checks what may be added to a product."""
    if bias is not None:
        check_tensor(op, "bias", bias, like, dtype, (features,), words)


def check_eps(op: str, eps: float) -> None:
    """Checks what a norm adds to the mean of squares."""
    if not isinstance(eps, (float, int)):
        found = f"is of type {type(eps).__name__}"
        raise bad_type(op, "eps", found, "a number", "pass the norm's own, such as 1e-6")
    if not 0 <= eps < _INF:
        raise bad_value(op, "eps", f"is {eps}", "0 <= eps < inf", "pass the norm's own")

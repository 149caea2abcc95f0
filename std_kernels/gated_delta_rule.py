"""Linear attention with a state: the gated delta rule, over a state that trails the tokens.

    S_n = exp(g_n) S_(n-1) + k_n (beta_n (v_n - k_n^T exp(g_n) S_(n-1)))^T
    out_n = S_n^T q_n / sqrt(Dk),      q and k each divided by its length

Gated DeltaNet (Yang et al., ICLR 2025, arXiv 2412.06464), as Qwen3-Next and Qwen3.5 have it. A
state cannot forget a token. So the one in memory is that of tokens known to stay, the inputs of
later ones lie in a ring, and a call goes over them again: rejecting a draft is nothing but a
smaller length, as in the KV cache. Bytes moved: the state, once more where it is stored.
"""

import torch
from torch import Tensor

from std_kernels import cpu_recurrent
from std_kernels._checks import MAX_TOKENS, check_no_grad, check_tensor
from std_kernels._errors import bad_dtype, bad_shape, bad_stride, bad_type, not_a_tensor
from std_kernels._library import register

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _fake(query, key, value, g, beta, state, state_len, kv_len, update):
    return query.new_empty((*query.shape[:2], *value.shape[2:]))


_OP = register(
    "gated_delta_rule(Tensor query, Tensor key, Tensor value, Tensor g, Tensor beta, "
    "Tensor(a!) state, Tensor state_len, Tensor kv_len, bool update) -> Tensor",
    cpu_recurrent.gated_delta_rule,
    _fake,
    "std_kernels._gated_delta_rule_kernels",
)


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    state_len: Tensor,
    kv_len: Tensor,
    *,
    update: bool = True,
) -> Tensor:
    """Computes the gated delta rule of a row's last T tokens, from a state of earlier ones.

    Key, value, g and beta are rings: token n of a row is in slot n mod P. The call begins with the
    state after `state_len[b]` tokens, goes over those from there to `kv_len[b] - T`, stores the
    state that this gives, and goes on over the T new ones, whose results it returns. With T = 3,
    two tokens accepted since the state was stored (a), one rejected (x) and overwritten:

        last call    state  a a x
        this call    state  a a n n n      stored after the second a

    Args:
        query: [B, T, Hk, Dk] float16, bfloat16 or float32. 1 <= T <= 64, Dk a multiple of 8 from
            16 to 256.
        key: [B, P, Hk, Dk] in query's dtype. P is at least kv_len - state_len in every row.
        value: [B, P, Hv, Dv] in query's dtype. Hk divides Hv, Dv a multiple of 8 from 16 to 256.
        g: [B, P, Hv] float32, inner stride 1: the log of the decay, at most 0.
        beta: [B, P, Hv] in query's dtype, inner stride 1: how much of the old value is replaced.
        state: [B, Hv, Dk, Dv] float32, contiguous; renewed in place.
        state_len: [B] int32, tokens that the state is of, 0 to kv_len - T.
        kv_len: [B] int32, tokens of the row, the new ones included.
        update: False leaves the state as it is: for drafts, which nobody has accepted yet.

    Query, key and value have the heads of a token one after another, inner strides D and 1.

    Returns:
        out [B, T, Hv, Dv] in query's dtype, contiguous.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device, stride or range. Values inside tensors are not checked.
        RuntimeError: an input requires grad while gradients are enabled; there is no backward.

    Note:
        The state is computed in float32. Its bits, and those of a result, do not depend on which
        calls the tokens came in, nor on T. One launch; the lengths are read on the device, so that
        a CUDA graph can hold it. The CPU path reads them on the host.
    """
    op = "gated_delta_rule"
    B, T, Hk, Dk = _check_heads(op, "query", query, "[B, T, Hk, Dk]")
    _, P, Hv, Dv = _check_heads(op, "value", value, "[B, P, Hv, Dv]")
    if query.dtype not in _FLOATS:
        raise bad_dtype(op, "query", query, "float16, bfloat16 or float32")
    if not 1 <= T <= MAX_TOKENS:
        remedy = "pass the tokens in several calls"
        raise bad_shape(op, "query", query, f"1 <= T <= {MAX_TOKENS}", remedy)
    _check_heads(op, "key", key, "[B, P, Hk, Dk]")
    check_tensor(op, "key", key, query, query.dtype, (B, P, Hk, Dk), "[B, P, Hk, Dk]")
    if Hk < 1 or Hv < 1 or Hv % Hk:
        raise bad_shape(op, "value", value, f"Hk = {Hk} dividing Hv", "check the head dimensions")
    check_tensor(op, "value", value, query, query.dtype, (B, P, Hv, Dv), "[B, P, Hv, Dv]")
    check_tensor(op, "g", g, query, torch.float32, (B, P, Hv), "[B, P, Hv]")
    check_tensor(op, "beta", beta, query, query.dtype, (B, P, Hv), "[B, P, Hv]")
    check_tensor(op, "state", state, query, torch.float32, (B, Hv, Dk, Dv), "[B, Hv, Dk, Dv]")
    if not state.is_contiguous():
        raise bad_stride(op, "state", state)
    check_tensor(op, "state_len", state_len, query, torch.int32, (B,), "[B]")
    check_tensor(op, "kv_len", kv_len, query, torch.int32, (B,), "[B]")
    if not isinstance(update, bool):
        found = f"is of type {type(update).__name__}"
        raise bad_type(op, "update", found, "a bool", "pass False for drafts")
    check_no_grad(op, query, key, value, g, beta, state)
    return _OP(query, key, value, g, beta, state, state_len, kv_len, update)


def _check_heads(op: str, name: str, tensor: Tensor, words: str) -> tuple[int, int, int, int]:
    """Checks a tensor of heads, all that its own shape and strides tell; returns the shape."""
    if not isinstance(tensor, Tensor):
        raise not_a_tensor(op, name, tensor, f"a tensor {words}")
    if tensor.dim() != 4:
        remedy = "pass tokens before heads"
        raise bad_shape(op, name, tensor, f"4 dimensions {words}", remedy)
    B, tokens, heads, D = tensor.shape
    if D % 8 or not 16 <= D <= 256:
        expected = "a head dim from 16 to 256 that is a multiple of 8"
        raise bad_shape(op, name, tensor, expected, "pad it with zeros")
    if tensor.stride(3) != 1 or (heads > 1 and tensor.stride(2) != D):
        raise bad_stride(op, name, tensor)
    return B, tokens, heads, D

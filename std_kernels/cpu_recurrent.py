"""The ops with a state in plain PyTorch, for CPU users.

Arithmetic and shapes of a step are those of transformers' single-token decoding (its functions
`torch_recurrent_gated_delta_rule` and `causal_conv1d_update`), so that a token has the bits that
it has there, however many tokens a call brings. The argument order is that of the op schemas.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    state_len: Tensor,
    kv_len: Tensor,
    update: bool,
) -> Tensor:
    """Token by token; rows with fewer tokens to go over again wait for the others."""
    B, T, Hk, Dk = query.shape
    P, Hv = value.shape[1:3]
    out = query.new_empty(B, T, *value.shape[2:])
    if not out.numel():
        return out
    start = kv_len.long() - T
    again = (start - state_len).clamp_(min=0)
    most = int(again.max())
    slots = (start[:, None] + torch.arange(-most, T, device=start.device)) % P  # [B, most + T]
    rows = torch.arange(B, device=start.device)[:, None]
    key, value, g, beta = (x[rows, slots].transpose(1, 2).float() for x in (key, value, g, beta))
    query = query.transpose(1, 2).float()
    if Hk != Hv:
        query, key = (x.repeat_interleave(Hv // Hk, dim=1) for x in (query, key))
    query, key = _normalized(query) / Dk**0.5, _normalized(key)
    now = state
    for i in range(most + T):
        if i == most and update and most:
            state.copy_(now)
        k = key[:, :, i, :, None]
        after = now * g[:, :, i].exp()[..., None, None]
        delta = (value[:, :, i] - (after * k).sum(dim=-2)) * beta[:, :, i, None]
        after = after + k * delta.unsqueeze(-2)
        if i < most:  # a row that is not there yet may have anything in that slot
            after = torch.where((i >= most - again)[:, None, None, None], after, now)
        else:
            out[:, i - most] = (after * query[:, :, i - most, :, None]).sum(dim=-2)
        now = after
    return out


def _normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)


def causal_conv1d(
    inputs: Tensor, weight: Tensor, kv_len: Tensor, tokens: int, bias: Tensor | None, silu: bool
) -> Tensor:
    """One convolution for each token, of the very width that decoding a single token has."""
    B, P, C = inputs.shape
    W = weight.shape[1]
    rows = torch.arange(B, device=inputs.device)[:, None]
    ahead = torch.arange(-tokens - W, 0, device=inputs.device)
    at = kv_len[:, None] + ahead  # [B, W + T], one more before than counts
    window = inputs[rows, at % P].masked_fill_((at < 0)[..., None], 0).mT  # [B, C, W + T]
    # Beyond P, the one that does not count may be any: even stale NaN, and then 0 x NaN.
    window[..., 0] = 0
    parts = []
    for t in range(tokens):
        # transformers' own calls have W + 1 inputs, of which the first does not show.
        here = window[..., t : t + W + 1].contiguous()
        out = F.conv1d(here, weight.unsqueeze(1), bias, groups=C)[..., -1:]
        # Each in its turn: at the end of a tensor exp is another function, by a bit.
        parts.append(F.silu(out) if silu else out)
    return torch.cat(parts, dim=-1).mT.contiguous()

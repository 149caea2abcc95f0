"""Each op in plain PyTorch, with every mask and every product written out: what is correct.

No function here is fast, and no library module imports this one. The arithmetic is in `dtype`,
float64 unless told, and so are the results; integer results are exact. Arguments are those of
the public functions and are not checked.
"""

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor


def int4_linear(
    input: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Product [..., N] with the weight of `values` as `pack_int4` is given them, and `scales`."""
    q = torch.stack((values >> 4, values & 15), dim=-1).flatten(1)  # [N, K]
    scale, zero = repeat(scales, "k n two -> two n (k g)", g=q.shape[1] // len(scales))
    weight = (q.double() - 8) * scale.double() + zero.double()
    product = input.to(dtype) @ weight.to(dtype).T
    return product if bias is None else product + bias.to(dtype)


def score_keys(
    query: Tensor,
    key: Tensor,
    kv_len: Tensor,
    *,
    kv_start: Tensor | None = None,
    num_queries: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Mean probability [B, Hkv, N] the last `num_queries` of W queries give each key."""
    B, Hq, W, _ = query.shape
    Hkv, N = key.shape[1], key.shape[2]
    mask = _dense_mask(kv_len, kv_start, None, W, N)  # [B, W, N]
    logits = _logits(query, key, mask.any(1)[:, None], scale, softcap, dtype)
    probability, _ = _softmax(logits, mask[:, None], sinks)
    count = torch.full_like(kv_len, W) if num_queries is None else num_queries
    counted = torch.arange(W) >= W - count[:, None]  # [B, W]
    probability = probability.where(counted[:, None, :, None], 0)
    total = reduce(probability, "b (h g) w n -> b h n", "sum", h=Hkv)
    return total / (count.clamp(min=1)[:, None, None] * (Hq // Hkv))


def select_topk(
    scores: Tensor, k: int, *, candidates: Tensor | None = None, always: Tensor | None = None
) -> Tensor:
    """Positions [..., B, Hkv, k] of the k best scores per row, ascending, padded with -1."""
    everything = torch.ones_like(scores, dtype=torch.bool)
    wanted = everything if candidates is None else everything & candidates[:, None]
    forced = ~everything if always is None else everything & always[:, None]
    result = torch.full((*scores.shape[:-1], k), -1, dtype=torch.int32)
    for row in torch.cartesian_prod(*map(torch.arange, scores.shape[:-1])):
        at = tuple(row.tolist())
        first = forced[at].nonzero().flatten()[-k:]
        rest = (wanted[at] & ~forced[at] & (scores[at] > float("-inf"))).nonzero().flatten()
        best = rest[scores[at][rest].argsort(descending=True, stable=True)]
        chosen = torch.cat((first, best))[:k].sort().values
        result[at][: len(chosen)] = chosen
    return result


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    tail_start: Tensor,
    kv_len: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed keys and a causal tail: out [B, Hq, T, D], lse [B, Hq, T]."""
    T, N, G = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    position = torch.arange(N)
    listed = (indices[..., None] == position).any(-2)  # [B, Hkv, N]
    listed &= position < tail_start[:, None, None]
    tail = _dense_mask(kv_len, tail_start, None, T, N)  # [B, T, N]
    mask = listed[:, :, None] | tail[:, None]  # [B, Hkv, T, N]
    return _attend(
        query,
        key,
        value,
        repeat(mask, "b h t n -> b (h g) t n", g=G),
        scale,
        softcap,
        sinks,
        dtype,
    )


def verify_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_len: Tensor,
    *,
    kv_start: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last T tokens: out [B, Hq, T, D], lse [B, Hq, T]."""
    mask = _dense_mask(kv_len, kv_start, window, query.shape[2], key.shape[2])
    mask = repeat(mask, "b t n -> b h t n", h=query.shape[1])
    return _attend(query, key, value, mask, scale, softcap, sinks, dtype)


def verify_attention_with_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_len: Tensor,
    score_lse: Tensor,
    *,
    kv_start: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """verify_attention, and per key the sum over rows of sigmoid(logit - score_lse)."""
    out, lse = verify_attention(
        query,
        key,
        value,
        kv_len,
        kv_start=kv_start,
        window=window,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dtype=dtype,
    )
    mask = _dense_mask(kv_len, kv_start, window, query.shape[2], key.shape[2])[:, None]
    logits = _logits(query, key, mask.any(-2), scale, softcap, dtype)
    counted = mask & (score_lse < float("inf"))[..., None]
    share = torch.sigmoid(logits - score_lse.to(dtype)[..., None]).where(counted, 0)
    return out, lse, reduce(share, "b (h g) t n -> b h n", "sum", h=key.shape[1])


def add_rms_norm(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """residual + delta, and its quotient by its root mean square, times weight: [R, H] both."""
    total = residual.to(dtype)
    if delta is not None:
        total = total + _product(delta, bias, dtype)
    return total, _rms_norm(total, weight, eps)


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
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries [B, Hq, T, D], and what keys and values are then, [B, Hkv, N, D]."""
    B, Hkv, _, D = keys.shape
    T = slots.shape[1]
    heads = rearrange(_product(qkv, bias, dtype), "(b t) (h d) -> b h t d", b=B, t=T, d=D)
    query, key, value = heads[:, : -2 * Hkv], heads[:, -2 * Hkv : -Hkv], heads[:, -Hkv:]
    if q_norm is not None and k_norm is not None:
        query, key = _rms_norm(query, q_norm, eps), _rms_norm(key, k_norm, eps)
    keys, values = keys.to(dtype, copy=True), values.to(dtype, copy=True)
    key = _rotated(key, cos.to(dtype), sin.to(dtype))
    for b in range(B):
        for t in range(T):
            keys[b, :, slots[b, t]] = key[b, :, t]
            values[b, :, slots[b, t]] = value[b, :, t]
    return _rotated(query, cos.to(dtype), sin.to(dtype)), keys, values


def silu_mul(
    gate_up: Tensor,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """silu(gate) * up, [R, I]."""
    gate, up = _product(gate_up, bias, dtype).chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def _product(product: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A product, of its partials [S, R, N] where it is given so."""
    total = product.to(dtype) if product.dim() == 2 else product.to(dtype).sum(0)
    return total if bias is None else total + bias.to(dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(x)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [B, H, T, D] turned by cos and sin [B, T, Dr]: pair (i, i + Dr / 2) by angle i."""
    half, out = cos.shape[-1] // 2, x.clone()
    for i in range(half):
        first, second = x[..., i], x[..., i + half]
        out[..., i] = first * cos[:, None, :, i] - second * sin[:, None, :, i]
        at = i + half
        out[..., at] = second * cos[:, None, :, at] + first * sin[:, None, :, at]
    return out


def renew_importance(
    importance: Tensor,
    scores: Tensor,
    stop: Tensor,
    fade: float,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The larger of the faded importance and the share of the newest scores, NaN left out."""
    S = importance.shape[-1]
    scores = scores[..., :S].to(dtype)
    counted = torch.arange(S) < stop[:, None, None]  # [B, 1, S]
    total = scores.where(counted, 0).sum(-1, keepdim=True).clamp(min=1e-30)
    faded = importance.to(dtype) * fade
    return torch.fmax(faded, scores / total).where(counted, importance.to(dtype))


def causal_conv1d(
    inputs: Tensor,
    weight: Tensor,
    kv_len: Tensor,
    tokens: int,
    *,
    bias: Tensor | None = None,
    silu: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Causal convolution [B, T, C] of the last T tokens of a ring of inputs."""
    B, P, C = inputs.shape
    out = torch.zeros(B, tokens, C, dtype=dtype)
    for b, t, w in torch.cartesian_prod(*map(torch.arange, (B, tokens, weight.shape[1]))):
        n = int(kv_len[b]) - tokens + int(t) - weight.shape[1] + 1 + int(w)
        if n >= 0:
            out[b, t] += weight[:, w].to(dtype) * inputs[b, n % P].to(dtype)
    if bias is not None:
        out += bias.to(dtype)
    return out * torch.sigmoid(out) if silu else out


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
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The last T tokens' results [B, T, Hv, Dv], and the state that is stored."""
    (B, T, Hk, Dk), (_, P, Hv, Dv) = query.shape, value.shape
    out, stored = torch.zeros(B, T, Hv, Dv, dtype=dtype), state.to(dtype).clone()
    for b, h in torch.cartesian_prod(torch.arange(B), torch.arange(Hv)):
        S, start = state[b, h].to(dtype), int(kv_len[b]) - T
        for n in range(int(state_len[b]), start + T):
            if n == start and update:
                stored[b, h] = S
            k = key[b, n % P, h // (Hv // Hk)].to(dtype)
            k = k / (k.square().sum() + 1e-6).sqrt()
            S = S * g[b, n % P, h].to(dtype).exp()
            S = S + torch.outer(k, beta[b, n % P, h].to(dtype) * (value[b, n % P, h] - k @ S))
            if n >= start:
                q = query[b, n - start, h // (Hv // Hk)].to(dtype)
                out[b, n - start, h] = q / (q.square().sum() + 1e-6).sqrt() @ S / Dk**0.5
    return out, stored


def _dense_mask(
    kv_len: Tensor, start: Tensor | None, window: int | None, T: int, N: int
) -> Tensor:
    """True where query t may see key n, [B, T, N]."""
    n = torch.arange(N)
    query_at = (kv_len[:, None] - T + torch.arange(T))[..., None]  # [B, T, 1]
    mask = n <= query_at
    if start is not None:
        mask = mask & (n >= start[:, None, None])
    if window is not None:
        mask = mask & (n > query_at - window)
    return mask


def _logits(
    query: Tensor,
    key: Tensor,
    readable: Tensor,
    scale: float | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Every query times every key, [B, Hq, T, N]; unreadable keys [B, H, N] count as zero."""
    G = query.shape[1] // key.shape[1]
    key = repeat(key, "b h n d -> b (h g) n d", g=G).to(dtype).where(readable[..., None], 0)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = query.to(dtype) @ key.mT * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _softmax(logits: Tensor, mask: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities and lse under the mask; a sink is one more logit in the denominator."""
    logits = logits.where(mask, float("-inf"))
    every = logits
    if sinks is not None:
        column = repeat(sinks.to(logits), "h -> b h t 1", b=logits.shape[0], t=logits.shape[2])
        every = torch.cat((logits, column), dim=-1)
    lse = torch.logsumexp(every, dim=-1)
    return torch.exp(logits - lse[..., None]).where(mask, 0), lse


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Attention under an explicit mask [B, Hq, T, N]."""
    readable = mask.any(-2)  # [B, Hq, N]
    logits = _logits(query, key, readable, scale, softcap, dtype)
    probability, lse = _softmax(logits, mask, sinks)
    value = repeat(value, "b h n d -> b (h g) n d", g=query.shape[1] // value.shape[1])
    return probability @ value.to(dtype).where(readable[..., None], 0), lse

"""verify_attention in plain PyTorch for CPU users; see `cpu` for what its ops have in common."""

import torch
from torch import Tensor

from std_kernels._packed import (
    INF,
    MAX_LOGITS,
    attend,
    attend_in_chunks,
    logits,
    nothing_seen,
    ranges,
    unpack,
)

_MAX_BIAS = 1 << 24
_LONG = 2048  # keys: from here on two calls without a mask cost less than one with


def verify_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_len: Tensor,
    kv_start: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One attention call when all rows share a range, else one a row."""
    if len(query) == query.shape[2] == 1 and window is None:
        # A dense step of one row, where each microsecond beside the attention itself counts.
        low, high = 0 if kv_start is None else int(kv_start), int(kv_len)
        if low < high:
            rows = query.reshape(1, key.shape[1], -1, query.shape[3])
            keys, values = key.narrow(2, low, high - low), value.narrow(2, low, high - low)
            return unpack(query, *attend(rows, keys, values, None, scale, softcap), sinks)
    limits = ranges(kv_len, kv_start, query.shape[2], window)
    if len(set(limits)) == 1:
        return _verify_range(query, key, value, *limits[0], window, scale, softcap, sinks)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    for b, (low, high) in enumerate(limits):
        row = slice(b, b + 1)
        out[row], lse[row] = _verify_range(
            query[row], key[row], value[row], low, high, window, scale, softcap, sinks
        )
    return out, lse


def verify_attention_with_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_len: Tensor,
    score_lse: Tensor,
    kv_start: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """verify_attention, and scores that cannot change its results: a second pass over the keys.

    Over many keys the scores come from the same logits as the results, which are those of
    verify_attention bit for bit.
    """
    B, Hq, T, _ = query.shape
    scores = key.new_zeros(key.shape[:3], dtype=torch.float32)
    # +inf switches a row off. The finite floor keeps a masked logit less it at -inf, not NaN.
    cut = score_lse.nan_to_num(nan=INF, posinf=INF, neginf=torch.finfo(torch.float32).min)
    limits = ranges(kv_len, kv_start, T, window)
    parts = [slice(0, B)] if len(set(limits)) == 1 else [slice(b, b + 1) for b in range(B)]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    for rows, (low, high) in zip(parts, limits):
        given = query[rows], key[rows], value[rows]
        first = low
        if _in_parts(query, low, high, window):
            packed = cut[rows].reshape(-1, key.shape[1], Hq // key.shape[1] * T, 1)
            out[rows], lse[rows] = _verify_parts(
                *given, low, high, scale, softcap, sinks, packed, scores[rows]
            )
            first = high - T
        else:
            out[rows], lse[rows] = _verify_range(*given, low, high, window, scale, softcap, sinks)
        _score_range(scores[rows], *given[:2], cut[rows], first, high, window, scale, softcap)
    return out, lse, scores


def _causal_bias(T: int, n: int, window: int | None, like: Tensor) -> Tensor | None:
    """0 where query t of the last T of n positions sees a key, else -inf: [T, n], or None."""
    if T == 1 and (window is None or n <= window):
        return None
    bias = like.new_full((T, n), -INF).triu_(n - T + 1)
    if window is not None and n > window:
        bias += like.new_full((T, n), -INF).tril_(n - T - window)
    return bias


def _verify_range(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    low: int,
    high: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention of queries that are the last T of positions low to high, GQA-packed."""
    B, Hq, T, D = query.shape
    Hkv = key.shape[1]
    G, n = Hq // Hkv, high - low
    options = (window, scale, softcap, sinks)
    if n < T:
        # The first T - n queries stand before the range and see nothing.
        out, lse = nothing_seen(query, sinks)
        if n > 0:
            out[:, :, T - n :], lse[:, :, T - n :] = _verify_range(
                query[:, :, T - n :], key, value, low, high, *options
            )
        return out, lse
    if _in_parts(query, low, high, window):
        return _verify_parts(query, key, value, low, high, scale, softcap, sinks)
    if T > 1 and G * T * n > _MAX_BIAS:
        half = T // 2
        first = _verify_range(query[:, :, :half], key, value, low, high - T + half, *options)
        last = _verify_range(query[:, :, half:], key, value, low, high, *options)
        return torch.cat((first[0], last[0]), 2), torch.cat((first[1], last[1]), 2)
    bias = _causal_bias(T, n, window, query)
    if bias is not None:
        bias = bias.repeat(G, 1)
    rows = query.reshape(B, Hkv, G * T, D)
    keys, values = key[:, :, low:high], value[:, :, low:high]
    out, lse = attend(rows, keys, values, bias, scale, softcap)
    return unpack(query, out, lse, sinks)


def _in_parts(query: Tensor, low: int, high: int, window: int | None) -> bool:
    T, n = query.shape[2], high - low
    whole = window is None or n <= window
    return 1 < T <= n and n > _LONG and whole and query.dtype == torch.float32


def _verify_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    low: int,
    high: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    cut: Tensor | None = None,
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The keys that all T queries see, and their own T keys, merged.

    A mask as long as the cache would cost a tenth of the attention itself, and more where memory
    for it comes fresh from the system. With `cut` [B, Hkv, R, 1] it also writes the scores of the
    keys before the own ones, from the same logits; they do not touch the rest.
    """
    B, Hq, T, D = query.shape
    Hkv = key.shape[1]
    rows = query.reshape(B, Hkv, -1, D)
    bias = query.new_full((T, T), -INF).triu_(1).repeat(Hq // Hkv, 1)
    own = slice(high - T, high)
    out, lse = attend(rows, key[:, :, own], value[:, :, own], bias, scale, softcap)
    if high - T > low:
        seen = slice(low, high - T)
        past, past_lse, found = attend_in_chunks(
            rows, key[:, :, seen], value[:, :, seen], scale, softcap, cut
        )
        if scores is not None:
            scores[:, :, seen] = found
        share = torch.sigmoid(lse - past_lse)
        out, lse = torch.lerp(past, out, share[..., None]), torch.logaddexp(past_lse, lse)
    return unpack(query, out, lse, sinks)


def _score_range(
    scores: Tensor,
    query: Tensor,
    key: Tensor,
    cut: Tensor,
    low: int,
    high: int,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> None:
    """Writes sum over rows of sigmoid(logit - cut) into scores[..., low:high]."""
    B, Hq, T, D = query.shape
    Hkv, n = key.shape[1], high - low
    seen = min(T, n)
    if seen < 1:
        return
    rows = query[:, :, T - seen :].reshape(B, Hkv, -1, D).float()
    cut = cut[:, :, T - seen :].reshape(B, Hkv, -1, 1)
    # Where keys begin that not every query sees, and a mask of those.
    first = n - seen if window is None or n <= window else 0
    bias = _causal_bias(seen, n - first, window, rows)
    step = max(1, MAX_LOGITS // (B * Hq * seen))
    for start in range(0, n, step):
        stop = min(start + step, n)
        share = logits(rows, key[:, :, low + start : low + stop], scale, softcap).sub_(cut)
        if bias is not None and stop > first:
            own = share.view(B, Hq, seen, -1)[..., max(0, first - start) :]
            own.add_(bias[:, max(0, start - first) : stop - first])
        scores[:, :, low + start : low + stop] = share.sigmoid_().sum(2)

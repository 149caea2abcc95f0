"""The ops in plain PyTorch for CPU users: fast, in float32 or the inputs' own precision.

All run on any device. None loops over keys one by one, copies K/V per query head, or holds more
than about `MAX_LOGITS` logits at once, and nothing outside a row's range is ever read: a stale
NaN times a weight of zero would still be NaN. Lengths are read on the host, so on a GPU every op
synchronises. The argument order is that of the op schemas.
"""

import torch
from torch import Tensor

from std_kernels._packed import (
    INF,
    MAX_LOGITS,
    attend,
    attend_in_chunks,
    gather,
    gather_with_tail,
    logits,
    nothing_seen,
    unpack,
)

_MAX_BIAS = 1 << 24
_LONG = 2048  # keys: from here on two calls without a mask cost less than one with


def score_keys(
    query: Tensor,
    key: Tensor,
    kv_len: Tensor,
    kv_start: Tensor | None,
    num_queries: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Mean probability each key gets; one KV head at a time, its query rows in chunks."""
    B, Hq, W, D = query.shape
    Hkv, N = key.shape[1], key.shape[2]
    G = Hq // Hkv
    scores = query.new_zeros(B, Hkv, N, dtype=torch.float32)
    counts = [W] * B if num_queries is None else num_queries.tolist()
    for b, (low, high) in enumerate(_ranges(kv_len, kv_start, W, None)):
        # Queries to the left of the range see nothing and only count in the mean.
        seen = min(counts[b], W, high - low)
        if seen < 1:
            continue
        triangle = query.new_full((seen, seen), -INF, dtype=torch.float32).triu_(1).repeat(G, 1)
        step = max(1, MAX_LOGITS // (high - low))
        for h in range(Hkv):
            rows = query[b, h * G : (h + 1) * G, W - seen :].reshape(G * seen, D).float()
            keys = key[b, h, low:high].float()
            total = scores[b, h, low:high]
            for r in range(0, G * seen, step):
                block = logits(rows[r : r + step], keys, scale, softcap)
                block[:, -seen:] += triangle[r : r + step]
                lse = block.logsumexp(-1, keepdim=True)
                if sinks is not None:
                    sink = sinks[h * G : (h + 1) * G].repeat_interleave(seen)[r : r + step]
                    lse = torch.logaddexp(lse, sink[:, None])
                total += block.sub_(lse).exp_().sum(0)
        scores[b] /= G * counts[b]
    return scores


def select_topk(
    scores: Tensor, k: int, candidates: Tensor | None, always: Tensor | None
) -> Tensor:
    """Exact selection in O(N): the k-th value, then everything above it and the first ties."""
    N = scores.shape[-1]
    # Also False for NaN, so that only selectable scores survive the next line.
    selectable = scores > -INF
    if candidates is not None:
        selectable &= candidates[:, None]
    forced = None
    if always is not None:
        # Of more than k the highest positions: count from the right.
        forced = always & (always.flip(-1).cumsum(-1).flip(-1) <= k)
        selectable &= ~always[:, None]
    values = scores.where(selectable, -INF)
    best = values.topk(k, dim=-1).values
    if forced is None:
        room, threshold = k, best[..., -1:]
    else:
        room = k - forced.sum(-1)[:, None, None].expand(*scores.shape[:-1], 1)
        threshold = best.gather(-1, (room - 1).clamp_(min=0))
    # Rows with fewer selectable scores than room take them all, but no -inf.
    threshold = threshold.clamp(min=torch.finfo(torch.float32).min)
    chosen = values >= threshold
    # More than the room, by ties or because it is 0, is rare; to count on costs passes over N.
    if (chosen.sum(-1, keepdim=True) > room).any():
        tied = values == threshold
        room = room - (best > threshold).sum(-1, keepdim=True)
        chosen &= ~tied | (tied.cumsum(-1, dtype=torch.int32) <= room)
    if forced is not None:
        chosen |= forced[:, None]
    return _positions(chosen.reshape(-1, N), k).view(*scores.shape[:-1], k)


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    tail_start: Tensor,
    kv_len: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gathers each row's listed keys and tail into one small buffer and attends to that."""
    B, Hq, T, D = query.shape
    Hkv = key.shape[1]
    if B == T == 1 and indices.numel() and _within(indices, start := int(tail_start)):
        # A draft step of one row, by far the commonest call: 51 us instead of 63 for 80 keys.
        keys, values = gather_with_tail(key, value, indices, slice(start, max(start, int(kv_len))))
        rows = query.view(1, Hkv, Hq // Hkv, D)
        return unpack(query, *attend(rows, keys, values, None, scale, softcap), sinks)
    slots, empty, tail = _slots(indices, tail_start, kv_len)
    if slots.numel() == 0:
        return nothing_seen(query, sinks)
    keys, values = gather(key, value, slots, empty)
    rows = query.reshape(B, Hkv, Hq // Hkv * T, D)
    if T == 1 and empty is None:
        return unpack(query, *attend(rows, keys, values, None, scale, softcap), sinks)

    hidden = slots.new_zeros(B, Hkv, Hq // Hkv, T, slots.shape[-1], dtype=torch.bool)
    query_at = kv_len[:, None] + torch.arange(-T, 0, device=query.device)
    ahead = tail[:, None] > query_at[..., None]  # [B, T, tail]
    hidden[..., slots.shape[-1] - tail.shape[-1] :] = ahead[:, None, None]
    if empty is not None:
        hidden |= empty[:, :, None, None]
    hidden = hidden.view(B, Hkv, Hq // Hkv * T, -1)
    bias = torch.zeros_like(hidden, dtype=query.dtype).masked_fill_(hidden, -INF)
    out, lse = attend(rows, keys, values, bias, scale, softcap)
    # The fused kernel reports a lse of 0 for a row that sees nothing.
    blind = hidden.all(-1)
    out, lse = out.masked_fill_(blind[..., None], 0), lse.masked_fill(blind, -INF)
    return unpack(query, out, lse, sinks)


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
    ranges = _ranges(kv_len, kv_start, query.shape[2], window)
    if len(set(ranges)) == 1:
        return _verify_range(query, key, value, *ranges[0], window, scale, softcap, sinks)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    for b, (low, high) in enumerate(ranges):
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
    ranges = _ranges(kv_len, kv_start, T, window)
    parts = [slice(0, B)] if len(set(ranges)) == 1 else [slice(b, b + 1) for b in range(B)]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    for rows, (low, high) in zip(parts, ranges):
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


def _ranges(
    kv_len: Tensor, kv_start: Tensor | None, T: int, window: int | None
) -> list[tuple[int, int]]:
    """First key any query of the row sees and one past the last; high <= low if none."""
    highs = kv_len.tolist()
    lows = [0] * len(highs) if kv_start is None else kv_start.tolist()
    if window is not None:
        lows = [max(low, high - T - window + 1) for low, high in zip(lows, highs, strict=True)]
    return list(zip(lows, highs, strict=True))


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


def _slots(
    indices: Tensor, tail_start: Tensor, kv_len: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What to gather: positions [B, Hkv, S], which are empty (None: none), the tail part [B, L].

    The tail part is as long as the longest tail and runs on where a row's own is shorter.
    """
    Hkv = indices.shape[1]
    starts, ends = tail_start.tolist(), kv_len.tolist()
    lengths = [max(0, end - start) for start, end in zip(starts, ends, strict=True)]
    tail = tail_start[:, None] + torch.arange(max(lengths, default=0), device=indices.device)
    empty = torch.zeros_like(indices, dtype=torch.bool)
    holes = indices.numel() > 0 and not _within(indices, min(starts))
    if holes:
        # select_topk pads at the end: cut off what no row uses, and often no hole is left.
        empty = (indices < 0) | (indices >= tail_start[:, None, None])
        used = (~empty).flatten(0, 1).any(0).nonzero()
        K = int(used[-1]) + 1 if len(used) else 0
        indices, empty = indices[..., :K], empty[..., :K]
        holes = bool(empty.any())
    slots = torch.cat((indices, tail[:, None].expand(-1, Hkv, -1)), dim=-1)
    if not holes and len(set(lengths)) <= 1:
        return slots, None, tail
    beyond = (tail >= kv_len[:, None])[:, None].expand(-1, Hkv, -1)
    return slots, torch.cat((empty, beyond), dim=-1), tail


def _within(indices: Tensor, stop: int) -> bool:
    """Whether all indices lie in 0 <= index < stop; one op, where comparing takes six."""
    low, high = indices.aminmax()
    return int(low) >= 0 and int(high) < stop


def _positions(chosen: Tensor, k: int) -> Tensor:
    """Ascending positions of the True entries of each row, padded at the end with -1."""
    counts = chosen.sum(-1)
    found = chosen.nonzero()  # row-major, so already in order
    if bool((counts == k).all()):
        return found[:, 1].to(torch.int32)
    row = found[:, 0]
    slot = torch.arange(len(found), device=chosen.device) - (counts.cumsum(0) - counts)[row]
    result = torch.full((len(chosen), k), -1, dtype=torch.int32, device=chosen.device)
    result[row, slot] = found[:, 1].to(torch.int32)
    return result

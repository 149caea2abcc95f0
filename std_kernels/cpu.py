"""The ops in plain PyTorch for CPU users: fast, in float32 or the inputs' own precision.

Those of verify_attention are in `cpu_verify`. All run on any device. None loops over keys one by
one, copies K/V per query head, or holds more than about `MAX_LOGITS` logits at once, and nothing
outside a row's range is ever read: a stale NaN times a weight of zero would still be NaN. Lengths
are read on the host, so on a GPU every op synchronises. The argument order is that of the op
schemas.
"""

import torch
from torch import Tensor

from std_kernels._packed import (
    INF,
    MAX_LOGITS,
    attend,
    gather,
    gather_with_tail,
    logits,
    nothing_seen,
    ranges,
    unpack,
)


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
    for b, (low, high) in enumerate(ranges(kv_len, kv_start, W, None)):
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


def renew_importance(importance: Tensor, scores: Tensor, stop: Tensor, fade: float) -> None:
    """Layer by layer, so that what a layer's passes share stays in a cache."""
    S = importance.shape[-1]
    stops = [min(end, S) for end in stop.tolist()]
    alike = len(set(stops)) == 1
    parts = [slice(0, len(stops))] if alike else [slice(b, b + 1) for b in range(len(stops))]
    for rows, end in zip(parts, stops):
        for own, newest in zip(importance[:, rows, :, :end], scores[:, rows, :, :end]):
            share = torch.div(newest, newest.sum(dim=-1, keepdim=True).clamp_(min=1e-30))
            torch.fmax(own.mul_(fade), share, out=own)


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

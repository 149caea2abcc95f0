"""verify_attention in plain PyTorch for CPU users; see `cpu` for what its ops have in common.

A token has the same bits whatever it is computed with. Its keys are cut at places that follow
from its own position alone, counted from `kv_start` (o the token, . unseen):

                       past, all seen        own block
    no window    |------------------------|----o.......|
    window       |..----|-----------------|----o.......|
                first block

The past is read where it lies. The first and own blocks are copied and masked, with zeros from
`kv_len` on, where there may be NaN. Tokens with the same cuts go together. What then could still
differ is how a matrix product adds up; see `_blocks`.
"""

from functools import lru_cache

import torch
from torch import Tensor

from std_kernels._blocks import attend_rows, merge
from std_kernels._packed import (
    INF,
    MAX_LOGITS,
    laid_out,
    logits,
    nothing_seen,
    out_like,
    ranges,
)

# A call whose tokens lie on both sides of a border reads the past twice, at T 8 one in 18; blocks
# half as long would make it one in 9, longer ones take longer to copy.
BLOCK = 128
_LONG = 1024  # keys: from here on an odd number of KV heads halves them


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
    """One pass when all rows share a range and lie evenly in memory, else one a row."""
    limits = ranges(kv_len, kv_start, query.shape[2], None)
    options = (window, scale, softcap, sinks)
    if len(set(limits)) == 1 and _even(key) and _even(value):
        low, high = limits[0]
        out, lse = _verify_range(query, key, value, low, high, *options)
        return laid_out(out), lse
    out = out_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    for b, (low, high) in enumerate(limits):
        row = slice(b, b + 1)
        out[row], lse[row] = _verify_range(query[row], key[row], value[row], low, high, *options)
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
    scores: Tensor,
) -> tuple[Tensor, Tensor]:
    """verify_attention, and scores that cannot change its results: a second pass over the keys."""
    out, lse = verify_attention(query, key, value, kv_len, kv_start, window, scale, softcap, sinks)
    # +inf switches a row off. The finite floor keeps a masked logit less it at -inf, not NaN.
    cut = score_lse.nan_to_num(nan=INF, posinf=INF, neginf=torch.finfo(torch.float32).min)
    B = len(query)
    limits = ranges(kv_len, kv_start, query.shape[2], window)
    parts = [slice(0, B)] if len(set(limits)) == 1 else [slice(b, b + 1) for b in range(B)]
    for rows, (low, high) in zip(parts, limits):
        given = query[rows], key[rows], cut[rows]
        _score_range(scores[rows], *given, low, high, window, scale, softcap)
    return out, lse


def _even(cache: Tensor) -> bool:
    """Whether batch and KV heads [B, Hkv] can be seen as one dimension without a copy."""
    return cache.shape[0] <= 1 or cache.stride(0) == cache.shape[1] * cache.stride(1)


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
    """Attention of queries that are the last T of positions low to high."""
    T = query.shape[2]
    seen = min(T, max(0, high - low))
    if not seen or not len(query):
        return nothing_seen(query, sinks)
    keys, values = _in_a_row(key), _in_a_row(value)
    outs, lses = [], []
    if seen < T:
        # The first queries stand before the range.
        out, lse = nothing_seen(query[:, :, : T - seen], sinks)
        outs, lses = [out], [lse]
    begin, position = T - seen, high - low - seen
    while begin < T:
        end = begin + _same_cuts(position, T - begin, window)
        rows = query if end - begin == T else query[:, :, begin:end]
        out, lse = _verify_alike(
            rows, keys, values, low, high, position, window, scale, softcap, sinks
        )
        outs.append(out)
        lses.append(lse)
        begin, position = end, position + end - begin
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 2), torch.cat(lses, 2))


def _same_cuts(position: int, most: int, window: int | None) -> int:
    """How many tokens from `position` on have its cuts."""
    count = min(most, BLOCK - position % BLOCK)
    if window is None:
        return count
    first = position - window + 1
    # Those that see the first key of all have no first block.
    return min(count, BLOCK - first % BLOCK if first > 0 else 1 - first)


def _verify_alike(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    low: int,
    high: int,
    position: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention of tokens with the same cuts, of which the first is at `position` from low on."""
    B, Hq, T, D = query.shape
    BH = len(keys)
    rows = query.reshape(BH, 1, -1, D)
    own = position - position % BLOCK
    bias = _later(BLOCK, query.dtype, query.device).narrow(0, position - own, T)
    first = 0 if window is None else max(0, position - window + 1)
    start = first - first % BLOCK
    starts = [low + own]
    if first > 0:
        before = _earlier(BLOCK, query.dtype, query.device).narrow(0, first - start, T)
        if start == own:
            bias = bias + before
        else:
            bias, starts = torch.cat((before, bias), 1), [low + start, low + own]
            start += BLOCK
    k, v = (_blocks_of(x, starts, high) for x in (keys, values))
    parts = attend_rows(rows, k, v, bias, T, scale, softcap)
    if start < own:
        k, v = (_past(x, low + start, low + own, BH // B) for x in (keys, values))
        parts = attend_rows(rows, k, v, None, T, scale, softcap) + parts
    if sinks is not None:
        sinks = sinks.view(1, -1, 1).expand(B, -1, T).reshape(BH, 1, -1)
    out, lse = merge(parts, sinks)
    out = out.to(query.dtype).reshape(query.shape).contiguous()
    return out, lse.reshape(query.shape[:3]).contiguous()


def _in_a_row(cache: Tensor) -> Tensor:
    """[B, Hkv, N, D] as [B * Hkv, 1, N, D]."""
    return cache.transpose(0, 1) if len(cache) == 1 else cache.flatten(0, 1).unsqueeze(1)


def _blocks_of(source: Tensor, starts: list[int], high: int) -> Tensor:
    """Copies of the blocks of [BH, 1, N, D] that begin here, one after another, zero from high."""
    pieces = [source.narrow(2, start, min(BLOCK, high - start)) for start in starts]
    lacking = starts[-1] + BLOCK - high
    if lacking > 0:
        pieces.append(source.new_zeros(len(source), 1, lacking, source.shape[3]))
    return torch.cat(pieces, 2)


def _past(source: Tensor, start: int, end: int, Hkv: int) -> Tensor:
    """Positions start to end of [BH, 1, N, D] as [BH, H, n, D], in two halves where that pays.

    One to a thread: of 3 KV heads on two threads the last would occupy one alone.
    """
    seen = source.narrow(2, start, end - start)
    return seen.squeeze(1).unflatten(1, (2, -1)) if Hkv % 2 and end - start >= _LONG else seen


@lru_cache(maxsize=8)
def _later(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size, size]: -inf where a key of a block comes after the row's, else 0."""
    return torch.full((size, size), -INF, dtype=dtype, device=device).triu_(1)


@lru_cache(maxsize=8)
def _earlier(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size, size]: -inf where a key of a block comes before the row's, else 0."""
    return torch.full((size, size), -INF, dtype=dtype, device=device).tril_(-1)


def _causal_bias(T: int, n: int, window: int | None, like: Tensor) -> Tensor | None:
    """0 where query t of the last T of n positions sees a key, else -inf: [T, n], or None."""
    if T == 1 and (window is None or n <= window):
        return None
    bias = like.new_full((T, n), -INF).triu_(n - T + 1)
    if window is not None and n > window:
        bias += like.new_full((T, n), -INF).tril_(n - T - window)
    return bias


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
        scores.zero_()
        return
    scores[..., :low].zero_()
    scores[..., high:].zero_()
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

"""What each op must give: std_kernels.reference in float64, a part of the inputs at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.kernels.points import SORTED_AT_ONCE
from std_kernels import reference

# A mask of listed keys has K * N entries a KV head; with more, the listed keys are copied out.
MOST_LISTED = 1 << 26
FLOORS = {torch.float32: 2.0**-17, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def excess(got: Tensor, exact: Tensor, plain_error: float, floor: float) -> float:
    """Error over what is allowed: twice plain torch's at the same precision, and a floor."""
    if got.shape != exact.shape or got.isnan().any():
        return math.inf
    error = float((got.double() - exact).abs().max())
    return error / (2 * plain_error + floor) if error else 0.0


def rows_of(batch: int) -> list[int]:
    """The rows that are compared: float64 takes too long for all of a large batch."""
    return sorted({0, batch // 2, batch - 1})


@dataclass
class Attention:
    """Right results of an attention op, for some rows of the batch, and how to compare.

    Attributes:
        rows: of the batch.
        out, lse: float64 ``[rows, Hq, T, D]`` and ``[rows, Hq, T]``.
        scores: float64 ``[rows, Hkv, N]``, or None.
        plain_error: the largest error of `out` in plain torch at the inputs' precision.
    """

    rows: list[int]
    out: Tensor
    lse: Tensor
    scores: Tensor | None
    plain_error: float
    dtype: torch.dtype

    def of_ours(self, out: Tensor, lse: Tensor, scores: Tensor | None = None) -> float:
        worst = max(self.of_rival(out), self._lse(lse))
        if scores is not None:
            assert self.scores is not None
            worst = max(worst, excess(scores[self.rows], self.scores, 0.0, 1e-4))
        return worst

    def of_rival(self, out: Tensor, causal: bool = True) -> float:
        """Of ``[B, Hq, T, D]``. Without a mask only the last token sees what it should."""
        first = 0 if causal else self.out.shape[2] - 1
        exact = self.out[:, :, first:]
        floor = FLOORS[self.dtype] * min(1.0, float(exact.abs().max()))
        return excess(out[self.rows, :, first:], exact, self.plain_error, floor)

    def _lse(self, lse: Tensor) -> float:
        # In half precision the CPU path's is good to half a unit of the inputs' last place.
        half = self.lse.device.type == "cpu" and self.dtype != torch.float32
        floor = FLOORS[self.dtype] * float(self.lse.abs().max()) if half else 1e-4
        return excess(lse[self.rows], self.lse, 0.0, floor)


def dense(
    query: Tensor, key: Tensor, value: Tensor, kv_len: Tensor, guess: Tensor | None
) -> Attention:
    """Of verify_attention; with `guess` [B, Hq, T] also the scores."""
    G = query.shape[1] // key.shape[1]
    found, scores = _Found(query), []
    for b in found.rows:
        totals: Tensor | None = None
        for hq in range(query.shape[1]):
            q, h = query[b, hq][None, None], hq // G
            k, v = key[b, h][None, None], value[b, h][None, None]
            length = kv_len[b : b + 1]
            with torch.device(query.device):
                exact = reference.verify_attention(q, k, v, length)
                plain = reference.verify_attention(q, k, v, length, dtype=query.dtype)
                found.keep(exact, plain)
                if guess is None:
                    continue
                part = reference.verify_attention_with_scores(
                    q, k, v, length, guess[b, hq][None, None]
                )[2]
            totals = part if hq % G == 0 else totals + part
            if hq % G == G - 1:
                scores.append(totals)
    return found.attention(None if guess is None else scores)


def sparse(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, tail_start: Tensor, kv_len: Tensor
) -> Attention:
    """Of sparse_attention."""
    G, K = query.shape[1] // key.shape[1], indices.shape[2]
    found = _Found(query)
    for b in found.rows:
        for hq in range(query.shape[1]):
            h = hq // G
            k, v, listed = key[b, h][None, None], value[b, h][None, None], indices[b, h]
            start, length = tail_start[b : b + 1], kv_len[b : b + 1]
            if K * key.shape[2] > MOST_LISTED:
                # The same keys in a cache that holds no others.
                kept = torch.cat((listed.long(), torch.arange(int(start), int(length),
                                                              device=key.device)))  # fmt: skip
                k, v = k[:, :, kept], v[:, :, kept]
                listed = torch.arange(K, dtype=torch.int32, device=key.device)
                start, length = torch.full_like(start, K), torch.full_like(length, len(kept))
            given = query[b, hq][None, None], k, v, listed[None, None], start, length
            with torch.device(query.device):
                exact = reference.sparse_attention(*given)
                found.keep(exact, reference.sparse_attention(*given, dtype=query.dtype))
    return found.attention(None)


class _Found:
    """Collects results a query head at a time."""

    def __init__(self, query: Tensor):
        self.query, self.rows = query, rows_of(len(query))
        self.outs: list[Tensor] = []
        self.lses: list[Tensor] = []
        self.plain_error = 0.0

    def keep(self, exact: tuple[Tensor, Tensor], plain: tuple[Tensor, Tensor]) -> None:
        self.outs.append(exact[0])
        self.lses.append(exact[1])
        self.plain_error = max(self.plain_error, float((plain[0] - exact[0]).abs().max()))

    def attention(self, scores: list[Tensor] | None) -> Attention:
        shape = len(self.rows), self.query.shape[1]
        return Attention(
            self.rows,
            torch.cat(self.outs).squeeze(1).unflatten(0, shape),
            torch.cat(self.lses).squeeze(1).unflatten(0, shape),
            None if scores is None else torch.cat(scores).squeeze(1).unflatten(
                0, (len(self.rows), -1)
            ),
            self.plain_error,
            self.query.dtype,
        )  # fmt: skip


def score_keys(query: Tensor, key: Tensor, kv_len: Tensor, got: Tensor) -> float:
    """The error of `got` over what is allowed."""
    G, worst = query.shape[1] // key.shape[1], 0.0
    for b in rows_of(len(query)):
        for h in range(key.shape[1]):
            parts, plains = [], []
            for hq in range(h * G, h * G + G):
                given = query[b, hq][None, None], key[b, h][None, None], kv_len[b : b + 1]
                with torch.device(query.device):
                    parts.append(reference.score_keys(*given))
                    plains.append(reference.score_keys(*given, dtype=torch.float32))
            exact, plain = (torch.stack(x).mean(0) for x in (parts, plains))
            error = float((plain - exact).abs().max())
            worst = max(worst, excess(got[b : b + 1, h : h + 1], exact, error, 1e-6))
    return worst


def int4_linear(given: Tensor, values: Tensor, scales: Tensor, got: Tensor) -> float:
    """The error of `got` [R, N] over what is allowed: twice that of rounded weights' product."""
    worst, size = 0.0, 4096  # rows of the weight at a time
    rows = given.bfloat16()  # what it works in
    for first in range(0, len(values), size):
        part = slice(first, first + size)
        with torch.device(given.device):
            exact = reference.int4_linear(rows, values[part], scales[:, part])
            plain = reference.int4_linear(
                rows, values[part], scales[:, part], dtype=torch.bfloat16
            )
        error = float((plain.double() - exact).abs().max())
        worst = max(worst, excess(got[:, part], exact, error, FLOORS[torch.bfloat16]))
    return worst


def select_topk(scores: Tensor, k: int, got: Tensor) -> float:
    """0 if `got` is exact, else infinity: every row by a stable sort, some by the reference.

    Random floats tie: torch.topk may take any of the equals, a stable sort takes the first.
    """
    rows, found = scores.flatten(0, -2), got.flatten(0, -2)
    N = rows.shape[1]
    if found.shape != (len(rows), k):
        return math.inf
    for part, indices in zip(*(x.split(max(1, SORTED_AT_ONCE // N)) for x in (rows, found))):
        order = part.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        if not torch.equal(indices, order.sort(dim=-1).values.to(torch.int32)):
            return math.inf
    some = sorted({0, len(rows) // 2, len(rows) - 1})
    with torch.device(scores.device):
        exact = reference.select_topk(rows[some][None], k)
    return 0.0 if torch.equal(found[some][None], exact) else math.inf

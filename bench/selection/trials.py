"""Re-selection by the rules that `bench selection` tries: one row on the CPU, as hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.selection.rules import Rule
from std_decode.model import attention, cache
from std_decode.passes import pool
from std_decode.passes.engine import Engine
from std_kernels import verify_attention

SLOW = 0.25  # weight of the newest round in the running mean of acceptance


class _Layer(cache.BufferLayer):
    """Keeps each verified row's scores until it is known which rows were right."""

    rule: Rule
    dense_lse: Any = None

    def lse_estimate(self) -> Any:
        return self  # for `_verify_with_rows`, which asks further

    def row_estimate(self, lse: Tensor) -> Tensor:
        if self.rule.estimate == "exact":
            return lse
        estimate = super().lse_estimate()
        if self.rule.estimate == "max" and self.dense_lse is not None:
            estimate = torch.maximum(estimate, self.dense_lse)
        return estimate

    def weigh(self, scores: Tensor) -> None:
        self.row_scores = scores

    def fold(self, agreed: int) -> None:
        """Renew the importance, knowing that `agreed` drafts were accepted."""
        rule, count = self.rule, self.row_scores.shape[2]
        rows = {
            "all": range(count),
            "bonus": [count - 1],
            "ends": [0, count - 1],
            "accepted": range(agreed + 1),
            "accepted+bonus": sorted({*range(agreed + 1), count - 1}),
            "newest": [agreed],
        }[rule.rows]
        share = self.row_scores[:, :, list(rows)].sum(2)
        share /= share.sum(-1, keepdim=True).clamp_(min=1e-30)
        self.importance *= rule.fade
        if rule.smoothing == "mean":
            self.importance += (1 - rule.fade) * share
        else:
            torch.maximum(self.importance, share, out=self.importance)


def _verify_with_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_len: Tensor,
    layer: _Layer,
    scores: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """verify_attention_with_scores, but new scores [1, Hkv, T, prompt] by row."""
    out, lse = verify_attention(query, key, value, kv_len, **options)
    heads, prompt = key.shape[1], layer.importance.shape[-1]
    rows = query.unflatten(1, (heads, -1))  # [1, Hkv, G, T, D]
    logits = options["scale"] * rows @ key[:, :, None, :prompt].transpose(-1, -2)
    logits -= layer.row_estimate(lse).unflatten(1, (heads, -1))[..., None]
    layer.dense_lse = lse[..., -1:]
    exponential = layer.rule.estimate in ("exact", "clamp")
    share = logits.clamp_(max=0).exp_() if exponential else logits.sigmoid_()
    return out, lse, share.sum(2)


class _Engine(Engine):
    """Re-selects by `rule`."""

    rule: Rule
    mean, rejected, rejected_before = 1.0, False, False
    rounds = 0

    def start(self, *arguments: Any, **options: Any) -> None:
        super().start(*arguments, **options)
        self.one_read = False  # `_verify_with_rows` has to see each verification
        for layer in self.cache.layers:
            layer.rule = self.rule

    def verify(self, tokens: Tensor, *arguments: Any) -> Tensor:
        logits = super().verify(tokens, *arguments)
        drafts = tokens.shape[1] - 1
        if self.reselects and drafts:
            right = tokens[:, 1:] == logits[:, :-1].argmax(-1)
            agreed = int(right.long().cumprod(1).sum())
            self.rounds += 1
            self.rejected_before, self.rejected = self.rejected, agreed < drafts
            self.mean += SLOW * (agreed / drafts - self.mean)
            if self.takes_scores():
                for layer in self.cache.selecting_layers:
                    layer.fold(agreed)
        return logits

    def renew(self) -> None:
        """Not before it is known which rows were right, see `verify`."""

    def takes_scores(self) -> bool:
        if self.rule.when == "alternate":
            return self.rounds % 2 == 0
        return self.rule.when != "lagged" or self.rejected_before

    def select(self, selection: Any) -> None:
        when = self.rule.when
        due = isinstance(when, str) and self.takes_scores()
        if when == "rejected":
            due = self.rejected
        if isinstance(when, float):
            due = self.mean < when
        if self.rounds == 0 or due:
            super().select(selection)


@contextmanager
def following(rule: Rule | None) -> Iterator[None]:
    """Have patched models re-select by `rule`; None: by the library's own."""
    with ExitStack() as stack:
        if rule is not None and rule.when != "never":
            engine = type("_RuledEngine", (_Engine,), {"rule": rule})
            stack.enter_context(patch.object(pool, "Engine", engine))
            stack.enter_context(patch.object(cache, "BufferLayer", _Layer))
            stack.enter_context(
                patch.object(attention, "verify_attention_with_scores", _verify_with_rows)
            )
        yield

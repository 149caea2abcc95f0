"""Logits processors that remember earlier calls, as drafts may go through them: by a copy."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

# Processors whose calls are known to change nothing but these attributes of their own, and how to
# have another one's. Of any other class a call might change what a copy shares with the original:
# something global, a file, the state of a server.
_STATE: dict[str, dict[str, Callable[[Any], Any]]] = {
    "transformers.generation.logits_process.SynthIDTextWatermarkLogitsProcessor": {
        "state": deepcopy
    },
    "transformers.generation.logits_process.WatermarkLogitsProcessor": {
        "rng": lambda rng: torch.Generator(rng.device)  # seeded before each use
    },
    "xgrammar.contrib.hf.LogitsProcessor": {
        "matchers": lambda matchers: [matcher.fork() for matcher in matchers],
        "token_bitmask": deepcopy,
    },
}


class DraftProcessors:
    """The processors that drafts go through, in their order.

    The caller's own get no call of ours. One that is not `stateless` is stood in for by a copy of
    it as it is when a round begins, which is thrown away with the drafts; where there is no copy
    its effect on drafts is missed.

    Args:
        processors: of the call.
        stateless: types that can be called with any text.
    """

    def __init__(self, processors: LogitsProcessorList, stateless: frozenset[type]):
        self.stateless = stateless
        self.processors = [p for p in processors if type(p) in stateless or _copies(p)]
        self.round = LogitsProcessorList()

    def begin(self) -> None:
        """Begin a round at the text that the caller's processors have seen."""
        self.round = LogitsProcessorList()
        for processor in tuple(self.processors):
            try:
                self.round.append(self._stand_in(processor))
            except Exception:  # in the caller's code; then there is no copy
                self.processors.remove(processor)

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Scores of the next draft, float32 ``[B, V]``; `logits` are left as they are."""
        try:
            return self.round(input_ids, _scores(logits, input_ids))
        except Exception:
            # A copy failed on a draft. If the caller's own fails on the text, it does so itself.
            self.processors = [p for p in self.processors if type(p) in self.stateless]
            self.begin()
            return self.round(input_ids, _scores(logits, input_ids))

    def _stand_in(self, processor: Any) -> Any:
        return processor if type(processor) in self.stateless else _copy(processor)


def _copies(processor: Any) -> bool:
    return callable(getattr(type(processor), "clone", None)) or _name(processor) in _STATE


def _copy(processor: Any) -> Any:
    """Another processor that goes on from where this one is."""
    if callable(getattr(type(processor), "clone", None)):
        other = processor.clone()
        if other is processor:
            raise ValueError(f"clone() of {_name(processor)} returned the processor itself")
        return other
    other = copy(processor)
    for attribute, fork in _STATE[_name(processor)].items():
        setattr(other, attribute, fork(getattr(processor, attribute)))
    return other


def _name(processor: Any) -> str:
    return f"{type(processor).__module__}.{type(processor).__qualname__}"


def _scores(logits: Tensor, input_ids: Tensor) -> Tensor:
    return logits.to(copy=True, dtype=torch.float32, device=input_ids.device)

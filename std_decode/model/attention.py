"""A layer's attention in a pass: the model's own at prefill, sparse to draft, dense to verify."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from std_decode.model import one_read
from std_decode.model.alone import each_alone
from std_decode.model.cache import BufferLayer, SparseToDenseCache
from std_decode.model.running_pass import Pass
from std_decode.model.selection_rules import Selection
from std_kernels import (
    score_keys,
    sparse_attention,
    verify_attention,
    verify_attention_with_scores,
)

Result = tuple[Tensor, Tensor | None]  # [B, T, Hq, D], and what a model's own attention adds


@dataclass(eq=False)
class Attending:
    """One layer's attention in a pass: what a model's attention module called for.

    Attributes:
        replaced: the name of the implementation that ours stands in for.
        key, value: at prefill of the tokens so far, afterwards the whole buffers.
        given: all else that the module said, by name.
    """

    running: Pass
    module: nn.Module
    replaced: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    given: dict[str, Any]

    @property
    def dense(self) -> Callable[..., Result]:
        """The function that the module would have called."""
        return attention_function(self.module, self.replaced)

    @property
    def layer(self) -> BufferLayer:
        return self.running.cache.layers[self.module.layer_idx]

    @property
    def options(self) -> dict[str, Any]:
        """What changes the logits (Gemma 2 has soft caps, gpt-oss sinks), as the ops name it."""
        sinks = self.given.get("s_aux")
        return {
            "scale": self.given.get("scaling"),
            "softcap": self.given.get("softcap"),
            "sinks": None if sinks is None else sinks.to(self.query.device, torch.float32),
        }

    @property
    def is_plain(self) -> bool:
        """Whether nothing but a scale changes the logits."""
        return self.given.get("s_aux") is None and self.given.get("softcap") is None

    @property
    def scored(self) -> bool:
        """Whether this verification hands out scores of the prompt's keys."""
        return self.running.rescore and self.layer.window is None

    def first_seen(self, length: int) -> int:
        """The first position that the `length`-th token of a row sees."""
        window = self.layer.window
        return 0 if window is None else max(0, length - window)

    def __call__(self) -> Result:
        running, query = self.running, self.query
        if running.phase == "prefill":
            if running.selection is not None and self.layer.window is None:
                voters = self.layer.voters(query, running.selection.window, running.partial)
                if not running.partial:
                    scores = _score_prompt(
                        running.cache, running.selection, voters, self.key, self.options
                    )
                    self.layer.weigh_prompt(scores, query.shape[1])
                    self.layer.choose(running.selection, self.key, self.value)
            return self.dense(self.module, query, self.key, self.value, self.mask, **self.given)
        if one_read.fits(self):
            result = one_read.attend(self), None
        elif running.alone is not None:
            result = each_alone(self, running.alone)
        else:
            attend = _draft if running.phase == "draft" else _verify
            result = attend(self).transpose(1, 2).contiguous(), None
        if running.rescore and self.layer.one_by_one:
            self.layer.reselect(self.key, self.value)
        return result


def attention_function(module: nn.Module, name: str) -> Callable[..., Result]:
    """The function `module` would call under `name`; eager ones live in the model's own file."""
    file = sys.modules[type(module).__module__]
    interface = getattr(file, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    return interface.get_interface(name, getattr(file, "eager_attention_forward", None))


def _score_prompt(
    cache: SparseToDenseCache, selection: Selection, query: Tensor, key: Tensor, options: dict
) -> Tensor:
    if cache.order is not None:
        key = key.take_along_dim(_on(query, cache.order)[:, None, :, None], dim=2)
    return score_keys(
        query,
        key,
        _on(query, cache.span.kv_len),
        kv_start=_on(query, cache.kv_start),
        num_queries=_on(query, selection.observers),
        **options,
    )


def _draft(attending: Attending) -> Tensor:
    layer, query = attending.layer, attending.query
    if layer.window is not None:
        return _verify(attending)
    out, lse = sparse_attention(
        query,
        attending.key,
        attending.value,
        *(_on(query, tensor) for tensor in layer.listed()),
        **attending.options,
    )
    layer.note_lse(lse)
    return out


def _verify(attending: Attending) -> Tensor:
    layer, query, cache = attending.layer, attending.query, attending.running.cache
    tensors = query, attending.key, attending.value, _on(query, cache.span.kv_len)
    kv_start = _on(query, cache.kv_start)
    if attending.scored:
        room = layer.scores
        out, _, scores = verify_attention_with_scores(
            *tensors,
            layer.lse_estimate(),
            kv_start=kv_start,
            scores=room,
            **attending.options,
        )
        if scores is not room:  # not this library's op
            layer.weigh(scores)
        return out
    out, _ = verify_attention(
        *tensors, kv_start=kv_start, window=layer.window, **attending.options
    )
    return out


def _on(query: Tensor, tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.to(query.device)

"""What a layer's inputs are like, column by column, on a text that the model itself makes up.

Few columns of a transformer's states are far larger than the others, and many have a mean that is
not 0, so that errors of the weights they are multiplied with add up. A text that the model writes
from random tokens on shows both and needs no data; on random tokens alone the means are others.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from std_decode.model.cache import CACHE
from std_decode.model.running_pass import uncompiled

TEXTS, TOKENS = 8, 16  # of each text; a random one before them is not counted
_PRIOR = 8  # tokens' worth of columns being alike, for experts that few tokens reach


class Moments(NamedTuple):
    """Of a layer's inputs ``[K]``, in units in which the mean of `squares` is 1.

    Attributes:
        squares: mean squares of each column, float32 ``[K]``, positive.
        mean: of each column, float32 ``[K]``.
    """

    squares: Tensor
    mean: Tensor


class _Sums:
    """Of what layers are given, by layer: squares, values, and how many tokens."""

    def __init__(self) -> None:
        self.found: dict[nn.Module, tuple[Tensor, Tensor, int]] = {}

    def note(self, layer: nn.Module, args: tuple) -> None:
        given = args[0].detach().float().flatten(0, -2)
        squares, values, tokens = self.found.get(layer, (0, 0, 0))
        self.found[layer] = (
            squares + given.square().sum(0), values + given.sum(0), tokens + len(given)
        )  # fmt: skip


def input_moments(
    model: Any, layers: list[nn.Linear], device: torch.device | None = None
) -> dict[nn.Module, Moments]:
    """Moments of what `layers` are given while the model writes `TEXTS` texts.

    A layer that is given nothing is missing. Dropout would draw random numbers, so there are none
    of a model in training; torch's own random numbers stay as they are.

    Args:
        device: of the tokens; None: the embedding's.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    device = embedding.device if device is None else device
    if model.training or device.type == "meta" or head is None:
        return {}
    config = model.get_decoder().config
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 + TOKENS
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(len(embedding), (TEXTS, 1), generator=draw)
    cache = DynamicCache(config=config)
    sums = _Sums()
    with ExitStack() as stack, torch.no_grad(), uncompiled():
        for step in range(min(1 + TOKENS, longest)):
            if step == 1:  # a text's first token has states like no other's
                for layer in layers:
                    stack.callback(layer.register_forward_pre_hook(sums.note).remove)
            logits = head(_states(model, ids.to(device), step, cache))
            # Sampled by a race, which needs no sum and goes through where numbers are not finite.
            chances = logits[:, -1].float().softmax(-1).cpu()
            race = torch.empty_like(chances).exponential_(generator=draw)
            ids = (chances / race).argmax(-1, keepdim=True).clamp_(max=len(embedding) - 1)
    return {layer: _scaled(*found) for layer, found in sums.found.items()}


def _states(model: Any, ids: Tensor, position: int, cache: DynamicCache) -> Tensor:
    return model.get_decoder()(
        input_ids=ids,
        position_ids=torch.full_like(ids, position),
        **{CACHE: cache},
        use_cache=True,
    ).last_hidden_state


def _scaled(squares: Tensor, values: Tensor, tokens: int) -> Moments:
    total = squares + _PRIOR * squares.mean() / max(1, tokens)
    mean = total.mean()
    known = torch.isfinite(mean) & (mean > 0)
    return Moments(
        torch.where(known, total / mean, torch.ones_like(total)),
        torch.where(known, values / (tokens * mean).sqrt(), torch.zeros_like(total)),
    )

"""How large a layer's inputs are, column by column, on a text of random tokens.

Few columns of a transformer's states are far larger than the others, whatever is read. Errors of
the weights that these are multiplied with count most, and random tokens, which need no data, show
them.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from std_decode.model.cache import CACHE
from std_decode.model.running_pass import uncompiled

TOKENS = 128
_PRIOR = 8  # tokens' worth of columns being alike, for experts that few tokens reach


def input_moments(model: Any, layers: list[nn.Linear]) -> dict[nn.Module, Tensor]:
    """Mean squares of each column of what `layers` are given, float32 ``[K]``, their mean 1.

    A layer that is given nothing is missing. Dropout would draw random numbers, so there are none
    of a model in training.
    """
    decoder, embedding = model.get_decoder(), model.get_input_embeddings().weight
    if model.training or embedding.device.type == "meta":
        return {}
    config = decoder.config.get_text_config()
    count = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
    ids = torch.randint(len(embedding), (1, count), generator=torch.Generator().manual_seed(0)).to(
        embedding.device
    )
    sums: dict[nn.Module, tuple[Tensor, int]] = {}

    def note(layer: nn.Module, args: tuple) -> None:
        given = args[0].detach().float().flatten(0, -2)
        sums[layer] = given.square().sum(0), len(given)

    with ExitStack() as stack, torch.no_grad(), uncompiled():
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(note).remove)
        states = decoder(
            input_ids=ids,
            position_ids=torch.arange(count, device=ids.device)[None],
            **{CACHE: DynamicCache(config=decoder.config)},
            use_cache=True,
        ).last_hidden_state
    head = model.get_output_embeddings()
    if head in layers:
        note(head, (states,))
    return {layer: _scaled(*found) for layer, found in sums.items()}


def _scaled(total: Tensor, tokens: int) -> Tensor:
    total = total + _PRIOR * total.mean() / max(1, tokens)
    mean = total.mean()
    known = torch.isfinite(mean) & (mean > 0)
    return torch.where(known, total / mean, torch.ones_like(total))

"""The best tokens of a draft, scored again with the LM head's own weights.

The 4-bit LM head need only find the likely tokens: rounding shifts every logit, and where two are
close that decides. 16 rows of the head's own weights are next to nothing beside all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLASSES = 16  # the vocabulary's size is a multiple of it, see `quantize.ROWS`


def rescored(logits: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits of which the largest of each class of tokens is exact.

    Token i is of class i modulo `CLASSES`: one reduction finds the candidates, where a top-k takes
    several, and the true best is lost only to a token of its own class.

    Args:
        logits: by 4-bit weights, ``[..., V]``.
        input: of the LM head, ``[..., K]``.
        weight, bias: its own, ``[V, K]`` and ``[V]``.
    """
    classes = torch.arange(CLASSES, device=logits.device)
    best = logits.unflatten(-1, (-1, CLASSES)).argmax(dim=-2) * CLASSES + classes
    own = (weight[best] @ input[..., None]).squeeze(-1)
    if bias is not None:
        own = own + bias[best]
    return logits.scatter(-1, best, own.to(logits.dtype))

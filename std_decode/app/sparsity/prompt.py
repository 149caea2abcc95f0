"""A prompt that is read once and asked about many times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from std_decode.app.sparsity.measure import GREEDY, Timed, watched
from std_decode.model.cache import CACHE
from std_decode.model.selection_rules import visual_tokens


def with_cache(model: Any, inputs: dict[str, Any], answer: Tensor) -> dict[str, Any]:
    """The same prompt, with all up to its last visual token read already.

    The text after it is left to be read, since its queries are what votes at prefill.

    Args:
        model: unpatched.
        inputs: of one prompt, as generate takes them.
        answer: the dense one, ``[T]``.

    Returns:
        Inputs with a cache, for `watched`; or `inputs` themselves where the prompt has no video
        tokens, or the model does not go on from a cache to the same answer.
    """
    ids = inputs["input_ids"]
    length = ids.shape[1]
    visual = visual_tokens(ids, model.config, inputs.get("mm_token_type_ids"))[0]
    if not visual.any():
        return inputs
    seen = min(int(visual.nonzero().max()) + 1, length - 1)
    by_token = {
        name for name, value in inputs.items() if getattr(value, "shape", None) == ids.shape
    }
    first = {name: v[:, :seen] if name in by_token else v for name, v in inputs.items()}
    cache = DynamicCache(config=model.get_decoder().config)
    try:
        model.generate(**first, **GREEDY, max_new_tokens=1, **{CACHE: cache})
        going_on = {name: inputs[name] for name in by_token} | {CACHE: cache}
        _, told, stats = watched(model, going_on, Timed, len(answer), draft_length=0)
    except Exception:  # whatever a model has against it, reading it all each time remains
        return inputs
    return going_on if torch.equal(told, answer) and stats.reused_tokens == seen else inputs

"""Layers whose result for a token depends on the tokens that are fed with it.

Decoding feeds a token alone, verification among others, so such a layer gives other tokens.
LLM.int8 takes the columns with an outlier in any token out of its quantisation, dynamic int8 may
scale all tokens by the largest. Whether outliers come is up to the prompt, so each such layer is
fed some of its own, whatever the model's are like.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from std_decode.model.cache import CACHE
from std_decode.model.running_pass import uncompiled

# What is known to treat each token by itself. Of transformers, what is not a quantised layer.
_TOKENWISE = {
    *(nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout, nn.Identity, nn.ModuleList),
    *(nn.SiLU, nn.GELU, nn.ReLU, nn.Sigmoid, nn.Tanh),
}
_TOKENWISE_CODE = ("transformers.", "peft.")
_QUANTISED_CODE = "transformers.integrations."
_READ = 7  # tokens that show what the layers are given
_FED, _AT = 5, 2  # tokens fed together, and which of them is looked at
_OUTLIER = 1000.0  # finite in float16, over any threshold


@torch.no_grad()
def mixing_layer(model: PreTrainedModel, device: torch.device, rows: int) -> str | None:
    """Which layer of the decoder or the LM head mixes tokens, in words, or None."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    parts = [decoder] if head is None else [decoder, head]
    suspects = {m: None for part in parts for m in part.modules() if not _is_tokenwise(m)}
    if not suspects:
        return None
    names = {module: name for name, module in model.named_modules()}
    with uncompiled():
        for layer, given in _inputs(decoder, head, list(suspects), device, rows).items():
            with _buffers_kept(layer):
                change = _change(layer, given)
            if change is not None:
                return (
                    f"{names[layer]} ({type(layer).__name__}) gives a token another result when "
                    f"others are fed with it, by {change:.1%}, expected each token's to be its "
                    "own; load the model in a format that scales each token by itself (LLM.int8 "
                    "does with llm_int8_threshold=0.0), or whose activations are not quantised"
                )
    return None


def _is_tokenwise(module: nn.Module) -> bool:
    kind, own = type(module), vars(module)
    known = kind in _TOKENWISE or (
        kind.__module__.startswith(_TOKENWISE_CODE)
        and not kind.__module__.startswith(_QUANTISED_CODE)
    )
    forward = own.get("_old_forward", own.get("forward"))  # the former where accelerate moves it
    replaced = forward is not None and getattr(forward, "__func__", None) is not kind.forward
    plain = all(type(weight) is nn.Parameter for weight in module.parameters(recurse=False))
    return known and plain and not replaced


def _inputs(
    decoder: nn.Module,
    head: nn.Module | None,
    layers: list[nn.Module],
    device: torch.device,
    rows: int,
) -> dict[nn.Module, Tensor]:
    """What those of `layers` that are given the tokens and nothing else get in a pass."""
    given: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        tokens = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(tokens, Tensor) and tokens.is_floating_point():
            if tokens.dim() == 2 or (tokens.dim() > 2 and tokens.shape[1] == _READ):
                given.setdefault(layer, tokens)

    positions = torch.arange(_READ, device=device).repeat(rows, 1)
    inputs = {
        "input_ids": positions % decoder.config.get_text_config().vocab_size,
        "position_ids": positions,
        CACHE: DynamicCache(config=decoder.config),
        "use_cache": True,
    }
    handles = [
        layer.register_forward_pre_hook(note, prepend=True, with_kwargs=True) for layer in layers
    ]
    try:
        states = decoder(**inputs).last_hidden_state
        if head is not None and head in layers:
            head(states)
    finally:
        for handle in handles:
            handle.remove()
    return given


def _change(layer: nn.Module, given: Tensor) -> float | None:
    """How much of a token's result depends on those fed with it; None where rounding may be it.

    The sums of a product of `width` columns round by about the square root of it, in half
    precision: what is quantised computes in no other, whatever its input's dtype.
    """
    axis = 0 if given.dim() == 2 else 1
    width = given.shape[-1]
    eps = max(torch.finfo(dtype).eps for dtype in (given.dtype, torch.float16))
    limit = eps * max(1.0, width**0.5 / 8)
    worst = 0.0
    for token in _tokens(given.select(axis, 0)):
        alike = torch.stack([token] * _FED, dim=axis)
        expected = layer(alike)
        if (
            not isinstance(expected, Tensor)
            or expected.shape[: axis + 1] != alike.shape[: axis + 1]
        ):
            return None
        expected = expected.select(axis, _AT).float()
        results = [layer(token.unsqueeze(axis)).select(axis, 0)]
        for other in (token + _OUTLIER, token.flip(-1) * _OUTLIER):
            among = torch.stack([other] * _FED, dim=axis)
            among.select(axis, _AT).copy_(token)
            results.append(layer(among).select(axis, _AT))
        for result in results:
            change = float((result.float() - expected).norm() / expected.norm().clamp(min=1e-30))
            worst = max(worst, change if change == change else float("inf"))
    return worst if worst > limit else None


def _tokens(like: Tensor) -> Iterator[Tensor]:
    """Two tokens without outliers.

    One has a column that makes all others round to 0 where the token is scaled to 8 bits by its
    largest, and count where that column is taken out.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(like.shape[-1], generator=generator).clamp(-3, 3) / 3
    yield values.to(like).expand_as(like)
    values = values.sign() * (0.49 / 127)
    values[0] = 1.0
    yield values.to(like).expand_as(like)


@contextmanager
def _buffers_kept(layer: nn.Module) -> Iterator[None]:
    """What observers of ranges and the like note of such tokens is undone."""
    before = [(buffer, buffer.clone()) for buffer in layer.buffers() if not buffer.is_meta]
    try:
        yield
    finally:
        for buffer, value in before:
            if not torch.equal(buffer, value):
                buffer.copy_(value)

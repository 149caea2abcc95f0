"""Which models can be patched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from std_decode.admission import rope
from std_decode.admission.implementation import foreign_attention
from std_decode.admission.layers import mixing_layer
from std_decode.admission.trial import Failed, input_device, try_attention
from std_decode.model.cache import CACHE
from std_decode.model.recurrent import recurrent_modules, standing_in

SUPPORTED = (
    "supported are decoder-only generative models of transformers whose layers are causal full or "
    "sliding-window self-attention, or gated delta layers between these, among them Qwen2-VL, "
    "LLaVA-OneVision, Qwen3.5 and Llama"
)
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_KEEP_KEYS, _KEEP_STATE = {DynamicLayer, DynamicSlidingWindowLayer}, {LinearAttentionLayer}
CACHE_LAYERS = _KEEP_KEYS | _KEEP_STATE


def attention_layers(model: PreTrainedModel, rows: int = 1) -> dict[int, nn.Module]:
    """The attention modules of `model`'s text decoder, by `layer_idx`, once it is known eligible.

    Args:
        rows: of the trial that it is run through.

    Raises:
        TypeError: `model` is no generative transformers model.
        NotImplementedError: it is, but not of a supported kind; the message says what is in the
        way.
    """
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise TypeError(
            f"patch: model is {type(model).__name__}, expected a transformers model that can "
            "generate(); load it with a class such as Qwen2VLForConditionalGeneration"
        )
    try:
        _check_kind(model)
        layers = _attention_modules(model)
        foreign = foreign_attention(model, layers)
        if foreign is not None:
            raise Failed(f"{type(model).__name__} {foreign}")
        device = input_device(model)
        with undisturbed(model):
            mixing = mixing_layer(model, device, rows)
            if mixing is not None:
                raise Failed(mixing)
            try_attention(model, layers, rows)
    except Failed as obstacle:
        raise NotImplementedError(f"patch: {obstacle}; {SUPPORTED}") from None
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # code of any model's, and it may look like none of those tested
        raise NotImplementedError(
            f"patch: {type(model).__name__} did not run a trial through the sparse-to-dense "
            f"attention ({type(error).__name__}: {error}); {SUPPORTED}"
        ) from error
    return layers


def _check_kind(model: PreTrainedModel) -> None:
    """Raises `Failed` for what a configuration or a class tells."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise Failed(f"{name} is an encoder-decoder model")
    inner = _generates_with(model)
    if inner is not None:
        raise Failed(
            f"{name} has a generate() of its own that runs the one of its {inner}, expected "
            f"transformers' generate(); patch model.{inner} instead"
        )
    decoder = model.get_decoder()
    if not hasattr(decoder, "config"):
        raise Failed(
            f"{name} gives a {type(decoder).__name__} as its decoder (get_decoder()), expected a "
            "transformers model"
        )
    config, gated = decoder.config, recurrent_modules(decoder)
    named = enumerate(getattr(config, "layer_types", None) or ())
    types = {kind for index, kind in named if index not in gated} - _LAYER_TYPES
    if types:
        raise Failed(f"{name} has layers of type {', '.join(sorted(types))}")
    # Those with a state do take them, and say no for the sake of other engines; the trial tells.
    if not (model._supports_attention_backend or gated):
        raise Failed(
            f"{name} does not take custom attention functions "
            "(_supports_attention_backend is False)"
        )
    cache_layers = DynamicCache(config=config).layers
    found = enumerate(map(type, cache_layers))
    types = {k.__name__ for i, k in found if k not in (_KEEP_STATE if i in gated else _KEEP_KEYS)}
    if types or getattr(config, "attention_chunk_size", None) is not None:
        kinds = ", ".join(sorted(types)) or "chunked attention"
        raise Failed(f"{name} has layers of type {kinds}")
    if len(cache_layers) != config.num_hidden_layers:
        raise Failed(
            f"{name} has {len(cache_layers)} cache layers for {config.num_hidden_layers} decoder "
            "layers, expected one each"
        )
    if not any(type(layer) is DynamicLayer for layer in cache_layers):
        raise Failed(
            f"{name} has sliding-window layers only, so a draft would read as much as dense "
            "decoding does"
        )
    if _makes_its_own_positions(model):
        raise Failed(
            f"{name} numbers its tokens itself (its prepare_inputs_for_generation drops "
            "position_ids), expected generate's position_ids to be taken"
        )


def _attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """By `layer_idx`, in that order. Raises `Failed` where it is not one a decoder layer."""
    decoder = model.get_decoder()
    found = [
        module
        for module in decoder.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "is_causal", False)
        and getattr(module, "config", None) is decoder.config
    ]
    found.sort(key=lambda module: module.layer_idx)
    count = decoder.config.num_hidden_layers
    expected = [index for index in range(count) if index not in recurrent_modules(decoder)]
    if [module.layer_idx for module in found] != expected:
        raise Failed(
            f"{type(model).__name__} has {len(found)} causal attention modules for "
            f"{len(expected)} decoder layers, expected one each"
        )
    return {module.layer_idx: module for module in found}


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """For a trial: without dropout, whichever of its parts are in training mode now and after.

    Its gated delta layers take our cache.
    """
    autocast = torch.autocast(input_device(model).type, enabled=False)
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        decoder = model.get_decoder()
        with rope.unchanged(decoder), standing_in(decoder), autocast:
            yield
    finally:
        for module in training:
            module.training = True


def _generates_with(model: PreTrainedModel) -> str | None:
    """The part of `model` that generates in its place, as BLIP's language models do."""
    generate = type(model).generate
    if getattr(generate, "stands_for", generate) is GenerationMixin.generate:
        return None
    parts = (name for name, part in model.named_modules() if isinstance(part, GenerationMixin))
    return next((name for name in parts if name), None)


def _makes_its_own_positions(model: PreTrainedModel) -> bool:
    """Whether the position ids that generate keeps do not reach the model's passes."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=input_device(model))
    kwargs = {
        "position_ids": torch.arange(2, device=ids.device)[None],
        "attention_mask": torch.ones_like(ids),
        "use_cache": True,
        CACHE: DynamicCache(config=model.get_decoder().config),
    }
    prepare = type(model).prepare_inputs_for_generation  # PEFT may have replaced the instance's
    prepared = prepare(model, ids, next_sequence_length=1, **kwargs)
    return prepared.get("position_ids") is None

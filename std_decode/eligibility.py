"""Which models can be patched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from std_decode.attention import uncompiled
from std_decode.cache import CACHE, BufferLayer, SparseToDenseCache
from std_decode.engine import Engine
from std_decode.layers import mixing_layer
from std_decode.selection import plan_selection
from std_decode.stats import DecodeStats

SUPPORTED = (
    "supported are decoder-only generative models of transformers whose layers are causal full or "
    "sliding-window self-attention, among them Qwen2-VL, LLaVA-OneVision and Llama"
)
_LAYER_TYPES = {"full_attention", "sliding_attention"}
CACHE_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer}


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
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise NotImplementedError(f"patch: {name} is an encoder-decoder model; {SUPPORTED}")
    inner = _generates_with(model)
    if inner is not None:
        raise NotImplementedError(
            f"patch: {name} has a generate() of its own that runs the one of its {inner}, "
            f"expected transformers' generate(); patch model.{inner} instead, or: {SUPPORTED}"
        )
    decoder = model.get_decoder()
    config = decoder.config
    types = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if types:
        kinds = ", ".join(sorted(types))
        raise NotImplementedError(f"patch: {name} has layers of type {kinds}; {SUPPORTED}")
    if not model._supports_attention_backend:
        raise NotImplementedError(
            f"patch: {name} does not take custom attention functions "
            f"(_supports_attention_backend is False); {SUPPORTED}"
        )
    cache_layers = DynamicCache(config=config).layers
    types = {type(layer).__name__ for layer in cache_layers} - {t.__name__ for t in CACHE_LAYERS}
    if types or getattr(config, "attention_chunk_size", None) is not None:
        kinds = ", ".join(sorted(types)) or "chunked attention"
        raise NotImplementedError(f"patch: {name} has layers of type {kinds}; {SUPPORTED}")
    if len(cache_layers) != config.num_hidden_layers:
        raise NotImplementedError(
            f"patch: {name} has {len(cache_layers)} cache layers for {config.num_hidden_layers} "
            f"decoder layers, expected one each; {SUPPORTED}"
        )
    if all(type(layer) is DynamicSlidingWindowLayer for layer in cache_layers):
        raise NotImplementedError(
            f"patch: {name} has sliding-window layers only, so a draft would read as much as "
            f"dense decoding does; {SUPPORTED}"
        )
    if _makes_its_own_positions(model):
        raise NotImplementedError(
            f"patch: {name} numbers its tokens itself (its prepare_inputs_for_generation drops "
            f"position_ids), expected generate's position_ids to be taken; {SUPPORTED}"
        )
    found = [
        module
        for module in decoder.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "is_causal", False)
        and getattr(module, "config", None) is config
    ]
    layers: dict[int, nn.Module] = {module.layer_idx: module for module in found}
    if sorted(module.layer_idx for module in found) != list(range(config.num_hidden_layers)):
        raise NotImplementedError(
            f"patch: {name} has {len(found)} causal attention modules for "
            f"{config.num_hidden_layers} decoder layers, expected one each; {SUPPORTED}"
        )
    with _as_in_evaluation(model), torch.autocast(_input_device(model).type, enabled=False):
        mixing = mixing_layer(model, _input_device(model), rows)
        if mixing is not None:
            raise NotImplementedError(f"patch: {mixing}; {SUPPORTED}")
        _probe(model, decoder, layers, rows)
    return layers


@contextmanager
def _as_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Without dropout, whichever of its parts are in training mode now and after."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
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
    ids = torch.zeros(1, 2, dtype=torch.int64, device=_input_device(model))
    kwargs = {
        "position_ids": torch.arange(2, device=ids.device)[None],
        "attention_mask": torch.ones_like(ids),
        "use_cache": True,
        CACHE: DynamicCache(config=model.get_decoder().config),
    }
    prepare = type(model).prepare_inputs_for_generation  # PEFT may have replaced the instance's
    prepared = prepare(model, ids, next_sequence_length=1, **kwargs)
    return prepared.get("position_ids") is None


@torch.no_grad()
def _probe(
    model: PreTrainedModel, decoder: nn.Module, layers: dict[int, nn.Module], rows: int
) -> None:
    """Run a few tokens through a round of ours and through the model as it is, and compare.

    Additive biases, cross-attention, unequal K and V head dims and whatever else a configuration
    does not tell show here: as an error in our ops, or as a different result.
    """
    name = type(model).__name__
    device = _input_device(model)
    positions = torch.arange(9, device=device).repeat(rows, 1)
    ids = positions % decoder.config.get_text_config().vocab_size
    plain = DynamicCache(config=decoder.config)
    inputs = {"input_ids": ids, "position_ids": positions, CACHE: plain, "use_cache": True}
    with uncompiled():
        expected = decoder(**inputs).last_hidden_state
    for layer in plain.layers:
        keys, values = tuple(layer.keys.shape), tuple(layer.values.shape)
        if keys != values:
            raise NotImplementedError(
                f"patch: {name} caches keys of shape {keys} and values of shape {values}, "
                f"expected equal ones; {SUPPORTED}"
            )
    cache = SparseToDenseCache(decoder.config, 9, batch=rows, device=device, most_drafts=1)
    engine = Engine(decoder.config, layers, cache, reselect=True)
    engine.start(
        lambda **inputs: SimpleNamespace(logits=decoder(**inputs).last_hidden_state),
        DynamicCache(),
        None,
        plan_selection(torch.zeros_like(ids[:, :7], dtype=torch.bool), None, 7, 7),
        DecodeStats(),
    )
    engine.reselects = True  # although every key is selected already, try the scores
    drafted: list[Tensor] = []
    attended: list[BufferLayer] = []
    for layer in cache.selecting_layers:

        def note(lse: Tensor, layer: BufferLayer = layer) -> None:
            attended.append(layer)
            BufferLayer.note_lse(layer, lse)

        layer.note_lse = note  # type: ignore[method-assign]
    expected_calls = cache.selecting_layers

    def choose(states: Tensor, _: int) -> Tensor:
        drafted.append(states[:, None])
        return ids[:, 8]

    try:
        engine.prefill(input_ids=ids[:, :7], position_ids=positions[:, :7])
        _, verified = engine.draft_and_verify(ids[:, 7:8], positions[:, 7:], 1, choose, {})
    except (ValueError, TypeError, RuntimeError) as error:
        raise NotImplementedError(
            f"patch: {name} did not run a trial through the sparse-to-dense attention "
            f"({error}); {SUPPORTED}"
        ) from error
    finally:
        engine.cache.release()
    if attended != expected_calls:
        raise NotImplementedError(
            f"patch: {name} attends {len(attended)} times in {len(expected_calls)} layers, "
            f"expected once in each; {SUPPORTED}"
        )
    got, wanted = torch.cat([*drafted, verified], dim=1), expected[:, [7, 7, 8]]
    difference = (got - wanted).float().abs().max() / expected.float().abs().max()
    # Rounding is far below, also that of a deep model. Where weights are small, a wrong mask or
    # bias need not be far above.
    exact = got.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    limit = 1e-3 if exact else 0.1
    if not difference < limit:
        raise NotImplementedError(
            f"patch: the attention of {name} is not the causal softmax attention that was "
            f"expected (a trial differs by {difference:.1%}); {SUPPORTED}"
        )


def _input_device(model: PreTrainedModel) -> torch.device:
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    if device.type == "meta":  # offloaded by accelerate, which brings weights in for each pass
        device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", "cpu")
    return torch.device(device)

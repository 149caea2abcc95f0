"""Attach sparse-to-dense decoding to one model instance, and detach it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from std_decode.cache import MOST_NEW_TOKENS, SparseToDenseCache
from std_decode.eligibility import attention_layers, fallback_reason, left_padding
from std_decode.loop import Rounds
from std_decode.sampling import Drafter
from std_decode.selection import plan_selection, visual_tokens
from std_decode.stats import DecodeStats

MOST_DRAFTS = 63  # verification takes up to 64 tokens: the pending one and the drafts
AUTO_DRAFT_LENGTH = 4

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class _Patch:
    """What patch leaves on a model instance, as its attribute `_std_decode`."""

    original_class: type
    layers: frozenset[nn.Module]
    top_k_keys: int
    draft_length: int
    reselect: bool
    stats: DecodeStats | None = None


def patch(
    model: Model,
    *,
    top_k_keys: int = 1024,
    draft_length: int | Literal["auto"] = "auto",
    reselect: bool = True,
) -> Model:
    """Make ``model.generate()`` draft with sparse attention and verify densely.

    The answers stay the same: in float32 the tokens of the unpatched model, greedy and sampled
    with the same seed. Only this instance changes, and `unpatch` undoes it. Calls that cannot be
    accelerated (beam search, a cache of your own, ...) run as unpatched; `last_stats` says why.

    Args:
        model: a decoder-only generative transformers model, for instance
            `Qwen2VLForConditionalGeneration`; a `PeftModel` or a compiled model around one is
            looked through.
        top_k_keys: keys of the prompt's video (or of a text-only prompt) that a draft reads per
            layer and KV head, at least 1. The text around the video is read besides.
        draft_length: tokens drafted a round (gamma), 0 to 63; 0 decodes densely. "auto" is 4.
        reselect: whether each verification renews the selection, or the prompt's is kept.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is no generative transformers model, or an argument has the wrong type.
        ValueError: an argument is out of range.
        NotImplementedError: the model's attention is of an unsupported kind; the message lists
            what is supported.
        RuntimeError: `model` is patched already.

    Note:
        Runs two forward passes of a few tokens, to see that the model's attention is what its
        configuration says. Source: Zhang et al., Sparse-to-Dense, ACL 2025,
        doi 10.18653/v1/2025.acl-short.59; re-selection from verification is an addition.
    """
    _check_options(top_k_keys, draft_length, reselect)
    target = _unwrapped(model)
    if is_patched(target):
        raise RuntimeError(
            f"patch: {type(target).__name__} is patched already, expected an unpatched model; "
            "call unpatch(model) first to change the options"
        )
    layers = attention_layers(target)
    original = type(target)
    gamma = AUTO_DRAFT_LENGTH if draft_length == "auto" else draft_length
    # Under the same name and module: transformers and its pipelines look at both.
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    patched_class = type(original.__name__, (_SparseToDense, original), names)
    target._std_decode = _Patch(original, layers, top_k_keys, gamma, reselect)
    target.__class__ = patched_class
    return model


def unpatch(model: Model) -> Model:
    """Give `model` back as it was before `patch`.

    Raises:
        RuntimeError: `model` is not patched.
    """
    target = _unwrapped(model)
    if not is_patched(target):
        raise RuntimeError(
            f"unpatch: {type(target).__name__} is not patched, expected a model that was; "
            "nothing to undo"
        )
    target.__class__ = target._std_decode.original_class
    del target._std_decode
    return model


@contextmanager
def patched(model: Model, **options: Any) -> Iterator[Model]:
    """Patch `model` for the length of a ``with`` block. Takes the options of `patch`."""
    patch(model, **options)
    try:
        yield model
    finally:
        unpatch(model)


def is_patched(model: nn.Module) -> bool:
    """Whether `patch` was applied to `model` and not undone."""
    return isinstance(_unwrapped(model), _SparseToDense)


def last_stats(model: nn.Module) -> DecodeStats | None:
    """What the newest generate call of a patched model did; None before any call.

    Raises:
        RuntimeError: `model` is not patched.
    """
    target = _unwrapped(model)
    if not is_patched(target):
        raise RuntimeError(
            f"last_stats: {type(target).__name__} is not patched, expected a model that patch "
            "returned; read the stats before unpatch"
        )
    return target._std_decode.stats


class _SparseToDense:
    """Mixed into the class of a patched instance, before its own."""

    _std_decode: _Patch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, SparseToDenseCache):
            return cache.rounds(**kwargs)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        reason = fallback_reason(self, input_ids, generation_config, synced_gpus, model_kwargs)
        if reason is not None:
            self._std_decode.stats = DecodeStats(fallback=reason)
            criteria, rounds = stopping_criteria, None
        else:
            rounds = _rounds(
                self,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                model_kwargs,
            )
            model_kwargs["past_key_values"] = rounds.cache
            criteria = rounds.drafter.criteria
        try:
            output = super()._sample(  # type: ignore[misc]
                input_ids,
                logits_processor,
                criteria,
                generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
            if rounds is None:
                return output
            if isinstance(output, Tensor):
                rounds.finish(output)
            else:
                rounds.finish(output.sequences)
                output.past_key_values = rounds.cache.to_dynamic()
            self._std_decode.stats = rounds.stats
            return output
        finally:
            if rounds is not None:
                rounds.cache.release()

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        self._std_decode.stats = DecodeStats(fallback="beam search")
        return super()._beam_search(*args, **kwargs)  # type: ignore[misc]

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        self._std_decode.stats = DecodeStats(fallback="assisted decoding")
        return super()._assisted_decoding(*args, **kwargs)  # type: ignore[misc]


def _rounds(
    model: PreTrainedModel,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    kwargs: dict[str, Any],
) -> Rounds:
    """Everything one accelerated generate call needs."""
    options = model._std_decode
    length = input_ids.shape[1]
    kv_start = left_padding(kwargs.get("attention_mask"))
    selection = None
    if options.draft_length > 0:
        visual = visual_tokens(input_ids, model.config, kwargs.get("mm_token_type_ids"))
        selection = plan_selection(visual, kv_start, options.top_k_keys)
    new_tokens = min(config.max_length - length, MOST_NEW_TOKENS)
    capacity = length + new_tokens + options.draft_length + 1
    cache = SparseToDenseCache(
        kwargs["past_key_values"], capacity, len(input_ids), input_ids.device, kv_start
    )
    stats = DecodeStats(
        mode="lockstep",
        prompt_tokens=length,
        selected_keys=selection.width if selection is not None else 0,
    )
    if input_ids.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(input_ids.device)
    cache.rounds = Rounds(
        forward=MethodType(options.original_class.__call__, model),
        config=model.get_decoder().config,
        layers=options.layers,
        cache=cache,
        selection=selection,
        drafter=Drafter(input_ids, processors, criteria, config),
        draft_length=options.draft_length,
        reselect=options.reselect,
        stats=stats,
    )
    return cache.rounds


def _check_options(top_k_keys: Any, draft_length: Any, reselect: Any) -> None:
    for name, value in (("top_k_keys", top_k_keys), ("draft_length", draft_length)):
        wanted = "an int" + (' or "auto"' if name == "draft_length" else "")
        if name == "draft_length" and value == "auto":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"patch: {name} is {value!r}, expected {wanted}")
    if top_k_keys < 1:
        raise ValueError(
            f"patch: top_k_keys is {top_k_keys}, expected at least 1; 1024 is the default, a "
            "larger number makes drafts better and slower"
        )
    if draft_length != "auto" and not 0 <= draft_length <= MOST_DRAFTS:
        raise ValueError(
            f"patch: draft_length is {draft_length}, expected 0 <= draft_length <= {MOST_DRAFTS} "
            'or "auto"; 0 decodes densely'
        )
    if not isinstance(reselect, bool):
        raise TypeError(f"patch: reselect is {reselect!r}, expected True or False")


def _unwrapped(model: Any) -> Any:
    """The transformers model inside a compiled model or a PeftModel, else `model`."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model

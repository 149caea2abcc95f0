"""The class of a patched instance: its own, with what takes generate's calls mixed in."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from std_decode.generation import sample
from std_decode.model.cache import CACHE, SparseToDenseCache
from std_decode.stats import DecodeStats


class SparseToDense:
    """Mixed into the class of a patched instance, before its own.

    Another instance of that class, as ``type(model)(config)`` or ``from_pretrained`` gives it, was
    not patched, and does as its own class does.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE)
        if isinstance(cache, SparseToDenseCache) and is_patched(self):
            return cache.answer(**kwargs)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        kind = type(self)
        if is_patched(self):
            kind = self._std_decode.original_class  # type: ignore[attr-defined]
        elif own_class(kind) is kind:
            return reduced
        # Pickle would look for a class of this name, and find the instance's own.
        return _new, (own_class(kind), is_patched(self)), *reduced[2:]

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
        plain = super()._sample  # type: ignore[misc]
        call = (input_ids, logits_processor, stopping_criteria, generation_config)
        if not is_patched(self):
            return plain(*call, synced_gpus, streamer, **model_kwargs)
        return sample(self, plain, *call, synced_gpus, streamer, model_kwargs)

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        _note(self, DecodeStats(fallback="beam search"))
        return super()._beam_search(*args, **kwargs)  # type: ignore[misc]

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        _note(self, DecodeStats(fallback="assisted decoding"))
        return super()._assisted_decoding(*args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        _note(self, DecodeStats(fallback="continuous batching"))
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]


def is_patched(thing: Any) -> bool:
    return isinstance(thing, SparseToDense) and "_std_decode" in vars(thing)


def patched_class(original: Any) -> type:
    """`original`, under its name, with `SparseToDense` mixed in."""
    # Under the same name and module: transformers and its pipelines look at both.
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    forgetful = _forgetful(original.generate)
    return type(original.__name__, (SparseToDense, original), {**names, "generate": forgetful})


def own_class(kind: type) -> type:
    """The class that `patched_class` was given where it made `kind`, else `kind`."""
    return kind.__bases__[1] if kind.__bases__[:1] == (SparseToDense,) else kind


def _new(original: type, patched: bool) -> Any:
    """What pickle and deepcopy begin a copy of a model with."""
    kind: Any = patched_class(original) if patched else original
    return kind.__new__(kind)


def _forgetful(generate: Any) -> Callable[..., Any]:
    """A class's `generate` that drops the stats of the call before, wherever this one goes to.

    People take decorators off generate, to have gradients: each one is there, over the same.
    """

    @wraps(generate)
    def begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        _note(self, None)
        return generate(self, *args, **kwargs)

    called: Any = begin
    called.stands_for = generate
    if hasattr(generate, "__wrapped__"):
        called.__wrapped__ = _forgetful(generate.__wrapped__)
    else:
        called.__signature__ = inspect.signature(generate)
        del called.__wrapped__
    return called


def _note(model: Any, stats: DecodeStats | None) -> None:
    if is_patched(model):
        model._std_decode.stats = stats

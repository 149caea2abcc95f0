"""The attention a patched model runs: its own at prefill, sparse to draft, dense to verify.

transformers looks attention and mask functions up by the name in ``config._attn_implementation``.
For the length of one forward pass that name is ours, and it spells which implementation it stands
in for, so that a module outside the running pass (another model that shares the config object, a
call from another thread) gets exactly what it would have got.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from std_decode.model.alone import each_alone
from std_decode.model.cache import NO_MASK, BufferLayer, SparseToDenseCache
from std_decode.model.selection import Selection
from std_kernels import (
    score_keys,
    sparse_attention,
    verify_attention,
    verify_attention_with_scores,
)

PREFIX = "std_decode_over_"
Phase = Literal["prefill", "draft", "verify"]


@dataclass(eq=False)
class Pass:
    """One forward pass, as its attention layers need to know it.

    Attributes:
        layers: the attention modules that take part, by `layer_idx`.
        selection: None where nothing will be drafted, hence nothing is scored.
        rescore: whether verification hands out scores for a new selection.
        alone: each row's length before the pass, where every token attends by the model's own
            function as plain decoding has it: alone, on the CPU; else None.
        twins: whose 4-bit weights the pass reads (`std_decode.weights.twins.Twins`), or None.
        padding: how many of its last tokens are there for the shape's sake only.
        asked: how the model asks for masks, by sliding window,
        masks: and those that were made for a token, by window and length.
    """

    phase: Phase
    cache: SparseToDenseCache
    layers: dict[int, nn.Module]
    selection: Selection | None = None
    rescore: bool = False
    alone: list[int] | None = None
    twins: object = None
    padding: int = 0
    asked: dict[int | None, dict[str, Any]] = field(default_factory=dict)
    masks: dict[tuple[int | None, int], Any] = field(default_factory=dict)


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

    def __call__(self) -> Result:
        running, query = self.running, self.query
        if running.phase == "prefill":
            if running.selection is not None and self.layer.window is None:
                scores = _score_prompt(
                    running.cache, running.selection, query, self.key, self.options
                )
                self.layer.weigh_prompt(scores, query.shape[1])
            return self.dense(self.module, query, self.key, self.value, self.mask, **self.given)
        if running.alone is not None:
            return each_alone(self, running.alone)
        attend = _draft if running.phase == "draft" else _verify
        return attend(self).transpose(1, 2).contiguous(), None


# Has it attend by calling it; its own result is what the module gets.
Observer = Callable[[Attending], Result]


class _EagerPass:
    pass


_running: ContextVar[Pass | None] = ContextVar("std_decode_pass", default=None)
_observer: ContextVar[Observer | None] = ContextVar("std_decode_observer", default=None)
_compiled: list[Pass | None] = [None]  # the pass that compiled code runs for
_compiled_lock = threading.RLock()
_switch_lock = threading.RLock()  # not Lock: Ctrl-C may have a handler that generates, too
# id(config) -> passes under way, the config, its name that was replaced. Weak, so that a pass that
# was broken off in the worst place is forgotten all the same.
_switched: dict[int, tuple[WeakSet[Pass], PreTrainedConfig, str]] = {}
_eager_passes: WeakSet[_EagerPass] = WeakSet()  # under way in `uncompiled`; weak as well
_stance: Any = None  # what ends it


@contextmanager
def attention_of(config: PreTrainedConfig, running: Pass) -> Iterator[None]:
    """Run the forward pass inside with our attention, in this context (thread) only."""
    before = _running.get()
    try:  # before anything is changed: Ctrl-C may come between any two steps
        with _switch_lock:
            name = attention_name(config)
            passes, _, replaced = _switched.get(id(config), (WeakSet(), config, name))
            passes.add(running)
            _switched[id(config)] = passes, config, replaced
            config._attn_implementation = _registered(replaced)
        _running.set(running)
        yield
    finally:
        try:
            _leave(config, running, before)
        except BaseException:  # once more, if it came here
            _leave(config, running, before)
            raise


def _leave(config: PreTrainedConfig, running: Pass, before: Pass | None) -> None:
    _running.set(before)
    with _switch_lock:
        _end(config, [running])


def forget_passes(config: PreTrainedConfig, layers: dict[int, nn.Module]) -> None:
    """When no call with these layers is under way: passes that were broken off in the worst place
    leave nothing behind."""
    running = _running.get()
    if running is not None and running.layers is layers:
        _running.set(None)
    with _switch_lock:
        passes, *_ = _switched.get(id(config), ((),))
        _end(config, [one for one in passes if one.layers is layers])
        _let_compile()


def _end(config: PreTrainedConfig, ended: Iterable[Pass]) -> None:
    """Give the config its own attention back with the last pass."""
    if id(config) not in _switched:
        return
    passes, _, replaced = _switched[id(config)]
    for one in ended:
        passes.discard(one)
    if not passes:
        config._attn_implementation = replaced
        del _switched[id(config)]


def _after_fork() -> None:
    """In a child process: other threads, their passes and the locks they held are not there."""
    global _switch_lock, _compiled_lock
    _switch_lock, _compiled_lock = threading.RLock(), threading.RLock()
    for passes, config, _ in list(_switched.values()):
        _end(config, set(passes) - {_running.get()})
    if _running.get() is None:
        _eager_passes.clear()
        _let_compile()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Have `observer` called for each layer's attention, in this context (thread) only.

    Captured and compiled passes show nothing: patch with ``cuda_graphs=False``.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


@contextmanager
def compiled_for(running: Pass) -> Iterator[None]:
    """Have compiled code inside run for this pass; one thread at a time."""
    with _compiled_lock:
        _compiled[0] = running
        try:
            yield
        finally:
            _compiled[0] = None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run the pass inside as it is, whatever parts of the model the user had compiled.

    Compiled code would run for the pass it was compiled for, and a new length every step would
    have it compiled anew. For all threads, until the last one is through.
    """
    global _stance
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        yield
        return
    eager = _EagerPass()
    try:  # as in `attention_of`
        with _switch_lock:
            _eager_passes.add(eager)
            if _stance is None:
                _stance = torch.compiler.set_stance("force_eager")
        yield
    finally:
        with _switch_lock:
            _eager_passes.discard(eager)
            _let_compile()


def _let_compile() -> None:
    """Once no pass is under way that must not be compiled."""
    global _stance
    if _stance is not None and not _eager_passes:
        _stance.__exit__(None, None, None)
        _stance = None


def running_pass() -> Pass | None:
    """The pass under way in this context, or the one that code is being compiled for."""
    # A compiler cannot look into a ContextVar; into a list it can, and it checks what it found.
    return _compiled[0] if torch.compiler.is_compiling() else _running.get()


def _registered(replaced: str) -> str:
    name = PREFIX + replaced
    AttentionInterface.register(name, partial(_attention, replaced=replaced))
    if replaced in AttentionMaskInterface._global_mapping:
        AttentionMaskInterface.register(name, partial(_mask, replaced=replaced))
    return name


def attention_name(config: PreTrainedConfig) -> str:
    """The implementation that `config` asks for, also while a pass of ours stands in for it."""
    return (config._attn_implementation or "eager").removeprefix(PREFIX)


def attention_function(module: nn.Module, name: str) -> Callable[..., Result]:
    """The function `module` would call under `name`; eager ones live in the model's own file."""
    file = sys.modules[type(module).__module__]
    interface = getattr(file, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    return interface.get_interface(name, getattr(file, "eager_attention_forward", None))


def _mask(*, replaced: str, kv_offset: int = 0, **kwargs):
    # Only our cache gives this offset, and only after prefill. Nothing else here tells whose mask
    # it is: a model that shares the config object may be called in the middle of our pass.
    if kv_offset == NO_MASK:
        running = None if torch.compiler.is_compiling() else _running.get()
        if running is not None and running.alone is not None:
            running.asked[kwargs.get("local_size")] = kwargs
        return None  # our ops go by lengths
    return AttentionMaskInterface._global_mapping[replaced](kv_offset=kv_offset, **kwargs)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    replaced: str,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    running: Any = running_pass()
    if running is None or running.layers.get(getattr(module, "layer_idx", -1)) is not module:
        dense = attention_function(module, replaced)
        return dense(module, query, key, value, attention_mask, **kwargs)
    attending = Attending(running, module, replaced, query, key, value, attention_mask, kwargs)
    observer = None if torch.compiler.is_compiling() else _observer.get()
    return attending() if observer is None else observer(attending)


def _score_prompt(
    cache: SparseToDenseCache, selection: Selection, query: Tensor, key: Tensor, options: dict
) -> Tensor:
    if cache.order is not None:
        key = key.take_along_dim(_on(query, cache.order)[:, None, :, None], dim=2)
    return score_keys(
        query[:, :, -selection.window :],
        key,
        _on(query, cache.span.kv_len),
        kv_start=_on(query, cache.kv_start),
        num_queries=_on(query, selection.observers),
        **options,
    )


def _draft(attending: Attending) -> Tensor:
    layer, query, cache = attending.layer, attending.query, attending.running.cache
    if layer.window is not None:
        return _verify(attending)
    out, lse = sparse_attention(
        query,
        attending.key,
        attending.value,
        layer.indices,
        _on(query, cache.tail_start),
        _on(query, cache.span.kv_len),
        **attending.options,
    )
    layer.note_lse(lse)
    return out


def _verify(attending: Attending) -> Tensor:
    layer, query, cache = attending.layer, attending.query, attending.running.cache
    tensors = query, attending.key, attending.value, _on(query, cache.span.kv_len)
    kv_start = _on(query, cache.kv_start)
    if attending.running.rescore and layer.window is None:
        out, _, scores = verify_attention_with_scores(
            *tensors,
            layer.lse_estimate(query.shape[2], attending.running.padding),
            kv_start=kv_start,
            **attending.options,
        )
        layer.weigh(scores)
        return out
    out, _ = verify_attention(
        *tensors, kv_start=kv_start, window=layer.window, **attending.options
    )
    return out


def _on(query: Tensor, tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.to(query.device)

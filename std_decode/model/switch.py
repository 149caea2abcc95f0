"""Whose attention a model runs: for the length of a pass ours, by the name in its config.

transformers looks attention and mask functions up by the name in ``config._attn_implementation``.
For the length of one forward pass that name is ours, and it spells which implementation it stands
in for, so that a module outside the running pass (another model that shares the config object, a
call from another thread) gets exactly what it would have got.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from std_decode.model.attention import Attending, Result, attention_function
from std_decode.model.buffers import NO_MASK
from std_decode.model.running_pass import RUNNING, Pass, let_compile, running_pass

PREFIX = "std_decode_over_"

# Has it attend by calling it; its own result is what the module gets.
Observer = Callable[[Attending], Result]

_observer: ContextVar[Observer | None] = ContextVar("std_decode_observer", default=None)
_switch_lock = threading.RLock()  # not Lock: Ctrl-C may have a handler that generates, too
# id(config) -> passes under way, the config, its name that was replaced. Weak, so that a pass that
# was broken off in the worst place is forgotten all the same.
_switched: dict[int, tuple[WeakSet[Pass], PreTrainedConfig, str]] = {}


@contextmanager
def attention_of(config: PreTrainedConfig, running: Pass) -> Iterator[None]:
    """Run the forward pass inside with our attention, in this context (thread) only."""
    before = RUNNING.get()
    try:  # before anything is changed: Ctrl-C may come between any two steps
        with _switch_lock:
            name = attention_name(config)
            passes, _, replaced = _switched.get(id(config), (WeakSet(), config, name))
            passes.add(running)
            _switched[id(config)] = passes, config, replaced
            config._attn_implementation = _registered(replaced)
        RUNNING.set(running)
        yield
    finally:
        try:
            _leave(config, running, before)
        except BaseException:  # once more, if it came here
            _leave(config, running, before)
            raise


def _leave(config: PreTrainedConfig, running: Pass, before: Pass | None) -> None:
    RUNNING.set(before)
    with _switch_lock:
        _end(config, [running])


def forget_passes(config: PreTrainedConfig, layers: dict[int, nn.Module]) -> None:
    """When no call with these layers is under way: passes that were broken off in the worst place
    leave nothing behind."""
    running = RUNNING.get()
    if running is not None and running.layers is layers:
        RUNNING.set(None)
    with _switch_lock:
        passes, *_ = _switched.get(id(config), ((),))
        _end(config, [one for one in passes if one.layers is layers])
    let_compile()


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
    global _switch_lock
    _switch_lock = threading.RLock()
    for passes, config, _ in list(_switched.values()):
        _end(config, set(passes) - {RUNNING.get()})


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


def _registered(replaced: str) -> str:
    name = PREFIX + replaced
    AttentionInterface.register(name, partial(_attention, replaced=replaced))
    if replaced in AttentionMaskInterface._global_mapping:
        AttentionMaskInterface.register(name, partial(_mask, replaced=replaced))
    return name


def attention_name(config: PreTrainedConfig) -> str:
    """The implementation that `config` asks for, also while a pass of ours stands in for it."""
    return (config._attn_implementation or "eager").removeprefix(PREFIX)


def _mask(*, replaced: str, kv_offset: int = 0, **kwargs):
    # Only our cache gives this offset, and only after prefill. Nothing else here tells whose mask
    # it is: a model that shares the config object may be called in the middle of our pass.
    if kv_offset == NO_MASK:
        running = None if torch.compiler.is_compiling() else RUNNING.get()
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

"""Which forward pass is under way, and that nothing compiled runs in its place."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn

from std_decode.model.cache import SparseToDenseCache
from std_decode.model.selection_rules import Selection

Phase = Literal["prefill", "draft", "verify"]


@dataclass(eq=False)
class Pass:
    """One forward pass, as its attention layers need to know it.

    Attributes:
        layers: the attention modules that take part, by `layer_idx`.
        selection: None where nothing will be drafted, hence nothing is scored.
        partial: whether more of the prompt is to be read.
        rescore: whether verification hands out scores for a new selection.
        alone: each row's length before the pass, where every token attends by the model's own
            function as plain decoding has it: alone, on the CPU; else None.
        one_read: the length before the pass of the one row whose tokens read K and V once for the
            query heads of a KV head (the model's own function rounds otherwise), or None.
        twins: whose 4-bit weights the pass reads (`std_decode.weights.twins.Twins`), or None.
        products: how its products are made (`std_decode.weights.products.Products`), or None.
        fused: whose layers run fused (`std_decode.admission.fusing.Fused`), or None.
        normed: a norm, what it is going to be given, at which version, and what it makes of that;
            see `fused_layer`.
        padding: how many of its last tokens are there for the shape's sake only.
        asked: how the model asks for masks, by sliding window,
        masks: and those that were made for a token, by window and length.
        biases: and which of a row's tokens sees which key, see `one_read`.
    """

    phase: Phase
    cache: SparseToDenseCache
    layers: dict[int, nn.Module]
    selection: Selection | None = None
    partial: bool = False
    rescore: bool = False
    alone: list[int] | None = None
    one_read: int | None = None
    twins: object = None
    products: object = None
    fused: object = None
    normed: tuple[object, Tensor, int, Tensor] | None = None
    padding: int = 0
    asked: dict[int | None, dict[str, Any]] = field(default_factory=dict)
    masks: dict[tuple[int | None, int], Any] = field(default_factory=dict)
    biases: dict[tuple[int, int, int | None, torch.dtype], Tensor] = field(default_factory=dict)


class _EagerPass:
    pass


RUNNING: ContextVar[Pass | None] = ContextVar("std_decode_pass", default=None)
_compiled: list[Pass | None] = [None]  # the pass that compiled code runs for
_compiled_lock = threading.RLock()
_stance_lock = threading.RLock()  # not Lock: Ctrl-C may have a handler that generates, too
# Under way in `uncompiled`. Weak, so that one that was broken off in the worst place is forgotten.
_eager_passes: WeakSet[_EagerPass] = WeakSet()
_stance: Any = None  # what ends it


def running_pass() -> Pass | None:
    """The pass under way in this context, or the one that code is being compiled for."""
    # A compiler cannot look into a ContextVar; into a list it can, and it checks what it found.
    return _compiled[0] if torch.compiler.is_compiling() else RUNNING.get()


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
    try:  # as in switch.py
        with _stance_lock:
            _eager_passes.add(eager)
            if _stance is None:
                _stance = torch.compiler.set_stance("force_eager")
        yield
    finally:
        with _stance_lock:
            _eager_passes.discard(eager)
            let_compile()


def let_compile() -> None:
    """Once no pass is under way that must not be compiled."""
    global _stance
    with _stance_lock:
        if _stance is not None and not _eager_passes:
            _stance.__exit__(None, None, None)
            _stance = None


def _after_fork() -> None:
    """In a child process: other threads, their passes and the locks they held are not there."""
    global _compiled_lock, _stance_lock
    _compiled_lock, _stance_lock = threading.RLock(), threading.RLock()
    if RUNNING.get() is None:
        _eager_passes.clear()
        let_compile()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

"""What sees the steps or the passes of a call and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer


class Watches(LogitsProcessor):
    """Not one of transformers' own, so the batch goes in lockstep."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append(input_ids.clone())
        return scores


class Streams(BaseStreamer):
    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(value.clone())

    def end(self):
        self.calls.append("end")


@contextmanager
def interposed(module: nn.Module, before: Callable[..., Any]) -> Iterator[None]:
    """Call `before` with what each forward of `module` gets.

    Of a hook a call would take note, and of another forward, unless that is a compiled one.
    """
    forward = module.forward

    def interpose(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        return forward(*args, **kwargs)

    interpose._torchdynamo_orig_callable = forward  # type: ignore[attr-defined]
    module.forward = interpose
    try:
        yield
    finally:
        del module.forward

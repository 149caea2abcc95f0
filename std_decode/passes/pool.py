"""Which engine a call gets: a new one, or, with its captured passes, that of an earlier call."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn

from std_decode.model.cache import SparseToDenseCache, bucket
from std_decode.model.selection_rules import MOST_INDICES, Selection
from std_decode.passes import graphs
from std_decode.passes.engine import Engine

# transformers leaves hooks that collect hidden states where a call asked for some; in other calls
# they do nothing.
IDLE_HOOKS = "transformers.utils.output_capturing"
OFFLOADED = "keys and values are offloaded"


class _Call:
    pass


class Engines:
    """The engines of one patched model. At most one is kept while none is in use.

    Args:
        wanted: whether passes are captured; "auto" and True differ only in what a caller expects.
        compiles: whether captured passes are compiled first.

    Attributes:
        calls: those of generate that are under way.
    """

    def __init__(self, wanted: Literal["auto"] | bool, compiles: bool = False):
        self.wanted, self.compiles = wanted, compiles
        self.idle: Engine | None = None
        self.lock = threading.RLock()
        # Weak, so that one that was broken off in the worst place is forgotten all the same.
        self.calls: WeakSet[_Call] = WeakSet()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Within, a generate call is under way."""
        call = _Call()
        try:
            self.calls.add(call)
            yield
        finally:
            self.calls.discard(call)

    def take(
        self,
        model: Any,
        device: torch.device,
        batch: int,
        prompt: int,
        room: int,
        selection: Selection | None,
        kv_start: Tensor | None,
        offloads: bool = False,
    ) -> tuple[Engine, str | None]:
        """An engine for one call, and why it captures no passes (None where it does).

        Args:
            model: patched.
            device: of the prompt.
            prompt: its length.
            room: tokens in all, as far as can be told.
            offloads: see `SparseToDenseCache`.
        """
        options = model._std_decode
        config = model.get_decoder().config
        reason = OFFLOADED if offloads else self._eager_because(model, device)
        if reason is not None:
            if offloads:
                self.clear()  # what an earlier call left on the device
            cache = SparseToDenseCache(config, room, batch, device, options.policy.most, offloads)
            return Engine(config, options.layers, cache, options.reselect), reason
        width = 0 if selection is None else min(bucket(selection.width), MOST_INDICES)
        key: tuple = (batch, device, kv_start is None, width, torch.is_inference_mode_enabled())
        key += (_fingerprint(model),)
        with self.lock:
            idle, self.idle = self.idle, None
        if idle is not None:
            if idle.fits(key, prompt, room):
                return idle, None
            idle.release()  # its buffers go before new ones come
        cache = SparseToDenseCache(config, max(room, width), batch, device, options.policy.most)
        engine = Engine(
            config, options.layers, cache, options.reselect, graphs.Graphs(device), self.compiles
        )
        engine.key, engine.width = key, width
        return engine, None

    def put_back(self, engine: Any) -> None:
        """Keep the engine of a call that went well for the next one."""
        if engine.graphs is None:
            engine.release()
            return
        engine.finish()
        with self.lock:
            engine, self.idle = self.idle, engine
        if engine is not None:  # of a call that ended meanwhile, in another thread
            engine.release()

    def clear(self) -> None:
        with self.lock:
            idle, self.idle = self.idle, None
        if idle is not None:
            idle.release()

    def __reduce__(self) -> Any:
        return Engines, (self.wanted, self.compiles)  # copies and pickles begin without an engine

    def _eager_because(self, model: nn.Module, device: torch.device) -> str | None:
        if self.wanted is False:
            return "cuda_graphs is False"
        layers = model._std_decode.layers.values()
        devices = {parameter.device for layer in layers for parameter in layer.parameters()}
        reason = graphs.unavailable(devices | {device})
        if reason is not None:
            return reason
        for name, module in model.named_modules():
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if any(getattr(hook, "__module__", None) != IDLE_HOOKS for hook in hooks):
                return f"a hook wants to see each pass of {name or type(module).__name__}"
        return None


def _fingerprint(model: nn.Module) -> Hashable:
    """What a captured pass relies on: where the weights are, which adapters are on, what it is
    made of, and every number in it (a LoRA adapter's scaling, say), which capturing has fixed."""
    adapters = [
        (module.disable_adapters, tuple(module.active_adapters), tuple(module.merged_adapters))
        for module in model.modules()
        if hasattr(module, "merged_adapters")
    ]
    twins = model._std_decode.draft_weights.tensors()
    weights = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers(), *twins)]
    parts = [
        (id(module), type(module).__name__, id(vars(module).get("forward")), _plain(vars(module)))
        for module in model.modules()
    ]
    config = _plain(vars(model.get_decoder().config))
    fused = model._std_decode.fused.active
    return hash((tuple(adapters), tuple(weights), tuple(parts), config, fused))


def _plain(value: Any) -> Hashable:
    """The numbers and names in a value, in dicts and lists too; None for what is neither."""
    if isinstance(value, dict):
        public = {k: v for k, v in value.items() if isinstance(k, str) and not k.startswith("_")}
        return tuple((name, _plain(one)) for name, one in public.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value if isinstance(value, (bool, int, float, str)) else None

"""RoPE whose factors follow the length of a sequence: LongRoPE and dynamic NTK scaling.

Each pass goes by its largest position id, and what one pass was, the module may remember for the
next. Where every pass of a call has the same factors, it makes no difference in which passes its
tokens are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_constant(decoder: nn.Module, past: int, shortest: int, longest: int) -> bool:
    """Whether all passes of a call rotate by the same factors.

    Args:
        past: tokens that the cache holds before it.
        shortest: what the largest position id of a pass, and one, comes to at least.
        longest: the same, at most.
    """
    for module, layer_type, kind in _following_length(decoder):
        if kind == "longrope":
            config: Any = module.config
            rope = config.rope_parameters
            rope = rope if layer_type is None else rope[layer_type]
            # Phi-3 forgets a cache that is not beyond the second of these when a call is.
            switches = [
                rope["original_max_position_embeddings"],
                getattr(config, "original_max_position_embeddings", None),
            ]
            switches = [switch for switch in switches if switch is not None]
            begin = min(shortest, past) if past else shortest
            constant = longest <= min(switches) or begin > max(switches)
        else:  # "dynamic" grows with the longest sequence that it has seen, until a short one
            original: Any = module.original_max_seq_len
            seen = getattr(module, f"{layer_type}_max_seq_len_cached", module.max_seq_len_cached)
            constant = longest <= original or (original <= shortest and longest <= int(seen))
        if not constant:
            return False
    return True


def follows_length(decoder: nn.Module) -> bool:
    return next(_following_length(decoder), None) is not None


@contextmanager
def unchanged(decoder: nn.Module) -> Iterator[None]:
    """Within, passes may be of any length; afterwards RoPE remembers what it did before."""
    modules = {module: None for module, _, _ in _following_length(decoder)}
    before = [(module, vars(module).copy(), module._buffers.copy()) for module in modules]
    try:
        for module, _, buffers in before:
            copies = {name: None if x is None else x.clone() for name, x in buffers.items()}
            module._buffers.update(copies)
        yield
    finally:
        for module, attributes, buffers in before:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def _following_length(decoder: nn.Module) -> Iterator[tuple[nn.Module, str | None, str]]:
    """Each such module, the type of layers that it is asked for (None: all), and its kind."""
    for module in decoder.modules():
        kinds: Any = getattr(module, "rope_type", None)
        for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind):
                yield module, layer_type, kind

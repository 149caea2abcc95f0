"""Which decoder layers compute what the fused layer does: told by their parts and their code.

A layer is known by what its modules are and by what its forward functions name, which tells more
than the name of its class: a multiplier on the residual stream, a clamp, or a norm by 1 + weight
are attributes and functions of other names. Whether it computes the same is tried besides, see
`fusing`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from std_decode.model.fused_layer import own_class
from std_decode.passes.pool import IDLE_HOOKS
from std_decode.weights.twins import PLAIN_LAYERS

_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_MLP = {"gate_proj", "up_proj", "act_fn", "down_proj"}
_NORM = {
    *("dtype", "to", "torch", "float32", "pow", "mean", "rsqrt"),
    *("variance_epsilon", "weight"),
}
_NEEDED = {"q_proj", "k_proj", "v_proj", "o_proj", "apply_rotary_pos_emb", "update", "scaling"}
_ATTENTION = _NEEDED | {
    *("shape", "size", "view", "transpose", "reshape", "contiguous", "getattr"),
    *("head_dim", "layer_idx", "config", "_attn_implementation", "training", "attention_dropout"),
    *("ALL_ATTENTION_FUNCTIONS", "get_interface", "eager_attention_forward", "sliding_window"),
    *("q_norm", "k_norm"),
}
_ROTATION = {"unsqueeze", "rotate_half"}
_HALVES = {"shape", "torch", "cat"}
_NUMBERS = {-1, 0, 1, 2}  # that dimensions are named by


def unlike(layer: nn.Module) -> str | None:
    """Why `layer` is not known to compute what a fused layer does, or None."""
    parts: Any = layer
    try:
        attention, mlp = parts.self_attn, parts.mlp
        norms = [parts.input_layernorm, parts.post_attention_layernorm]
        linear = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linear += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        activation = mlp.act_fn
    except AttributeError as error:
        return f"other parts than a Llama layer's ({error})"
    named = _names(attention)
    if "q_norm" in named:
        norms += [attention.q_norm, attention.k_norm]
    for part in linear:
        if type(part) not in PLAIN_LAYERS:
            return f"a {type(part).__name__}, which is no plain nn.Linear"
    if type(activation) is not nn.SiLU and type(activation).__name__ != "SiLUActivation":
        return f"{type(activation).__name__} as its activation"
    if _names(parts) != _LAYER or _names(mlp) != _MLP:
        return "code of its own"
    if not _NEEDED <= named <= _ATTENTION or not _is_rotation(attention):
        return "attention with code of its own"
    if any(_names(norm) != _NORM for norm in norms):
        return "norms with code of their own"
    return _state(layer, norms)


def unlike_norm(norm: nn.Module | None) -> bool:
    """Whether a module is not known to be the RMS norm that a fused layer can work out."""
    return norm is None or _names(norm) != _NORM or _hooked(norm)


def _state(layer: nn.Module, norms: list) -> str | None:
    """What of a layer that has the right code keeps it from being fused, or None."""
    for module in layer.modules():
        if "forward" in vars(module):
            return "a replaced forward"
        if _hooked(module):
            return "a hook, which wants to see its parts"
    if len({parameter.dtype for parameter in layer.parameters()}) > 1:
        return "weights of several dtypes"
    if len({norm.variance_epsilon for norm in norms[2:]}) > 1:
        return "head norms that are not alike"
    attention: Any = layer.self_attn
    if ("q_norm" in _names(attention)) != (getattr(attention, "q_norm", None) is not None):
        return "head norms that its code does not name"
    return None


def _hooked(module: nn.Module) -> bool:
    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return True
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) != IDLE_HOOKS for hook in hooks)


def _names(module: nn.Module) -> set[str]:
    """All that a module's own forward names; nothing where it is no transformers code."""
    forward = getattr(own_class(type(module)), "forward", None)
    return set() if forward is None else set(_code_of(forward))


@lru_cache(maxsize=1024)
def _code_of(function: Callable[..., Any]) -> frozenset[str]:
    """Attributes, globals and unusual numbers in a function of transformers, as it was written."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None or not str(function.__module__).startswith("transformers."):
        return frozenset()
    numbers = {str(x) for x in code.co_consts if type(x) in (int, float) and x not in _NUMBERS}
    return frozenset(code.co_names) | numbers


def _is_rotation(attention: nn.Module) -> bool:
    """Whether it turns whole heads, by halves, as `rope_write` does."""
    space = inspect.unwrap(type(attention).forward).__globals__
    rotate = space.get("apply_rotary_pos_emb")
    if rotate is None or set(_code_of(rotate)) != _ROTATION:
        return False
    halves = inspect.unwrap(rotate).__globals__.get("rotate_half")
    return halves is not None and set(_code_of(halves)) == _HALVES

"""Whose code a decoder's attention is: transformers' and the model's own, or somebody else's.

A trial of a few tokens tells whether attention that is written in transformers is what our ops
compute. Of code from elsewhere it tells too little: a window or a budget of keys may be longer
than the trial. So such attention is never stood in for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from weakref import ref

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from std_decode.model.attention import attention_function
from std_decode.model.fused_layer import own_class
from std_decode.model.switch import attention_name

# Those that transformers registers, beside kernels of the hub, whose names have a slash.
NAMES = {
    "eager", "sdpa", "flex_attention",
    "flash_attention_2", "flash_attention_3", "flash_attention_4",
}  # fmt: skip
_TRANSFORMERS = str(Path(transformers.__file__).parent) + os.sep


def foreign_attention(model: PreTrainedModel, layers: dict[int, nn.Module]) -> str | None:
    """What of the decoder's attention is neither transformers' nor the model's own, or None.

    The answer goes on from "patch: NAME ".
    """
    decoder = model.get_decoder()
    name = attention_name(decoder.config)
    if name not in NAMES and "/" not in name:
        return (
            f"attends by {name!r}, which transformers does not register, expected one of "
            f'{", ".join(sorted(NAMES))}; model.set_attn_implementation("sdpa") chooses one'
        )
    mask = AttentionMaskInterface._global_mapping.get(name)
    if mask is not None and not _is_written_for(mask):
        return f"masks by {_described(mask)}, which was registered as {name!r}"
    for path, module in _down_to(decoder, layers.values()):
        kind = type(module)
        if _home(kind) not in ("transformers", "torch", _home(type(model))):
            return f"has a {kind.__name__} of {kind.__module__} as its {path}"
        replaced = _replaced_forward(module)
        if replaced is not None:
            return f"has {_described(replaced)} as the forward of its {path}"
    for index, module in layers.items():
        function = attention_function(module, name)
        if not _is_written_for(function, type(module)):
            return f"attends by {_described(function)} in layer {index}, as {name!r}"
    return None


def attention_parts(model: PreTrainedModel, layers: dict[int, nn.Module]) -> tuple:
    """What a call's attention runs, so that a change shows."""
    decoder = model.get_decoder()
    name = attention_name(decoder.config)
    modules = [
        (ref(module), type(module).forward, _own_forward(module))
        for _, module in _down_to(decoder, layers.values())
    ]
    try:
        functions = [attention_function(module, name) for module in layers.values()]
    except KeyError:  # of a name that nothing is registered under
        functions = []
    return name, AttentionMaskInterface._global_mapping.get(name), functions, modules


def _down_to(decoder: nn.Module, layers: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The decoder, the attention modules and what is between them, each once, with their names."""
    names = {id(module): name for name, module in decoder.named_modules()}
    yielded = set()
    for attention in layers:
        path = names.get(id(attention), "").split(".")
        module = decoder
        for end, part in enumerate(["", *path]):
            module = getattr(module, part) if part else module
            if id(module) not in yielded and not isinstance(module, nn.ModuleList):
                yielded.add(id(module))
                yield ".".join(path[:end]) or "decoder", module


def _home(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _own_forward(module: nn.Module) -> Any:
    """What stands in an instance for its class's forward, beneath what only wraps it, or None."""
    own: Any = vars(module).get("forward")
    while own is not None:
        if hasattr(own, "_torchdynamo_orig_callable"):  # as torch.compile(model.forward) has it
            own = own._torchdynamo_orig_callable
        elif isinstance(own, partial) and own.func.__module__ == "accelerate.hooks":
            own = getattr(module, "_old_forward", None)  # moves tensors there and back
        else:
            break
    return None if getattr(own, "__func__", own) is type(module).forward else own


def _replaced_forward(module: nn.Module) -> Callable | None:
    """What `module` runs instead of the forward that its class was written with, or None."""
    own = _own_forward(module)
    if own is not None:
        return own
    kinds = own_class(type(module)).__mro__  # of a layer that is fused: what it was before
    owner = next(kind for kind in kinds if "forward" in vars(kind))
    forward = vars(owner)["forward"]
    written = forward.__qualname__ == f"{owner.__qualname__}.forward"
    return None if written and _is_written_for(forward, owner) else forward


def _is_written_for(function: Any, kind: type | None = None) -> bool:
    """Whether a function's code is in transformers, or in the file that `kind` is written in."""
    while isinstance(function, partial) and set(function.keywords) <= {"implementation"}:
        function = function.func  # a kernel of the hub in transformers' wrapper
    file = getattr(getattr(function, "__code__", None), "co_filename", "")
    own = None if kind is None else getattr(sys.modules.get(kind.__module__), "__file__", None)
    return file.startswith(_TRANSFORMERS) or file == own


def _described(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    kind = type(function)
    return (
        f"{getattr(function, '__module__', kind.__module__)}."
        f"{getattr(function, '__qualname__', kind.__qualname__)}"
    )

"""Accelerate's hooks, which drafts pass by.

Each module of a model that accelerate has spread has a hook, an ``AlignDevicesHook``, that moves
what it is given to its device and, where its weights are offloaded, brings them in before its
forward and drops them after it. From patch to unpatch these hooks are of other classes. In a draft
a `PassedBy` lends its module what is kept on the device instead, and fetches nothing; in other
passes of ours weights come as ever, those of the next layer while this one computes (`ahead`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn

from std_decode.model.running_pass import running_pass

if TYPE_CHECKING:
    from std_decode.weights.offloaded import Offloaded


class PassedBy:
    """Mixed into the class of the hook of an `Offloaded` module."""

    _std_decode_offloaded: Offloaded

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        offloaded, running = self._std_decode_offloaded, running_pass()
        offloaded.take_back()  # where an error came between
        if running is None:
            return super().pre_forward(module, *args, **kwargs)  # type: ignore[misc]
        args, kwargs = offloaded.moved(args, kwargs)
        if running.twins is not offloaded.owner:
            offloaded.lend(offloaded.ahead.take(offloaded, running))
        elif offloaded.rows is not None and isinstance(module, nn.Embedding):
            args = (offloaded.lend_rows(*args), *args[1:])
        else:
            offloaded.lend(offloaded.kept)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if not self._std_decode_offloaded.is_lending:
            return super().post_forward(module, output)  # type: ignore[misc]
        self._std_decode_offloaded.take_back()
        return output


class Still:
    """Mixed into the class of a hook that only moves what a module is given to its device.

    Where all is on one device, a draft has nothing to move; to look takes a third of its time.
    """

    _std_decode_owner: object

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        running = running_pass()
        if running is not None and running.twins is self._std_decode_owner:
            return args, kwargs
        return super().pre_forward(module, *args, **kwargs)  # type: ignore[misc]


@cache
def _mixed(mixin: Any, kind: Any) -> type:
    return type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})


def mix(hook: Any, mixin: type) -> None:
    kind: Any = type(hook)
    if not isinstance(hook, mixin):
        hook.__class__ = _mixed(mixin, kind)


def unmix(hook: Any, name: str, value: object) -> None:
    """Undo `mix` where the hook's attribute `name`, which goes too, is `value`."""
    if vars(hook).get(name) is value:  # attach may have failed before
        if isinstance(hook, (PassedBy, Still)):
            hook.__class__ = type(hook).__bases__[1]
        delattr(hook, name)


def align_hooks(module: nn.Module) -> Iterator[Any]:
    """Those of accelerate's that know where the module computes."""
    accelerate = sys.modules.get("accelerate.hooks")
    own = vars(module).get("_hf_hook")
    if accelerate is not None and own is not None:
        for hook in getattr(own, "hooks", (own,)):  # of a SequentialHook
            if isinstance(hook, accelerate.AlignDevicesHook) and hook.execution_device is not None:
                yield hook


def brought_in(module: nn.Module, hook: Any) -> tuple[str, ...]:
    """The module's own parameters and buffers that a hook brings in."""
    plain = all(type(weight) is nn.Parameter for weight in module.parameters(recurse=False))
    # With `place_submodules` it brings in those of the modules within, all together.
    if not hook.offload or not plain or hook.place_submodules or hook.io_same_device:
        return ()
    found = dict(module._parameters)
    if hook.offload_buffers:
        passing = module._non_persistent_buffers_set
        found |= {name: x for name, x in module._buffers.items() if name not in passing}
    return tuple(name for name, tensor in found.items() if tensor is not None)


def only_moves(module: nn.Module, hook: Any) -> bool:
    """Whether all that a hook does for a draft on one device is to look."""
    brings_in = hook.offload and (hook.place_submodules or bool(module._parameters))
    return not brings_in and not hook.io_same_device

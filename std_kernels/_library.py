"""How the ops reach torch's dispatcher."""

import os
from collections.abc import Callable
from importlib import import_module, util
from typing import Any

import torch

HAS_TRITON = util.find_spec("triton") is not None
# Kernels run on the CPU in Triton's interpreter, where the variable was set at import.
INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

# Library.define and impl rather than torch.library.custom_op: on one CPU core an empty op with
# four tensors costs 3.7 us a call this way and 9.3 us through custom_op, whose autograd wrapper
# is Python. A decode step makes up to 80 of these calls. Both pass opcheck and compile with
# fullgraph=True. What custom_op adds, an error on backward, the public functions raise earlier.
_LIBRARY = torch.library.Library("std_kernels", "FRAGMENT")


def register(
    schema: str, implementation: Callable, fake: Callable, kernels: str | None = None
) -> Any:
    """Defines `std_kernels::<schema>`, for every device that has no kernel of its own.

    Args:
        schema: the op's name, arguments and results in the dispatcher's notation.
        implementation: computes the op on any device; a kernel registered later for one device
            type takes precedence there.
        fake: returns empty results of the right shape, dtype and strides, for tracing.
        kernels: the module whose function of the op's name launches the op's Triton kernels; it
            takes precedence on CUDA and ROCm devices where Triton is installed, and on the CPU
            when interpreting. Imported at the first such call.

    Returns:
        The op's overload, `torch.ops.std_kernels.<name>.default`.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    if kernels is not None and HAS_TRITON:
        _LIBRARY.impl(name, _on_device(kernels, name), "CUDA")
        if INTERPRETING:
            _LIBRARY.impl(name, _on_host(kernels, name), "CPU")
    torch.library.register_fake(f"std_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.std_kernels, name).default


def _on_device(module: str, name: str) -> Callable:
    """The launcher, called with its first argument's device current, as Triton requires."""
    launcher: Callable | None = None

    def launch(*args: Any) -> Any:
        nonlocal launcher
        if launcher is None:
            launcher = getattr(import_module(module), name)
        device = args[0].get_device()
        if device == torch.cuda.current_device():
            return launcher(*args)
        with torch.cuda.device(device):
            return launcher(*args)

    return launch


def _on_host(module: str, name: str) -> Callable:
    """The launcher, for the interpreter."""
    return lambda *args: getattr(import_module(module), name)(*args)

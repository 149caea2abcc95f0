"""How the ops reach torch's dispatcher."""

from collections.abc import Callable
from typing import Any

import torch

# Library.define and impl rather than torch.library.custom_op: on one CPU core an empty op with
# four tensors costs 3.7 us a call this way and 9.3 us through custom_op, whose autograd wrapper
# is Python. A decode step makes up to 80 of these calls. Both pass opcheck and compile with
# fullgraph=True. What custom_op adds, an error on backward, the public functions raise earlier.
_LIBRARY = torch.library.Library("std_kernels", "FRAGMENT")


def register(schema: str, implementation: Callable, fake: Callable) -> Any:
    """Defines `std_kernels::<schema>`, for every device that has no kernel of its own.

    Args:
        schema: the op's name, arguments and results in the dispatcher's notation.
        implementation: computes the op on any device; a kernel registered later for one device
            type takes precedence there.
        fake: returns empty results of the right shape, dtype and strides, for tracing.

    Returns:
        The op's overload, `torch.ops.std_kernels.<name>.default`.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"std_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.std_kernels, name).default

"""What processes that share a model by tensor parallelism have to do alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed


def lead(model: Any) -> Callable[[int], int]:
    """A function that turns a rank's own choice into that of the first of those that share.

    Ranks measure different times. If they chose different draft lengths by them, their passes
    would have different shapes and wait for each other for ever. Costs one broadcast a choice;
    with a single process the choice is just returned.
    """
    if (getattr(model, "_tp_size", None) or 1) == 1 or not torch.distributed.is_initialized():
        return lambda choice: choice
    # Other processes may have the same model for other prompts: they must not be waited for.
    mesh = getattr(model, "_device_mesh", None)
    if mesh is not None and mesh.ndim > 1:
        mesh = mesh["tp"]
    group = None if mesh is None else mesh.get_group()

    def follow(choice: int) -> int:
        told = torch.tensor(choice, device=model.device)
        torch.distributed.broadcast(told, group=group, group_src=0)
        return int(told)

    return follow

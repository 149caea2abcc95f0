"""What processes that share a model by tensor parallelism have to do alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from std_decode.rounds.noise import default_generator


def lead(model: Any) -> Callable[[int], int]:
    """A function that turns a rank's own choice into that of the first of those that share.

    Ranks measure different times. If they chose different draft lengths by them, their passes
    would have different shapes and wait for each other for ever. Costs one broadcast a choice;
    with a single process the choice is just returned.
    """
    tell = _broadcast(model)
    if tell is None:
        return lambda choice: choice
    return lambda choice: int(tell(torch.tensor(choice)))


def share_random_numbers(model: Any, device: torch.device) -> None:
    """Have all ranks that share `model` go on with the random numbers of the first of them.

    Ranks that drew other numbers, because someone gave each a seed of its own, would choose other
    tokens, end at other steps, and wait for each other for ever.
    """
    tell = _broadcast(model)
    if tell is not None:
        generator = default_generator(device)
        own = generator.get_state()
        told = tell(own)
        # Setting it to what it was would put it back, if another thread has drawn since.
        if not torch.equal(told, own):
            generator.set_state(told)


def own_file(model: Any, path: Path) -> Path:
    """Where this rank keeps what is of its share of the model; `path` with a single process."""
    if not _shared(model):
        return path
    group = _group(model)
    rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    return path.with_name(f"{path.stem}-{rank + 1}-of-{size}{path.suffix}")


def _shared(model: Any) -> bool:
    return (getattr(model, "_tp_size", None) or 1) > 1 and torch.distributed.is_initialized()


def _group(model: Any) -> Any:
    """Of the processes that share `model`; None: all there are."""
    # Other processes may have the same model for other prompts: they must not be waited for.
    mesh = getattr(model, "_device_mesh", None)
    if mesh is not None and mesh.ndim > 1:
        mesh = mesh["tp"]
    return None if mesh is None else mesh.get_group()


def _broadcast(model: Any) -> Callable[[Tensor], Tensor] | None:
    """What turns a tensor of the CPU into that of the first rank; None with a single process."""
    if not _shared(model):
        return None
    group = _group(model)

    def tell(own: Tensor) -> Tensor:
        told = own.to(model.device, copy=True)
        torch.distributed.broadcast(told, group=group, group_src=0)
        return told.cpu()

    return tell

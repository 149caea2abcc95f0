"""What 4-bit copies take, and what else drafts read of offloaded weights: device by device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from std_decode.costs.memory import free_memory, gigabytes
from std_decode.weights import quantize

if TYPE_CHECKING:
    from std_decode.weights.offloaded import Offloaded
    from std_decode.weights.twins import Twin


class Needed(NamedTuple):
    """Bytes on a device.

    Attributes:
        layers: that are going to have a copy.
        copies: of theirs,
        beside: of what else drafts read of offloaded weights,
        meanwhile: and what making them takes besides, at most.
    """

    device: torch.device
    layers: int
    copies: int
    beside: int
    meanwhile: int


def needed(twins: list[Twin], beside: list[Offloaded]) -> Iterator[Needed]:
    devices = [twin.device for twin in twins] + [offloaded.device for offloaded in beside]
    for device in dict.fromkeys(devices):
        there = [twin for twin in twins if twin.device == device]
        others = [offloaded for offloaded in beside if offloaded.device == device]
        yield Needed(
            device,
            len(there),
            sum(twin.planned_bytes for twin in there),
            sum(offloaded.planned_bytes for offloaded in others),
            max((_meanwhile(twin) for twin in there), default=0),
        )


def _meanwhile(twin: Twin) -> int:
    brought_in = 0 if twin.offloaded is None else twin.weight.nbytes
    return quantize.temporary_bytes(*twin.shape, twin.group) + brought_in


def check(twins: list[Twin], beside: list[Offloaded]) -> None:
    """Raises MemoryError where there is less."""
    for device, layers, copies, more, meanwhile in needed(twins, beside):
        free = free_memory(device)
        if copies + more + meanwhile > free:
            besides = f"what else drafts read of offloaded weights {gigabytes(more)}, "
            raise MemoryError(
                f"draft_weights: 4-bit weights of {layers} layers take {gigabytes(copies)}, "
                f"{besides if more else ''}and {gigabytes(meanwhile)} more while they are made, "
                f"expected at most the {gigabytes(free)} free on {device}; free memory or use "
                "draft_weights=None"
            )

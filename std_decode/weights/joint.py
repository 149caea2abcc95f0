"""Twins of several layers with the same input as one: a product in place of three, or of two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import std_kernels as sk
from std_decode.weights import quantize

if TYPE_CHECKING:
    from std_decode.weights.twins import Twin

SLICE = 64  # `std_kernels.pack_int4`: where one weight may end and another begin


class Joint:
    """The twins of layers with the same input, such as a query's, a key's and a value's.

    On a GPU they lie one after another in one buffer, of which each twin's tensors are views, so
    that neither this nor the layers themselves need another copy. The CPU's kernel takes scales
    of one layer only, and sizes or formats may not go together: then products are one by one.

    Attributes:
        layers: in the order of the features.
        twins: theirs; None for a layer that keeps its weights.
        packed, scales: of all, see `std_kernels.int4_linear`; None where they are apart.
    """

    def __init__(self, layers: list[nn.Linear], twins: list[Twin | None]):
        self.layers, self.twins = layers, twins
        self.packed: Any = None
        self.scales: Any = None
        for twin in filter(None, twins):
            twin.joint = self

    def multiply(self, input: Tensor) -> Tensor:
        """Of ``[..., K]`` with all layers' weights, without biases: ``[..., N_total]``."""
        if self.packed is not None:
            return quantize.linear(input, self.packed, self.scales, None)
        return torch.cat([self._multiply(index, input) for index in range(len(self.layers))], -1)

    def partials(self, input: Tensor) -> Tensor:
        """The same as float32 ``[S, R, N_total]``, to be added over S in ascending order."""
        if self.packed is not None:
            return sk.int4_linear_partials(input.contiguous(), self.packed, self.scales)
        return self.multiply(input).flatten(0, -2).float()[None]

    def _multiply(self, index: int, input: Tensor) -> Tensor:
        twin = self.twins[index]
        if twin is None or twin.packed is None:
            return F.linear(input, self.layers[index].weight)
        return quantize.linear(input, twin.packed, twin.scales, None)

    def gather(self) -> None:
        """Have the twins' tensors lie in one buffer, where all are made and it can be."""
        made = [twin for twin in self.twins if twin is not None and twin.packed is not None]
        if self.packed is not None and all(map(self._is_in_place, made)):
            return
        self.packed = self.scales = None
        if len(made) < len(self.layers) or not _go_together(made):
            return
        packed = torch.cat([twin.packed for twin in made])
        scales = torch.cat([twin.scales for twin in made], dim=1)
        sizes = [len(twin.packed) for twin in made]
        for twin, values, pairs in zip(made, packed.split(sizes), scales.split(sizes, dim=1)):
            twin.packed, twin.scales = values, pairs
        self.packed, self.scales = packed, scales

    def _is_in_place(self, twin: Twin) -> bool:
        return twin.packed.untyped_storage().data_ptr() == self.packed.untyped_storage().data_ptr()

    def drop(self) -> None:
        self.packed = self.scales = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "packed": None, "scales": None}  # as a twin's


def _go_together(twins: list[Twin]) -> bool:
    first = twins[0]
    alike = all(
        twin.packed.shape[1:] == first.packed.shape[1:]
        and len(twin.scales) == len(first.scales)
        and twin.packed.device == first.packed.device
        for twin in twins
    )
    whole = all(len(twin.packed) % SLICE == 0 for twin in twins[:-1])
    return alike and whole and quantize.reads_slices(first.packed.device)

"""Linear layers side by side: while patched, their weights are slices of one tensor.

So q, k and v are one product, and gate and up another, with no second copy of any weight. A layer
goes on as it was: its parameters are the same objects, and what is written into them is written
into the slice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PLAIN: set[type] = {Tensor}  # kinds of data that are numbers in memory, and no more


class Joint:
    """Layers that take the same input.

    Attributes:
        layers: plain linear layers, all with a bias or all without.
        weight, bias: of all of them, ``[N, K]`` and ``[N]``, whose slices are theirs; None while
            they have tensors of their own, and in copies of a model.
    """

    def __init__(self, *layers: nn.Linear):
        self.layers = layers
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self._twin: tuple[Any, Any] | None = None

    def __call__(self, input: Tensor, twins: Any) -> tuple[Tensor, Tensor | None]:
        """Their products with an input ``[B, T, K]``, as `add_rms_norm` and its like take them.

        Args:
            twins: whose 4-bit weights the pass reads, or None.

        Returns:
            ``[R, N]`` with the biases and None; or of twins float32 partials ``[S, R, N]`` and the
            biases ``[N]``, or None where there are none.
        """
        twin = self.twin_of(twins)
        if twin is not None:
            return twin.partials(input), self._biases()
        if self.weight is not None:
            return F.linear(input, self.weight, self.bias).flatten(0, 1), None
        products = [layer(input) for layer in self.layers]
        whole = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        return whole.flatten(0, 1), None

    def twin_of(self, twins: Any) -> Any:
        """The 4-bit twins of these layers as one; None where none of them has one."""
        if twins is None:
            return None
        if self._twin is None or self._twin[0] is not twins:
            self._twin = twins, twins.joint(self.layers)
        twin = self._twin[1]
        return twin if any(x is not None and x.packed is not None for x in twin.twins) else None

    def _biases(self) -> Tensor | None:
        if self.bias is not None or len(self.layers) > 1:
            return self.bias
        return self.layers[0].bias

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [x for layer in self.layers for x in (layer.weight, layer.bias) if x is not None]

    @property
    def intact(self) -> bool:
        """Whether the layers' parameters still are the slices."""
        return self.weight is not None and all(_is_slice(*pair) for pair in self._pairs())

    @torch.no_grad()
    def pack(self) -> None:
        """Make the parameters slices. Where memory does not suffice, they stay as they are."""
        with torch.inference_mode(False):
            weights, biases = [x.weight for x in self.layers], [x.bias for x in self.layers]
            weight = torch.cat([x.data for x in weights])
            bias = None if biases[0] is None else torch.cat([x.data for x in biases])
            self.weight, self.bias = weight, bias
            for parameter, part in self._pairs():
                parameter.data = part

    @torch.no_grad()
    def unpack(self) -> None:
        """Give the parameters tensors of their own again."""
        if self.weight is None:
            return
        with torch.inference_mode(False):
            for parameter, part in self._pairs():
                if _is_slice(parameter, part):
                    parameter.data = part.clone()
        self.weight = self.bias = None

    def _pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter, and the slice that is its."""
        sizes = [layer.out_features for layer in self.layers]
        for name, whole in (("weight", self.weight), ("bias", self.bias)):
            if whole is not None:
                for layer, part in zip(self.layers, whole.split(sizes)):
                    yield getattr(layer, name), part

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "weight": None, "bias": None}


def _is_slice(parameter: Any, part: Tensor) -> bool:
    return (
        isinstance(parameter, Tensor)
        and parameter.data_ptr() == part.data_ptr()
        and (parameter.shape, parameter.dtype) == (part.shape, part.dtype)
    )


def unfit(joint: Joint, users: Counter[int]) -> str | None:
    """Why the weights of these layers cannot be slices of one tensor, or None.

    Args:
        users: of the whole model's memory, see `users_of`.
    """
    parameters = joint.parameters
    kinds = {type(x.data) for x in parameters}
    if not kinds <= PLAIN:
        return f"weights that are a {(kinds - PLAIN).pop().__name__}"
    if len({(x.dtype, x.device, x.requires_grad) for x in parameters}) > 1:
        return "weights of several dtypes or on several devices"
    if any(x.device.type == "meta" for x in parameters):
        return "weights are offloaded"
    if any(x.is_inference() for x in parameters):
        return "weights that were made in inference mode"
    if len({layer.bias is None for layer in joint.layers}) > 1:
        return "a bias in some of its q, k and v or gate and up, not in all"
    own = Counter(map(_storage, parameters))
    if any(users[storage] > count for storage, count in own.items()):
        return "weights that are shared with another layer"
    storages = {_storage(x): x.untyped_storage().nbytes() for x in parameters}
    if sum(storages.values()) > sum(x.nbytes for x in parameters):
        return "weights that are part of a larger tensor"
    return None


def users_of(named: Iterable[tuple[str, nn.Parameter]]) -> Counter[int]:
    """How many parameters of modules lie in each piece of memory."""
    return Counter(_storage(x) for _, x in named if type(x.data) in PLAIN)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

"""The linear layers of a text decoder and their 4-bit twins, which draft passes read instead.

From patch to unpatch a layer with a twin is of class `TwinnedLinear`. In a draft pass of the
patched model it multiplies with the twin, everywhere else with its own weights. So a captured
draft has the twins in it, a captured verification the weights; nothing is switched at each step.
Where a layer's forward was replaced, as tensor parallelism does, the class stays, and in a draft
the product is recognised by the weights that it is called with.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import RLock
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from std_decode.model.running_pass import running_pass
from std_decode.weights import quantize, room
from std_decode.weights.joint import Joint
from std_decode.weights.moments import Moments, input_moments
from std_decode.weights.offloaded import Offload, Offloaded
from std_decode.weights.products import PassLinear
from std_decode.weights.rescoring import CLASSES, rescored

SHOWN_AFTER = 1.0  # seconds of quantising, before someone at a terminal is told
_NONE = "no linear layer can have 4-bit weights"
_making = RLock()


class TwinnedLinear(PassLinear):
    """An ``nn.Linear`` that drafts with a 4-bit copy of its weights."""

    _std_decode_twin: Twin

    def forward(self, input: Tensor) -> Tensor:
        running = running_pass()
        if running is not None and running.twins is not None:
            twin = self._std_decode_twin
            if running.twins is twin.owner and twin.packed is not None:
                return twin.multiply(input, self.bias)
        return super().forward(input)


PLAIN_LAYERS = (nn.Linear, PassLinear, TwinnedLinear)
_FORWARDS = tuple(kind.forward for kind in PLAIN_LAYERS)


class _Recognised(TorchFunctionMode):
    """Within, products with the weights of these twins' layers are products with the twins."""

    def __init__(self, twins: list[Twin]):
        super().__init__()
        self.twins = {twin.weight.data_ptr(): twin for twin in twins}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and type(args[1]) in (Tensor, nn.Parameter):
            twin = self.twins.get(args[1].data_ptr())
            if twin is not None and twin.packed is not None and twin.weight.shape == args[1].shape:
                bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
                return twin.multiply(args[0], bias)
        return func(*args, **(kwargs or {}))


@dataclass(eq=False)
class Twin:
    """The 4-bit copy of one layer's weights, of this process's share of them.

    Attributes:
        name: of the layer in the model.
        wrapped: whether the layer's forward was replaced.
        head: whether it is the LM head, whose best logits are its own weights'.
        group: how many of its weights share a scale.
        packed, scales: see `quantize`; None until made, and in copies of a model.
        made_of: what it was made of, see `_made_of`.
        joint: what it is part of, see `Twins.joint`.
    """

    name: str
    layer: nn.Linear
    owner: Twins
    wrapped: bool
    head: bool = False
    group: int | None = None
    packed: Any = None
    scales: Any = None
    made_of: Any = None
    joint: Joint | None = None

    @property
    def weight(self) -> Tensor:
        return local(self.layer.weight)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return rows, columns

    @property
    def offloaded(self) -> Offloaded | None:
        return self.owner.offload.of(self.layer)

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return self.weight.device if self.offloaded is None else self.offloaded.device

    def whole(self) -> Tensor:
        """The layer's weights, brought in where they are offloaded."""
        offloaded = self.offloaded
        return self.weight if offloaded is None else offloaded.fetched(["weight"])["weight"]

    @property
    def planned_bytes(self) -> int:
        return quantize.nbytes(*self.shape, self.group)

    @property
    def nbytes(self) -> int:
        return 0 if self.packed is None else self.packed.nbytes + self.scales.nbytes

    def multiply(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """What a draft has for ``F.linear`` with the layer's weights."""
        product = quantize.linear(input, self.packed, self.scales, bias)
        if not self.head:
            return product
        own = self.weight if self.offloaded is None else self.offloaded.rows
        return rescored(product, input, own, bias)

    def take(self, quantized: quantize.Quantized) -> None:
        values, scales = (part.to(self.device) for part in quantized)
        known = self.packed
        if (
            known is None
            or (known.device, known.shape) != (values.device, values.shape)
            or self.scales.shape != scales.shape
        ):
            self.packed, self.scales = quantize.pack(values, quantized.group), scales
        else:  # stays where captured passes look for it
            quantize.pack(values, quantized.group, out=known)
            self.scales.copy_(scales)
        if self.joint is not None:
            self.joint.gather()

    def drop(self) -> None:
        self.packed = self.scales = self.made_of = None
        if self.joint is not None:
            self.joint.drop()

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles of a model begin without, as they do without engines, and make theirs.
        return {**vars(self), "packed": None, "scales": None, "made_of": None}


class Twins:
    """The twins of one patched model. Nothing is made or changed before `make` and `attach`.

    Args:
        compiles: whether drafts are compiled; the compiler does not see who recognises weights.

    Attributes:
        twins: of the layers that can have one.
        offload: what of the model accelerate brings in for each pass.
        kept: why other layers keep their weights, by name.
        missing: why there are none although there should be, or None.
    """

    def __init__(self, model: Any, compiles: bool = False):
        self.compiles = compiles
        self.twins: list[Twin] = []
        self.kept: dict[str, str] = {}
        self.joints: list[Joint] = []
        self.missing: str | None = None
        self.offload = Offload(self)
        self.offload.follow(model)
        output = model.get_output_embeddings()
        heads = set() if output is None else {*output.modules()}
        for name, layer in linear_layers(model):
            reason = self._refusal(layer)
            if reason is None:
                self.twins.append(Twin(name, layer, self, _is_replaced(layer), layer in heads))
            else:
                self.kept[name] = reason
        self._choose_groups()
        if not self.twins:
            self.missing = f"{_NONE}: {self.why_kept() or 'there is none'}"

    def _choose_groups(self) -> None:
        shapes = [twin.shape for twin in self.twins]
        rescoring = [CLASSES * twin.weight[0].nbytes for twin in self.twins if twin.head]
        for twin, group in zip(self.twins, quantize.group_sizes(shapes, sum(rescoring))):
            twin.group = group

    @property
    def planned_bytes(self) -> int:
        """What all twins are going to take."""
        return sum(twin.planned_bytes for twin in self.twins)

    @property
    def nbytes(self) -> int:
        """What the twins that there are take, and what else drafts read of offloaded weights."""
        return sum(twin.nbytes for twin in self.twins) + self.offload.nbytes

    @property
    def count(self) -> int:
        return sum(twin.packed is not None for twin in self.twins)

    def why_kept(self) -> str:
        reasons = Counter(self.kept.values())
        return "; ".join(f"{count} x {reason}" for reason, count in reasons.items())

    def attach(self) -> None:
        for twin in self.twins:
            if not twin.wrapped:
                twin.layer._std_decode_twin = twin
                twin.layer.__class__ = TwinnedLinear
                _bind(twin.layer, TwinnedLinear.forward)
        self.offload.attach()

    def detach(self) -> None:
        self.offload.detach()
        for twin in self.twins:
            if vars(twin.layer).get("_std_decode_twin") is twin:  # attach may have failed before
                twin.layer.__class__ = nn.Linear
                _bind(twin.layer, nn.Linear.forward)
                del twin.layer._std_decode_twin
            twin.drop()

    def _refusal(self, layer: nn.Linear) -> str | None:
        """Why a layer keeps its weights, or None."""
        if type(layer) not in PLAIN_LAYERS:
            return f"a {type(layer).__name__}, which is no plain nn.Linear"
        if type(layer) is TwinnedLinear and layer._std_decode_twin.owner is not self:
            return "a layer shared with another patched model, which has its twin"
        if self.compiles and "forward" in vars(layer):
            return "a replaced forward, which compile=True does not go with"
        offloaded = self.offload.of(layer)
        device = None if offloaded is None else offloaded.device
        return quantize.refusal(local(layer.weight), device)

    def reading(self) -> AbstractContextManager[Any]:
        """What a draft runs in, so that wrapped layers read their twins."""
        wrapped = [twin for twin in self.twins if twin.wrapped]
        return _Recognised(wrapped) if wrapped else nullcontext()

    def joint(self, layers: Sequence[nn.Linear]) -> Joint:
        """The twins of `layers`, which have the same input, as one product.

        Given the same layers again it is the same object. To be asked for before a draft is
        captured: twins that are made already move into one buffer.
        """
        found = next((joint for joint in self.joints if joint.layers == list(layers)), None)
        if found is None:
            own = {twin.layer: twin for twin in self.twins}
            found = Joint(list(layers), [own.get(layer) for layer in layers])
            self.joints.append(found)
            with _making, torch.inference_mode(False), torch.no_grad():
                found.gather()
        return found

    def make(
        self,
        model: Any,
        read: Callable[[str], quantize.Quantized | None] = lambda name: None,
        keep: Callable[[str, quantize.Quantized], None] = lambda name, quantized: None,
    ) -> None:
        """Make the twins that are missing or out of date.

        Args:
            read: gives the 4-bit weights of a layer where they are known.
            keep: is given those that were not.

        Raises:
            MemoryError: they do not fit; nothing was made.
        """
        # In inference mode tensors would be made that cannot be written to outside of it.
        with _making, torch.inference_mode(False), torch.no_grad():
            self.offload.follow(model)
            adapters = _merged_adapters(model)
            now = {twin: _made_of(twin, adapters) for twin in self.twins}
            stale = [twin for twin in self.twins if twin.made_of != now[twin]]
            for twin in stale:
                self.kept.pop(twin.name, None)
                reason = self._refusal(twin.layer)
                if reason is not None:
                    twin.drop()
                    self.kept[twin.name] = reason
            stale = [twin for twin in stale if twin.name not in self.kept]
            beside = self.beside()
            if not stale and not beside:
                return
            room.check([twin for twin in stale if twin.packed is None], beside)
            self.offload.make(beside)
            moments: dict[nn.Module, Moments] | None = None
            for twin in _with_progress(stale):
                quantized = read(twin.name)
                if quantized is None:
                    if moments is None:
                        moments = self._moments(model)
                    squares, mean = moments.get(twin.layer) or (None, None)
                    quantized = quantize.quantize(twin.whole(), squares, mean, twin.group)
                    keep(twin.name, quantized)
                twin.take(quantized)
                twin.made_of = now[twin]

    def beside(self) -> list[Offloaded]:
        """What drafts read of offloaded weights beside twins, and is missing or out of date."""
        twins = [twin for twin in self.twins if twin.name not in self.kept]
        if not twins:
            return []
        heads = {twin.layer for twin in twins if twin.head}
        return self.offload.expect({twin.layer for twin in twins}, heads)

    def _moments(self, model: Any) -> dict[nn.Module, Moments]:
        # Replaced forwards may be of ranks that share the model, and not all may come here.
        if any(twin.wrapped for twin in self.twins):
            return {}
        embedding = self.offload.of(model.get_input_embeddings())
        device = None if embedding is None else embedding.device
        return input_moments(model, [twin.layer for twin in self.twins], device)

    def refresh(self, model: Any) -> Twins | None:
        """Have the twins follow the model's weights. None where there are none to draft with.

        Noticed are weights that moved, were replaced, were changed in place (unless through
        ``weight.data``) and adapters that were merged. What goes unnoticed costs agreement only.
        """
        try:
            self.make(model)
            self.missing = None if self.count else f"{_NONE}: {self.why_kept()}"
        except (MemoryError, torch.OutOfMemoryError) as error:
            for twin in self.twins:
                twin.drop()
            self.offload.drop()
            self.missing = str(error).partition("\n")[0]
        return None if self.missing else self


def linear_layers(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """Those of the text decoder and the LM head; not those that adapters add beside them."""
    names = {module: name for name, module in model.named_modules()}
    beside: set[nn.Module] = set()
    for tuner in names:
        if isinstance(getattr(tuner, "base_layer", None), nn.Module):
            beside |= set(tuner.modules()) - set(tuner.base_layer.modules()) - {tuner}
    head = model.get_output_embeddings()
    heads = [] if head is None else head.modules()
    for module in dict.fromkeys((*model.get_decoder().modules(), *heads)):
        if isinstance(module, nn.Linear) and module not in beside:
            yield names[module], module


def local(weight: Tensor) -> Tensor:
    """What this process holds of a weight that tensor parallelism shares out."""
    return weight.to_local() if hasattr(weight, "to_local") else weight  # a DTensor


def _is_replaced(layer: nn.Linear) -> bool:
    """Whether somebody's function stands for its forward, and be it beneath accelerate's."""
    own = vars(layer).get("forward")
    if getattr(getattr(own, "func", None), "__module__", None) == "accelerate.hooks":
        own = vars(layer).get("_old_forward")
        return getattr(own, "__func__", None) not in _FORWARDS
    return own is not None


def _bind(layer: nn.Linear, forward: Callable[..., Tensor]) -> None:
    """Have `forward` be what accelerate calls, which has the method of the class before."""
    for name in ("_old_forward", "forward"):  # the latter once its hook has been removed
        bound = vars(layer).get(name)
        if getattr(bound, "__func__", None) in _FORWARDS:
            setattr(layer, name, MethodType(forward, layer))


def _made_of(twin: Twin, adapters: dict[nn.Module, tuple]) -> tuple:
    """What changes when a layer's weights do, as far as that can be seen without reading them."""
    if twin.offloaded is not None:
        return *twin.offloaded.origin("weight"), twin.device, adapters.get(twin.layer)
    weight = twin.weight
    plain = type(weight.data) is Tensor
    where = weight.data_ptr() if plain else id(twin.layer.weight)
    version = 0 if weight.is_inference() else weight._version
    return where, weight.device, weight.dtype, version, adapters.get(twin.layer)


def _merged_adapters(model: nn.Module) -> dict[nn.Module, tuple]:
    """The adapters merged into the layer that they are beside; PEFT merges unseen by versions."""
    return {
        module.base_layer: tuple(module.merged_adapters)
        for module in model.modules()
        if hasattr(module, "merged_adapters") and hasattr(module, "base_layer")
    }


def _with_progress(twins: list[Twin]) -> Iterator[Twin]:
    """Each in turn; someone at a terminal is told what takes so long."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    total = sum(twin.weight.numel() for twin in twins)
    task = progress.add_task("std_decode: 4-bit draft weights", total=total)
    start = time.monotonic()
    try:
        for twin in twins:
            yield twin
            progress.update(task, advance=twin.weight.numel())
            if time.monotonic() - start > SHOWN_AFTER:
                progress.start()
    finally:
        progress.stop()

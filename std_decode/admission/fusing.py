"""Decoder layers that run fused: which of a model's may, and that they compute the same.

Each layer that `recognised` knows is tried: three tokens go through the model in a pass of ours,
and each layer's result, keys and values are compared with what the fused layer makes of the very
same input. Only then is anything of the model changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from std_decode.admission.eligibility import undisturbed
from std_decode.admission.recognised import unlike, unlike_norm
from std_decode.admission.trial import added_difference, allowed, input_device
from std_decode.model.cache import SparseToDenseCache
from std_decode.model.fused_layer import FusedLayer, FusedNorm, Fusion, fused_class, own_class
from std_decode.model.packed import unfit, users_of
from std_decode.model.running_pass import RUNNING, Pass
from std_decode.passes.engine import Engine
from std_decode.passes.promise import Promise
from std_decode.stats import DecodeStats

Wanted = Literal["auto"] | bool
PROMPT, TOKENS = 4, 3
_packing = RLock()


class Fused:
    """The fused layers of one patched model. Nothing is changed before `attach`.

    Args:
        layers: the attention modules of the decoder, by `layer_idx`.
        wanted: `patch`'s argument `fused_layers`.
        compiles: whether decoding passes are compiled, which fuses what is between products.

    Attributes:
        fusions: of the layers that can be fused.
        kept: why other layers are not, by name.
        off: why there are none, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: dict[int, nn.Module],
        wanted: Wanted,
        compiles: bool = False,
    ):
        self.fusions: list[Fusion] = []
        self.kept: dict[str, str] = {}
        self.norms: list[nn.Module] = []
        self.off = _switched_off(model, wanted, compiles)
        if self.off is not None:
            return
        decoder: Any = model.get_decoder()
        blocks = dict(_blocks(decoder, layers))
        users = users_of(model.named_parameters(remove_duplicate=False))
        for name, block in blocks.items():
            reason = unlike(block) or _taken(block)
            if reason is None:
                fusion = Fusion(self, name, block)
                reason = next(filter(None, (unfit(x, users) for x in fusion.joints)), None)
            if reason is None:
                self.fusions.append(fusion)
            else:
                self.kept[name] = reason
        if self.fusions:
            self._link(blocks, getattr(decoder, "norm", None))
            self._drop(_differing(model, layers, self.fusions))

    def _link(self, blocks: dict[str, nn.Module], last: nn.Module | None) -> None:
        """Tell each layer which norm its result goes to: it works that out with its own sum."""
        names = list(blocks)
        known = {fusion.name: fusion for fusion in self.fusions}
        for name, after in zip(names, [*names[1:], None]):
            if name not in known:
                continue
            if after in known:
                known[name].norm_after = known[after].layer.input_layernorm
            elif after is None and not unlike_norm(last):
                known[name].norm_after = last
                self.norms = [last]

    def _drop(self, reasons: dict[Fusion, str]) -> None:
        for fusion, reason in reasons.items():
            self.fusions.remove(fusion)
            self.kept[fusion.name] = reason

    @property
    def active(self) -> int:
        """How many layers run fused in the calls that begin now."""
        return sum(fusion.active for fusion in self.fusions)

    def attach(self) -> None:
        with _packing:
            for fusion in self.fusions:
                fusion.layer._std_decode_fusion = fusion
                kind: Any = type(fusion.layer)
                fusion.layer.__class__ = fused_class(kind)
                self._activate(fusion)
            for norm in self.norms:
                kind = type(norm)
                norm.__class__ = fused_class(kind, FusedNorm)

    def detach(self) -> None:
        for fusion in self.fusions:
            fusion.active = False
            if vars(fusion.layer).get("_std_decode_fusion") is fusion:  # attach may have failed
                fusion.layer.__class__ = own_class(type(fusion.layer))
                del fusion.layer._std_decode_fusion
            for joint in fusion.joints:
                joint.unpack()
        for norm in self.norms:
            norm.__class__ = own_class(type(norm))

    def join(self, twins: Any) -> None:
        """Have drafts read the 4-bit weights `twins` (None: they read none) of several layers as
        one."""
        for fusion in self.fusions if twins is not None else ():
            fusion.join(twins)

    def of_call(self, model: PreTrainedModel, promise: Promise) -> tuple[Fused | None, dict]:
        """What a call runs fused, and what its stats say of it."""
        because = self.off
        if because is None and promise.kind == "unpatched":
            because = "the promise is the unpatched model's bits"
        if because is None:
            self.refresh(model)
            because = self.why_kept()
        count = 0 if self.off is not None or promise.kind == "unpatched" else self.active
        stats = dict(fused_layers=count, fused_layers_because=because)
        return (self if count else None), stats

    def refresh(self, model: PreTrainedModel) -> None:
        """Have what is fused follow the model: layers that were changed since are not, and weights
        that were replaced or moved are laid side by side anew."""
        with _packing:
            users: Counter[int] | None = None
            for fusion in self.fusions:
                reason = unlike(fusion.layer)
                if reason is None and not fusion.intact:
                    fusion.gather()
                    if users is None:
                        users = users_of(model.named_parameters(remove_duplicate=False))
                    reason = next(filter(None, (unfit(x, users) for x in fusion.joints)), None)
                self.kept.pop(fusion.name, None)
                if reason is None:
                    self._activate(fusion)
                else:
                    fusion.active = False
                    self.kept[fusion.name] = reason

    def _activate(self, fusion: Fusion) -> None:
        try:
            for joint in fusion.joints:
                if not joint.intact:
                    joint.pack()
            fusion.active = True
        except (MemoryError, torch.OutOfMemoryError):
            fusion.active = False
            self.kept[fusion.name] = "no memory to lay its weights side by side"

    def why_kept(self) -> str | None:
        reasons = Counter(self.kept.values())
        told = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
        return told or (None if self.fusions else "there is no decoder layer")


def _switched_off(model: PreTrainedModel, wanted: Wanted, compiles: bool) -> str | None:
    if wanted is False:
        return "fused_layers is False"
    if compiles:
        return "compile=True fuses what is between products"
    device = input_device(model).type
    if wanted == "auto" and device != "cuda":
        return f"the model is on the {device.upper()}, not on a CUDA device"
    return None


def _taken(block: nn.Module) -> str | None:
    if isinstance(block, FusedLayer):
        return "a layer shared with another patched model, which fuses it"
    return None


def _blocks(decoder: nn.Module, layers: dict[int, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The decoder layers in their order: what the attention modules are in."""
    names = {id(module): name for name, module in decoder.named_modules()}
    for _, attention in sorted(layers.items()):
        name = names[id(attention)].rpartition(".")[0]
        yield name, decoder.get_submodule(name)


@torch.no_grad()
def _differing(
    model: PreTrainedModel, layers: dict[int, nn.Module], fusions: list[Fusion]
) -> dict[Fusion, str]:
    """Which of the layers compute something else than their fused form, and what was seen."""
    decoder, device = model.get_decoder(), input_device(model)
    vocabulary = decoder.config.get_text_config().vocab_size
    positions = torch.arange(PROMPT + TOKENS, device=device)[None]
    ids = (vocabulary // 2 + 11 * positions) % vocabulary
    found: dict[Fusion, str] = {}

    def forward(**inputs: Any) -> Any:
        return SimpleNamespace(logits=decoder(**inputs).last_hidden_state)

    cache = SparseToDenseCache(decoder.config, PROMPT + TOKENS, 1, device)
    engine = Engine(decoder.config, layers, cache, reselect=False)
    try:
        with undisturbed(model), _compared(fusions, found):
            engine.start(forward, DynamicCache(), None, None, DecodeStats())
            inputs = {"input_ids": ids[:, :PROMPT], "position_ids": positions[:, :PROMPT]}
            engine.prefill(**inputs)
            engine.verify(ids[:, PROMPT:], positions[:, PROMPT:], {})
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"a trial of it failed ({type(error).__name__}: {error})"
        return dict.fromkeys(fusions, reason)
    finally:
        cache.release()
    return found


@contextmanager
def _compared(fusions: list[Fusion], found: dict[Fusion, str]) -> Iterator[None]:
    handles = [
        fusion.layer.register_forward_hook(_comparing(fusion, found), with_kwargs=True)
        for fusion in fusions
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _comparing(fusion: Fusion, found: dict[Fusion, str]) -> Callable:
    """A hook that has the fused layer do again what the layer has just done."""

    def compare(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        running = RUNNING.get()
        if running is None or running.phase == "prefill":
            return
        if not isinstance(output, Tensor):
            found[fusion] = "results of another kind"
            return
        try:
            given = args[0] if args else kwargs["hidden_states"]
            rest = {name: x for name, x in kwargs.items() if name != "hidden_states"}
            written = _written(running, fusion)
            got = fusion(running, given, **rest)
            pairs = [(got, output, output - given)]
            pairs += [(new, old, old) for new, old in zip(_written(running, fusion), written)]
            worst = max(added_difference(*pair) for pair in pairs)
            if not worst < allowed(output.dtype):
                found[fusion] = f"another result in a trial (it differs by {worst:.1%})"
        except Exception as error:
            found[fusion] = f"a trial of it failed ({type(error).__name__}: {error})"

    return compare


def _written(running: Pass, fusion: Fusion) -> list[Tensor]:
    """The keys and values that the pass has written in a layer, ``[B, T, Hkv, D]``."""
    span = running.cache.span
    cached = running.cache.layers[fusion.layer.self_attn.layer_idx]
    rows, slots = span.rows.to(cached.device), span.slots.to(cached.device)
    return [cached.keys[rows, :, slots], cached.values[rows, :, slots]]

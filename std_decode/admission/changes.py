"""What has become of a model since patch tried it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from weakref import ref

from torch import nn
from transformers import PreTrainedModel

from std_decode.admission.eligibility import SUPPORTED, attention_layers
from std_decode.admission.implementation import attention_parts

# Hooks that do the same to a token whatever it is fed with: transformers' own, the one by which
# PEFT tells a batch's rows their adapters, and those of a trial that another thread makes.
_HARMLESS_HOOKS = (
    "transformers.",
    "std_decode.",
    "peft.tuners.lora.model._adapter_names_pre_forward_hook",
)


class Tried:
    """A model as its attention was tried; tried again when it is made of other parts.

    Attributes:
        layers: the decoder's attention modules, by `layer_idx`; the same dict as long as it lives.
        refusal: why the newest trial failed, or None.
        trials: how many there were.
    """

    def __init__(self, model: PreTrainedModel):
        self.layers = attention_layers(model)
        self.refusal: str | None = None
        self.trials = 1
        self.parts: tuple | None = self._parts(model)
        self.hooks = {handle for handle, _, _ in _hooks(model)}

    def reason(self, model: PreTrainedModel, rows: int) -> str | None:
        """Why a call of `model`, patched, with a batch of `rows` has to run as unpatched, or None.

        Modules that were replaced, weights of another dtype, quantised or pruned ones, another
        attention or forward: all are tried as patch would. A hook is not: it may do something to
        the last token of each pass, which is every token as long as nothing is drafted, and it may
        count its calls.
        """
        for handle, name, hook in _hooks(model):
            if handle not in self.hooks and not _described(hook).startswith(_HARMLESS_HOOKS):
                where = name or type(model).__name__
                return f"a hook was put on {where} after patch; unpatch and patch to have it tried"
        parts = self._parts(model)
        if parts != self.parts:
            self.parts, self.refusal = parts, self._try_again(model, rows)
            self.trials += 1
        return self.refusal

    def _try_again(self, model: PreTrainedModel, rows: int) -> str | None:
        try:
            layers = attention_layers(model, rows)  # PEFT's hook may expect as many
        except NotImplementedError as error:
            told = str(error).removeprefix("patch: ").removesuffix(f"; {SUPPORTED}")
            return f"the model was changed after patch: {told}"
        self.layers.clear()
        self.layers.update(layers)
        return None

    def take_as_it_is(self, model: PreTrainedModel) -> None:
        """What `patch` itself has done to the model since the trial is no change of it."""
        self.parts = self._parts(model)

    def _parts(self, model: PreTrainedModel) -> tuple:
        """What the decoder and the LM head are made of, so that a change shows.

        Values of weights are none.
        """
        head = model.get_output_embeddings()
        whole = [model.get_decoder()] if head is None else [model.get_decoder(), head]
        modules = [(ref(module), type(module)) for part in whole for module in part.modules()]
        weights = [(type(weight), weight.dtype) for part in whole for weight in part.parameters()]
        return modules, weights, attention_parts(model, self.layers)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "parts": None}  # a copy has parts of its own, and is tried again


def _hooks(model: nn.Module) -> Iterator[tuple[int, str, Any]]:
    """Handle (no two of a process are equal), the module's name, and the hook."""
    for name, module in model.named_modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for handle, hook in hooks.items():
                yield handle, name, hook


def _described(hook: Any) -> str:
    while isinstance(hook, partial):
        hook = hook.func
    return f"{getattr(hook, '__module__', '')}.{getattr(hook, '__qualname__', '')}"


def training_part(model: PreTrainedModel) -> str | None:
    """The name of a part of the decoder that computes otherwise because it is in training mode.

    As after ``get_peft_model``, whose adapters begin in it, in a model that is not. What of
    PyTorch and PEFT has no dropout computes the same in either mode.
    """
    for name, module in model.get_decoder().named_modules():
        if not module.training:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            inert = module.p == 0
        else:
            inert = type(module).__module__.startswith(("torch.nn.modules.", "peft."))
        if not inert:
            return name or type(module).__name__
    return None

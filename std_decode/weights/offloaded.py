"""Weights that accelerate keeps in main memory or on a disk until they are needed.

Copies of them are made from where they are, a module at a time. What drafts read is kept on the
device where the module computes; see `hooks` for how they come to read it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from std_decode.weights.ahead import Ahead, part_of
from std_decode.weights.hooks import (
    PassedBy,
    Still,
    align_hooks,
    brought_in,
    mix,
    only_moves,
    unmix,
)
from std_decode.weights.rows import Rows


@dataclass(eq=False)
class Offloaded:
    """A module whose weights are elsewhere, and what drafts have in their place.

    Attributes:
        owner: the twins of the patched model, by which its drafts are known.
        names: of what its hook brings in,
        resident: and of those that drafts read as they are.
        in_rows: whether of its weight drafts read a few rows only.
        kept, rows: what drafts read; empty until made, and in copies of a model.
        made_of: what that was made of, see `origin`.
        lent: what stands in the module while something else is lent to it.
    """

    module: nn.Module
    hook: Any
    names: tuple[str, ...]
    owner: object
    ahead: Ahead
    name: str
    in_rows: bool = False
    resident: tuple[str, ...] = ()
    kept: dict[str, Tensor] = field(default_factory=dict)
    rows: Rows | None = None
    made_of: Any = None
    lent: dict[str, Tensor] = field(default_factory=dict)
    is_lending: bool = False

    def __post_init__(self) -> None:
        self.device, self.part = torch.device(self.hook.execution_device), part_of(self.name)

    # --- where it is ---

    def fetched(
        self, names: Iterable[str] | None = None, pinned: bool = False
    ) -> dict[str, Tensor]:
        """What the hook would bring in, on the device where the module computes."""
        tensors = {}
        for name in self.names if names is None else names:
            tensor = self.hook.weights_map[name].to(self._placeholder(name).dtype)
            if pinned and not tensor.is_pinned():
                tensor = tensor.pin_memory()
            tensors[name] = tensor.to(self.device, non_blocking=pinned)
        return tensors

    def origin(self, name: str) -> tuple:
        """What changes when a weight does, as far as can be seen without reading it."""
        data = getattr(self.hook.weights_map, "dataset", self.hook.weights_map)
        key = getattr(self.hook.weights_map, "prefix", "") + name
        in_memory = getattr(data, "state_dict", data)
        held = in_memory.get(key) if isinstance(in_memory, dict) else None
        if held is None:
            return id(data), key, self._placeholder(name).dtype
        version = 0 if held.is_inference() else held._version
        return held.data_ptr(), held.dtype, version

    # --- what drafts have instead ---

    def expect(self, twinned: bool, in_rows: bool) -> None:
        """Say what is going to be made.

        Args:
            twinned: whether a 4-bit copy stands for its weight.
        """
        self.in_rows = in_rows
        other = "weight" if twinned or in_rows else None
        self.resident = tuple(name for name in self.names if name != other)

    @property
    def planned_bytes(self) -> int:
        rows = Rows.planned_bytes(self._placeholder("weight")) if self.in_rows else 0
        return rows + sum(self._placeholder(name).nbytes for name in self.resident)

    @property
    def kept_bytes(self) -> int:
        """Of what drafts read, without rows, which may be those of another."""
        return sum(tensor.nbytes for tensor in self.kept.values())

    @property
    def fetched_bytes(self) -> int:
        return sum(self._placeholder(name).nbytes for name in self.names)

    @property
    def stale(self) -> bool:
        return self.made_of != self._made_of()

    def _made_of(self) -> tuple:
        return self.resident, self.in_rows, [self.origin(name) for name in self.names]

    def make(self, others: Iterable[Offloaded]) -> None:
        """Bring in what drafts need. Rows that one of `others` has as well are shared with it."""
        self.drop()
        kept = {}
        for name, tensor in self.fetched(self.resident).items():
            held = nn.Parameter(tensor.clone(), requires_grad=False)  # not a view of a file
            kept[name] = held if name in self.module._parameters else held.data
        self.kept = kept
        if self.in_rows:
            rows = Rows(self.fetched(["weight"])["weight"])
            alike = (x.rows for x in others if x.rows is not None and x.device == self.device)
            self.rows = next((x for x in alike if x.dtype == rows.dtype and x.same(rows)), rows)
        self.made_of = self._made_of()

    def drop(self) -> None:
        self.kept, self.rows, self.made_of = {}, None, None

    # --- in a pass ---

    def attach(self) -> None:
        self.hook._std_decode_offloaded = self
        mix(self.hook, PassedBy)

    def detach(self) -> None:
        self.take_back()
        unmix(self.hook, "_std_decode_offloaded", self)
        self.drop()

    def moved(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """A call's arguments, on the device where the module computes."""
        if not kwargs and all(getattr(x, "device", None) == self.device for x in args):
            return args, kwargs
        send: Any = sys.modules["accelerate.hooks"].send_to_device
        skipped = self.hook.skip_keys
        return send(args, self.device), send(kwargs, self.device, skip_keys=skipped)

    def lend(self, tensors: dict[str, Tensor]) -> None:
        self.is_lending = True
        for name, tensor in tensors.items():
            store = self._store(name)
            before = self.lent[name] = store[name]
            if isinstance(before, nn.Parameter) and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=before.requires_grad)
            store[name] = tensor

    def lend_rows(self, ids: Tensor, *_: Any) -> Tensor:
        """Lend an embedding the rows of these ids alone, and say where they are, like `ids`."""
        assert self.rows is not None
        self.lend({"weight": self.rows[ids.flatten()]})
        self.lent["padding_idx"] = self.module.padding_idx
        self.module.padding_idx = None
        return torch.arange(ids.numel(), device=ids.device).view(ids.shape)

    def take_back(self) -> None:
        while self.lent:
            name, tensor = next(iter(self.lent.items()))
            if name == "padding_idx":
                self.module.padding_idx = tensor
            else:
                self._store(name)[name] = tensor
            del self.lent[name]
        self.is_lending = False

    def _store(self, name: str) -> dict[str, Any]:
        return self.module._parameters if name in self.module._parameters else self.module._buffers

    def _placeholder(self, name: str) -> Tensor:
        return self.lent[name] if name in self.lent else self._store(name)[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "kept": {}, "rows": None, "made_of": None}  # as a twin's


class Offload:
    """What of one patched model is offloaded, of what its drafts read.

    Attributes:
        found: by module.
        still: hooks that a draft needs not, of modules that have nothing offloaded.
    """

    def __init__(self, owner: object):
        self.owner, self.ahead, self.attached = owner, Ahead(), False
        self.found: dict[nn.Module, Offloaded] = {}
        self.still: list[Any] = []

    def follow(self, model: Any) -> None:
        """Find what is offloaded now."""
        before, self.found = self.found, {}
        hooks = [(n, m, hook) for n, m in _read_by_drafts(model) for hook in align_hooks(m)]
        still = []
        for name, module, hook in hooks:
            known = before.get(module)
            if known is not None and known.hook is hook:
                self.found[module] = before.pop(module)
            elif not isinstance(hook, PassedBy) and (names := brought_in(module, hook)):
                self.found[module] = Offloaded(module, hook, names, self.owner, self.ahead, name)
            elif not isinstance(hook, PassedBy) and only_moves(module, hook):
                still.append(hook)
        for gone in before.values():
            gone.detach()
        one_device = len({torch.device(hook.execution_device) for _, _, hook in hooks}) == 1
        still = still if one_device and self.found else []
        for hook in self.still:
            if hook not in still:
                unmix(hook, "_std_decode_owner", self.owner)
        self.still = still
        if self.attached:
            self.attach()

    def attach(self) -> None:
        self.attached = True
        for offloaded in self.found.values():
            offloaded.attach()
        for hook in self.still:
            hook._std_decode_owner = self.owner
            mix(hook, Still)

    def detach(self) -> None:
        self.attached = False
        for offloaded in self.found.values():
            offloaded.detach()
        for hook in self.still:
            unmix(hook, "_std_decode_owner", self.owner)
        self.ahead.clear()

    def of(self, module: nn.Module) -> Offloaded | None:
        """A module whose weight is offloaded; None where it has none, or has it there."""
        offloaded = self.found.get(module)
        return offloaded if offloaded is not None and "weight" in offloaded.names else None

    def expect(self, twinned: set[nn.Module], head: set[nn.Module]) -> list[Offloaded]:
        """What is to be made anew, with 4-bit copies of the weights of `twinned`."""
        for module, offloaded in self.found.items():
            copied = module in twinned
            offloaded.expect(copied, module in head if copied else _is_embedding(module))
        return [offloaded for offloaded in self.found.values() if offloaded.stale]

    def make(self, stale: list[Offloaded]) -> None:
        for offloaded in stale:
            offloaded.make(x for x in self.found.values() if x is not offloaded)

    def drop(self) -> None:
        for offloaded in self.found.values():
            offloaded.drop()

    @property
    def fetched_bytes(self) -> int:
        """What a dense pass fetches."""
        return sum(offloaded.fetched_bytes for offloaded in self.found.values())

    @property
    def nbytes(self) -> int:
        """What is kept for drafts."""
        rows = {id(x.rows): x.rows.nbytes for x in self.found.values() if x.rows is not None}
        return sum(rows.values()) + sum(x.kept_bytes for x in self.found.values())


def is_offloaded(model: Any) -> bool:
    """Whether accelerate brings in, for each pass, something that drafts read."""
    modules = _read_by_drafts(model)
    return any(brought_in(module, hook) for _, module in modules for hook in align_hooks(module))


def _read_by_drafts(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the text decoder, the embedding and the LM head, each once."""
    names = {module: name for name, module in model.named_modules()}
    parts = (model.get_input_embeddings(), model.get_decoder(), model.get_output_embeddings())
    for module in dict.fromkeys(m for part in parts if part is not None for m in part.modules()):
        yield names[module], module


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.weight.is_floating_point()

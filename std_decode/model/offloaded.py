"""Keys and values in the host's memory, and what a device keeps of them.

The prompt's are on the host. On the device a layer has the selected ones side by side, and behind
them those of the generated tokens: all that a draft reads. For a dense pass the prompt's are
copied into one of two rooms, the next layer's while this one attends, and the layer's selection is
renewed from there: nothing is copied twice in a round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from std_decode.costs.memory import free_memory, gigabytes
from std_decode.model.buffers import BufferLayer
from std_decode.model.selection_rules import Selection

if TYPE_CHECKING:
    from std_decode.model.cache import SparseToDenseCache

Pair = tuple[Tensor, Tensor]  # keys and values, [B, Hkv, tokens, D]


class OffloadedLayer(BufferLayer):
    """One decoder layer's keys and values; `keys` and `values` are what the device keeps.

    Attributes:
        host: of the prompt, in the host's memory, ``[B, Hkv, S, D]`` each; empty before the first.
        held: tokens that are there.
        width: selected keys, K. They are the first of `keys`; generated tokens follow.
        slots: where they are, int32 ``[B, Hkv, K]``: -1 where the index list is.
    """

    one_by_one = True

    def __init__(self, owner: SparseToDenseCache):
        super().__init__(owner, None)
        self.host: tuple[Tensor, ...] = ()
        self.held = self.width = 0
        self.slots: Any = None

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes

    @property
    def host_nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.host)

    # --- until the prompt is read ---

    def begin(self, like: Pair, tokens: int) -> None:
        """Make room on the host for a prompt of so many tokens.

        Raises:
            MemoryError: all layers' are more than is free there, or two layers' on the device.
        """
        self.dtype, self.device = like[0].dtype, like[0].device
        if self is self.owner.offloaded[0]:
            self._check_memory(like, tokens)
        self.host = tuple(self.owner.link.host_room(x, tokens) for x in like)
        self.is_initialized = True

    def _check_memory(self, like: Pair, tokens: int) -> None:
        layers, host = len(self.owner.offloaded), torch.device("cpu")
        staged = 2 * self.owner.capacity * sum(x[:, :, :1].nbytes for x in like)
        needs = {self.device: staged, host: staged if self.device == host else 0}
        needs[host] += layers * sum(self.owner.link.host_bytes(x, tokens) for x in like)
        for place, need in needs.items():
            free = free_memory(place)
            if need > free:
                raise MemoryError(
                    f"generate: keys and values of {len(like[0])} x {tokens} tokens in {layers} "
                    f"layers take {gigabytes(need)} of the memory of {place}, expected at most "
                    f"the {gigabytes(free)} that are free; give a shorter prompt or fewer rows"
                )

    def adopt(self, past: Any) -> None:
        """Take over the tokens of a layer of the caller's cache, wherever they are."""
        length = self.owner.longest
        for name, host in zip(("keys", "values"), self.host):
            old, new = getattr(past, name), host[:, :, :length]
            if old.device.type != "cpu":
                self.owner.link.store(old, new)
                continue
            new.copy_(old)
            if self.owner.order is None:  # need not be held a second time
                setattr(past, name, new)
        self.held = length

    def _write_prompt(self, key_states: Tensor, value_states: Tensor) -> Pair:
        owner, new = self.owner, (key_states, value_states)
        start = owner.longest
        end = start + self._of_prompt(key_states)
        if not self.is_initialized:
            self.begin(new, max(end, owner.to_read))
        if self.past is not None:
            self.adopt(self.past)
            self.past = None
        seen = new
        if start:
            rooms = owner.staging.take(self, start)
            for room, states in zip(rooms, new):
                room[:, :, start:end] = states
            seen = rooms[0][:, :, :end], rooms[1][:, :, :end]
        for states, host in zip(new, self.host):
            owner.link.store(states, host[:, :, start:end])
        self.held = end
        return seen

    def arrange(self, order: Tensor) -> None:
        self.owner.link.settle()
        index = order.cpu()[:, None, :, None]
        for host in self.host:
            host.copy_(host.take_along_dim(index, dim=2))

    def choose(self, selection: Selection, keys: Tensor, values: Tensor) -> None:
        """Select the keys of the first drafts, while the prompt's are on the device."""
        self.width = selection.width
        self.indices = selection.of(self.importance)
        self._make_room(keys.shape[2])
        self._keep(keys, values, self.owner.order)

    # --- afterwards ---

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> Pair:
        """Write T tokens behind the accepted ones.

        Returns:
            At prefill the prompt's keys and values; to a draft what the device keeps; to a dense
            pass all, as buffers of the cache's capacity that hold until the next layer but one.
        """
        owner, new = self.owner, (key_states, value_states)
        if owner.prefilling:
            return self._write_prompt(*new)
        if self.keys is None:
            self._make_room(owner.prompt)
        own = self.keys, self.values
        self._write(own, owner.span.slots + (self.width - owner.prompt), new)
        if owner.span.drafted:
            return own
        rooms = owner.staging.take(self, owner.prompt)
        generated = owner.longest - owner.prompt
        for room, kept in zip(rooms, own):
            tail = kept[:, :, self.width : self.width + generated]
            room[:, :, owner.prompt : owner.longest] = tail
        self._write(rooms, owner.span.slots, new)
        return rooms

    def _write(self, buffers: Pair, slots: Tensor, new: Pair) -> None:
        rows, slots = self.owner.span.rows.to(self.device), slots.to(self.device)
        for buffer, states in zip(buffers, new):
            buffer[rows, :, slots] = states.transpose(1, 2)

    def _make_room(self, prompt: int) -> None:
        """On the device, for the selected keys and as many tokens as the cache has room for."""
        tokens = self.width + self.owner.capacity - prompt
        old = self.keys, self.values
        self.keys, self.values = (
            host.new_empty(*host.shape[:2], tokens, host.shape[3], device=self.device)
            for host in self.host
        )
        for before, now in zip(old, (self.keys, self.values)):
            if before is not None:
                now[:, :, : before.shape[2]] = before

    def grow(self, capacity: int) -> None:
        self.owner.staging.clear()
        if self.keys is not None:
            self._make_room(self.owner.prompt)

    def _keep(self, keys: Tensor, values: Tensor, order: Tensor | None = None) -> None:
        """Have the selected ones on the device, of all; `order` as of `SparseToDenseCache`."""
        at = self.indices.clamp(min=0).long()
        if order is not None:
            at = order.to(self.device)[:, None].take_along_dim(at, dim=2)
        for own, everything in ((self.keys, keys), (self.values, values)):
            own[:, :, : self.width] = everything.take_along_dim(at[..., None], dim=2)
        place = torch.arange(self.width, dtype=torch.int32, device=self.device)
        self.slots = torch.where(self.indices < 0, self.indices, place)

    def listed(self) -> tuple[Tensor, Tensor, Tensor]:
        shift, owner = self.width - self.owner.prompt, self.owner
        return self.slots, owner.tail_start + shift, owner.span.kv_len + shift

    @property
    def scores(self) -> Tensor:
        return self.group.scores[0]

    def reselect(self, keys: Tensor, values: Tensor) -> None:
        """Renew the selection from this layer's newest scores, while all keys are at hand."""
        self.group.reselect(self.place, self.owner.tail_start)
        self._keep(keys, values)

    # --- at the end ---

    def hand_over(self, template: DynamicCache, index: int, new: slice) -> None:
        self.owner.link.settle()
        generated = self.owner.longest - self.owner.prompt
        told = []
        for host, kept in zip(self.host, (self.keys, self.values)):
            if generated:
                tail = kept[:, :, self.width : self.width + generated]
                host = torch.cat([host, tail.cpu()], dim=2)
                self.owner.link.stored += tail.nbytes
            told.append(host[:, :, new])
        if not template.offloading:
            template.update(*(x.to(self.device) for x in told), index)
            return
        # By itself it would fetch the layer after this one.
        while len(template.layers) <= index:
            template.layers.append(template.layer_class_to_replicate())
        layer = template.layers[index]
        if layer.is_initialized:  # transformers leaves one where it was needed
            layer.keys, layer.values = layer.keys.cpu(), layer.values.cpu()
        layer.update(*told)
        layer.device = self.device

    def drop(self) -> None:
        super().drop()
        self.host = ()


@dataclass(eq=False)
class _Room:
    """For one layer's tokens on the device, and whose they are."""

    buffers: Pair
    layer: OffloadedLayer | None = None
    length: int = 0
    fetched: Any = None


class Staging:
    """Two rooms on a device: a layer attends in one while the next one's tokens come to the other.

    Layers of other sizes have other rooms.
    """

    def __init__(self, owner: SparseToDenseCache):
        self.owner = owner
        self.rooms: dict[tuple, list[_Room]] = {}

    @property
    def nbytes(self) -> int:
        rooms = (room for rooms in self.rooms.values() for room in rooms)
        return sum(x.nbytes for room in rooms for x in room.buffers)

    def take(self, layer: OffloadedLayer, length: int) -> Pair:
        """A layer's first `length` tokens, in buffers of the cache's capacity.

        From now on the layer's after it come to the other room.
        """
        room = self._find(layer, length) or self._fetch(layer, length)
        self.owner.link.await_(room.fetched, layer.device)
        room.fetched = None
        layers = self.owner.offloaded
        after = (layers.index(layer) + 1) % len(layers)
        # At prefill the first layer's tokens are not all there before the last has attended.
        if (after or not self.owner.prefilling) and layers[after].held >= length:
            if self._find(layers[after], length) is None:
                self._fetch(layers[after], length, room)
        return room.buffers

    def _find(self, layer: OffloadedLayer, length: int) -> _Room | None:
        rooms = self._of(layer)
        return next((x for x in rooms if x.layer is layer and x.length == length), None)

    def _fetch(self, layer: OffloadedLayer, length: int, busy: _Room | None = None) -> _Room:
        room = next(x for x in self._of(layer) if x is not busy)
        sources = [host[:, :, :length] for host in layer.host]
        targets = [buffer[:, :, :length] for buffer in room.buffers]
        room.layer, room.length = layer, length
        room.fetched = self.owner.link.fetch(sources, targets)
        return room

    def _of(self, layer: OffloadedLayer) -> list[_Room]:
        shapes = [(*x.shape[:2], self.owner.capacity, x.shape[3]) for x in layer.host]
        key = (layer.device, layer.dtype, *shapes)
        if key not in self.rooms:
            like = dict(dtype=layer.dtype, device=layer.device)
            pairs: Any = [tuple(torch.empty(x, **like) for x in shapes) for _ in range(2)]
            self.rooms[key] = [_Room(pair) for pair in pairs]
        return self.rooms[key]

    def clear(self) -> None:
        self.owner.link.settle()  # a copy to a room may be under way
        self.rooms.clear()

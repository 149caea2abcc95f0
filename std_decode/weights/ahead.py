"""The weights of the next decoder layer are fetched while this one computes.

What a dense pass takes is noted, layer by layer; the pass after it has each layer's weights
fetched by a thread as soon as the layer before begins. So two layers' weights are here at a time,
and none when a pass has ended.
"""

from __future__ import annotations

import re
from collections import deque
from concurrent.futures import Future
from threading import Thread
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

if TYPE_CHECKING:
    from std_decode.weights.offloaded import Offloaded

PAGE = 4096  # bytes, of which one is read to have all of them read


class Ahead:
    """Of one patched model.

    Attributes:
        members: by layer, what the newest pass has taken in it.
        following: which layer came after each.
    """

    def __init__(self) -> None:
        self.streams: dict[torch.device, Any] = {}
        self.clear()

    def clear(self) -> None:
        """Begin as if there had been no pass."""
        self.members: dict[str, list[Offloaded]] = {}
        self.following: dict[str, str] = {}
        self.forget()

    def forget(self) -> None:
        """Begin a pass; what one that was broken off has left is let go of."""
        self.running: Any = lambda: None
        self.layer: str | None = None
        self.fetch: _Fetch | None = None
        self.next: _Fetch | None = None

    def take(self, offloaded: Offloaded, running: Any) -> dict[str, Tensor]:
        """What a module has offloaded, on the device where it computes.

        Args:
            running: the pass that needs it.
        """
        if self.running() is not running:
            self.forget()
            self.running = ref(running)
        if offloaded.part != self.layer:
            self._enter(offloaded.part)
        self.members[offloaded.part].append(offloaded)
        future = None if self.fetch is None else self.fetch.values.pop(offloaded, None)
        if future is None:
            return offloaded.fetched()
        tensors, event = future.result()
        if event is not None:
            stream = torch.cuda.current_stream(offloaded.device)
            stream.wait_event(event)
            for tensor in tensors.values():
                tensor.record_stream(stream)
        return tensors

    def _enter(self, layer: str) -> None:
        if self.layer is not None:
            self.following[self.layer] = layer
        self.fetch = self.next if self.next is not None and self.next.layer == layer else None
        self.layer, self.next = layer, None
        self.members[layer] = []
        following = self.following.get(layer)
        if following is not None:
            self.next = _Fetch(following, self.members[following], self._streams_of(following))
            self.next.start()

    def _streams_of(self, layer: str) -> dict[torch.device, tuple[Any, Any]]:
        """For each GPU that the layer computes on: where to copy, and what to wait for until the
        layer before last has been computed, whose memory is needed."""
        found = {}
        for device in {member.device for member in self.members[layer]}:
            if device.type == "cuda":
                if device not in self.streams:
                    # One only: what is freed on a stream is allocated on the same one again.
                    self.streams[device] = torch.cuda.Stream(device)
                computed = torch.cuda.Event()
                computed.record(torch.cuda.current_stream(device))
                found[device] = self.streams[device], computed
        return found

    def __reduce__(self) -> Any:
        return Ahead, ()  # copies of a model begin anew


class _Fetch(Thread):
    """Fetches what the modules of a layer have offloaded, in the order of their use.

    Args:
        streams: see `Ahead._streams_of`.
    """

    def __init__(
        self,
        layer: str,
        members: list[Offloaded],
        streams: dict[torch.device, tuple[Any, Any]],
    ):
        super().__init__(name=f"std_decode fetches {layer}", daemon=True)
        self.layer, self.streams = layer, streams
        self.values: dict[Offloaded, Future] = {member: Future() for member in members}
        self.pending = deque(self.values.items())

    def run(self) -> None:
        for _, computed in self.streams.values():
            computed.synchronize()
        while self.pending:
            offloaded, future = self.pending.popleft()
            try:
                future.set_result(self._fetched(offloaded))
            except BaseException as error:  # raised where it is waited for
                future.set_exception(error)
            del offloaded, future  # what is taken meanwhile is not held here as well

    def _fetched(self, offloaded: Offloaded) -> tuple[dict[str, Tensor], Any]:
        """The tensors, and on a GPU what to wait for until they are there."""
        if offloaded.device not in self.streams:
            tensors = offloaded.fetched()
            for tensor in tensors.values():  # of a mapped file, what is not read is not there yet
                tensor.flatten().view(torch.uint8)[::PAGE].sum()
            return tensors, None
        stream, _ = self.streams[offloaded.device]
        with torch.cuda.stream(stream):
            tensors = offloaded.fetched(pinned=True)
            event = torch.cuda.Event()
            event.record(stream)
        return tensors, event


def part_of(name: str) -> str:
    """The decoder layer that a module is in, or itself, by its name."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return found[0] if found else name

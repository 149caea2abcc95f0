"""Copies between the host's memory and a device's, and how many bytes they come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Link:
    """What one call copies either way.

    Tensors are ``[B, Hkv, tokens, D]``. Each head's tokens are copied for themselves: of a part of
    a buffer as a whole PyTorch would make a copy in pageable memory first, and wait for it.

    Attributes:
        fetched: bytes copied to the device so far.
        stored: and from there to the host.
    """

    def __init__(self) -> None:
        self.fetched = self.stored = 0
        self._streams: dict[torch.device, Any] = {}
        self._computing: set[torch.device] = set()  # CUDA devices that tokens are stored from

    def host_room(self, like: Tensor, tokens: int) -> Tensor:
        """Memory of the host for so many tokens, which a CUDA device can copy from by itself."""
        shape = (*like.shape[:2], tokens, like.shape[3])
        return torch.empty(shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")

    @staticmethod
    def host_bytes(like: Tensor, tokens: int) -> int:
        """What `host_room` may take: PyTorch rounds pinned memory up to a power of two."""
        count = like[:, :, :1].nbytes * tokens
        return 1 << (count - 1).bit_length() if like.device.type == "cuda" else count

    def store(self, source: Tensor, target: Tensor) -> None:
        """Begin copying tokens to the host, in the order of what the device computes."""
        for one, other in zip(source.flatten(0, 1), target.flatten(0, 1)):
            other.copy_(one, non_blocking=True)
        self.stored += source.nbytes
        if source.device.type == "cuda":
            self._computing.add(source.device)

    def fetch(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Any:
        """Begin copying tokens from the host, beside what the device computes from now on.

        Returns:
            For `await_`, before the tokens are read.
        """
        device = targets[0].device
        self.fetched += sum(source.nbytes for source in sources)
        if device.type != "cuda":
            return self._copy(sources, targets)
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))  # which may be reading the target
        with torch.cuda.stream(stream):
            self._copy(sources, targets)
            return stream.record_event()

    def _copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        for source, target in zip(sources, targets, strict=True):
            for one, other in zip(source.flatten(0, 1), target.flatten(0, 1)):
                other.copy_(one, non_blocking=True)

    def await_(self, fetched: Any, device: torch.device) -> None:
        """Have the device compute on once a `fetch` is through; the host does not wait."""
        if fetched is not None:
            torch.cuda.current_stream(device).wait_event(fetched)

    def settle(self) -> None:
        """Wait until all copies are through, and what they copy to may be read or freed."""
        for stream in self._streams.values():
            stream.synchronize()
        for device in self._computing:
            torch.cuda.current_stream(device).synchronize()

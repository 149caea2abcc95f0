"""A few frames of a long video file: which packets they take, and getting to these."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from std_decode.video.media import Deadline, open_video
from std_decode.video.packets import Packets, decode, no_frames, no_stamps

_NEVER = -(2**63)
_MORE = 4  # packets behind a wanted frame's, to see that none of them comes before it


@dataclass(frozen=True)
class Index:
    """A file's packets, numbered in its order.

    Attributes:
        packets: when each is shown and how many bytes it has, int64 ``[packets, 2]``.
        numbers: of those that are shown, in showing order, ``[total]``.
        keys: of those that decoding can start at, hidden ones too, ``[keys]``, ascending.
        starts: when these are decoded, ``[keys]``.
        time_base: unit of all times, in seconds.
        seeks: whether a time tells a place in the file.
    """

    packets: np.ndarray
    numbers: np.ndarray
    keys: np.ndarray
    starts: np.ndarray
    time_base: Fraction
    seeks: bool

    @property
    def stamps(self) -> np.ndarray:
        """When what is shown is, ``[total]``, ascending."""
        return self.packets[self.numbers, 0]


def read_index(path: Path, deadline: Deadline) -> Index:
    """Of all packets, without decoding them.

    Raises:
        InputError: cut off, no frames, or no time stamps.
    """
    packets, numbers, keys = array("q"), array("q"), array("q")
    placed = True
    with open_video(path) as (container, stream):
        source = Packets(container, stream, path, deadline)
        for number, packet in enumerate(source):
            packets.extend((_NEVER if packet.pts is None else packet.pts, packet.size))
            # One that came in a piece with another may get that one's time after seeking.
            placed = placed and packet.pos is not None
            if packet.pts is None:
                continue  # a frame's second field, or a frame, which decoding then shows
            if not packet.is_discard:
                numbers.append(number)
            if packet.is_keyframe:
                keys.extend((number, packet.pts if packet.dts is None else packet.dts))
        time_base = stream.time_base or Fraction(1)
    if packets and not numbers and not keys:
        raise no_stamps(path)
    table, chosen = np.array(packets, np.int64).reshape(-1, 2), np.array(numbers, np.int64)
    chosen = chosen[np.argsort(table[chosen, 0], kind="stable")]
    key_numbers, starts = np.array(keys, np.int64).reshape(-1, 2).T
    times = table[key_numbers, 0]
    if len(chosen) and (not len(times) or table[chosen[0], 0] < times[0]):
        # Of a recording that begins between two key frames.
        later = times[2] if len(times) > 2 else table[chosen[-1], 0]
        chosen = chosen[_decodable(path, table[chosen, 0], int(later), deadline)]
    if not len(chosen):
        raise no_frames(path)
    seeks = placed and not source.joined and bool((np.diff(times) > 0).all())
    return Index(table, chosen, key_numbers, starts, time_base, seeks)


def _decodable(path: Path, stamps: np.ndarray, later: int, deadline: Deadline) -> np.ndarray:
    """Which of these frames are decoded, up to a time from which on all are."""
    came = []
    with open_video(path) as (container, stream):
        for frame in decode(stream, Packets(container, stream, path, deadline)):
            if frame.pts is not None:
                came.append(frame.pts)
                if frame.pts >= later:
                    break
    return np.isin(stamps, came) | (stamps > later)


@dataclass
class _Run:
    """Packets `first` to `last` are decoded, for the shown frames `low` to `high`, by number."""

    first: int
    last: int
    low: int
    high: int


def _runs(index: Index, wanted: list[int], back: int) -> list[_Run]:
    """Each from the key frame on that is at or before a wanted frame, or `back` ones earlier."""
    runs: list[_Run] = []
    stamps, times = index.stamps, index.packets[index.keys, 0]
    lasts = np.maximum.accumulate(index.numbers)  # to have all frames up to one
    for high in wanted:
        key = int(np.searchsorted(index.keys, index.numbers[high], "right")) - 1
        while key >= 0 and times[key] > stamps[high]:  # an open GOP's, of the one before
            key -= 1
        low = int(np.searchsorted(stamps, times[key])) if key >= 0 else 0
        # The first one is seen as from the file's beginning, whatever it lacks.
        first = int(index.keys[key - back]) if high and key >= back else 0
        last = int(lasts[high]) + _MORE
        if runs and first <= runs[-1].last + 1:
            runs[-1].last, runs[-1].high = last, high
        else:
            runs.append(_Run(first, last, low, high))
    return runs


def decode_runs(
    container: Any,
    stream: Any,
    path: Path,
    index: Index,
    wanted: list[int],
    deadline: Deadline,
    seek: bool,
    back: int,
) -> Iterator[Any]:
    """The wanted frames, by number; ends where the frames are not those that the packets tell.

    Args:
        seek: get to packets by seeking, else by reading on.
        back: key frames before the one that a frame follows, to start at.
    """
    reader = _Reader(container, stream, path, index, deadline, seek)
    chosen, stamps = set(wanted), index.stamps
    for run in _runs(index, wanted, back):
        due = run.low
        for frame in decode(stream, reader.read(run.first, run.last)):
            if frame.pts is None or due > run.high:
                break
            if frame.pts < stamps[run.low]:
                continue  # before the key frame, of an open GOP, or from further back
            if frame.pts != stamps[due]:
                return
            if due in chosen:
                yield frame
            due += 1
        if due <= run.high:
            return


class _Reader:
    """Packets by number, each once and in order."""

    def __init__(
        self, container: Any, stream: Any, path: Path, index: Index, deadline: Deadline, seek: bool
    ):
        self.container, self.stream, self.index = container, stream, index
        self.deadline, self.seek = deadline, seek
        self.next = 0
        self.times = index.packets[index.keys, 0]
        self.packets: Iterator[tuple[int, Any]] = enumerate(
            Packets(container, stream, path, deadline)
        )

    def read(self, first: int, last: int) -> Iterator[Any]:
        """These, for a decoder that has none of those before; fewer where they are not found."""
        self.stream.codec_context.flush_buffers()
        if self.seek and first > self.next:
            self._seek(first)
        for number, packet in self.packets:
            self.deadline.check()
            self.next = number + 1
            if number >= first:
                yield packet
            if number >= last:
                return

    def _seek(self, first: int) -> None:
        """To this packet, a key frame, or to one before."""
        from av.error import FFmpegError

        self.packets = iter(())
        key = int(np.searchsorted(self.index.keys, first))
        # Some formats are sought by showing times, some by decoding times, which are earlier;
        # where both come out too late, further back.
        for earlier in range(key, max(-1, key - 3), -1):
            for place in (self._at(self.index.keys[earlier])[0], int(self.index.starts[earlier])):
                try:
                    self.container.seek(place, stream=self.stream)
                except FFmpegError:
                    continue
                found = self._next_key()
                if found is not None and found[0] <= first:
                    number, packet, packets = found
                    self.packets = enumerate(chain([packet], packets), number)
                    return

    def _next_key(self) -> tuple[int, Any, Iterator[Any]] | None:
        """Number of the next key frame that is known, itself, and what follows it."""
        packets = (packet for packet in self.container.demux(self.stream) if packet.size)
        for packet in packets:
            self.deadline.check()
            mark = _mark(packet)
            key = int(np.searchsorted(self.times, mark[0]))
            if key < len(self.times) and self._at(self.index.keys[key]) == mark:
                return int(self.index.keys[key]), packet, packets
        return None

    def _at(self, number: int) -> tuple[int, int]:
        time, size = self.index.packets[number]
        return int(time), int(size)


def _mark(packet: Any) -> tuple[int, int]:
    """What a packet is known by."""
    return _NEVER if packet.pts is None else packet.pts, packet.size

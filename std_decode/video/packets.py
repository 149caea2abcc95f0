"""Which pictures a video file shows, and when: packets are not frames, and headers count neither.

Edit lists hide packets, recorders write empty ones, decoders drop what they cannot begin with, and
where recordings were joined end to end the time stamps begin anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from std_decode.errors import InputError
from std_decode.video.media import MOST_PACKETS, Deadline

MOST_GAP = 10  # seconds; a longer one in a broadcast is a joint, as in ffmpeg
_MOST_TIME = 2**62


class Packets:
    """The packets with data, from the file's beginning on, with time stamps that go on.

    Attributes:
        joined: whether stamps had to be moved so far, so that the file's own are no places.

    Raises:
        InputError: cut off, or too many, when iterated over.
    """

    def __init__(self, container: Any, stream: Any, path: Path, deadline: Deadline):
        self.container, self.stream, self.path, self.deadline = container, stream, path, deadline
        self.format = container.format.name
        self.joined = False
        self._shift = self._step = 0
        self._last: int | None = None  # decoding time as the file has it
        self._end: int | None = None  # of what is shown

    def __iter__(self) -> Iterator[Any]:
        count, frames = 0, self.stream.frames
        for packet in self.container.demux(self.stream):
            self.deadline.check()
            if packet.size:
                count += 1
                if count > MOST_PACKETS:
                    raise InputError(f"{self.path}: more than {MOST_PACKETS:,} frames; cut it")
                self._go_on(packet)
                yield packet
        if count < frames and (count < self._indexed() or _is_cut_off(self.path, self.format)):
            raise InputError(f"{self.path}: truncated: {count} of {frames} frames are there")

    def _indexed(self) -> int:
        """Packets with data that the file's index leads to; PyAV before 17 does not tell."""
        return sum(entry.size > 0 for entry in getattr(self.stream, "index_entries", ()))

    def _go_on(self, packet: Any) -> None:
        if packet.dts is not None:
            if self._last is not None and self._is_joint(packet):
                self.joined = True
                shift = self._last + self._shift + self._step - packet.dts
                if packet.is_keyframe and None not in (packet.pts, self._end):
                    # A recording that is not reordered, after one that is.
                    shift = max(shift, self._end - packet.pts)
                self._shift = shift
            self._last, self._step = packet.dts, packet.duration or step(self.stream)
        if self._shift:
            for name in ("pts", "dts"):
                time = getattr(packet, name)
                if time is not None:
                    setattr(packet, name, max(-_MOST_TIME, min(time + self._shift, _MOST_TIME)))
        if packet.pts is not None:
            end = packet.pts + (packet.duration or step(self.stream))
            self._end = end if self._end is None else max(self._end, end)

    def _is_joint(self, packet: Any) -> bool:
        """Whether another recording begins here."""
        since = packet.dts - self._last
        back = since < -2 * self._step  # a step or two are some muxers' rounding
        if self.format in ("mpegts", "mpeg"):
            return back or since * self.stream.time_base > MOST_GAP
        # Elsewhere a gap is one, and some formats give as decoding times those of showing, of
        # which only a key frame's never go back. In MP4 those before an edit's beginning do.
        return back and packet.is_keyframe and not self.format.startswith("mov")


def step(stream: Any) -> int:
    """From frame to frame, in units of the stream's time base, where nothing else tells."""
    rate, base = stream.average_rate, stream.time_base
    return max(1, round(1 / (rate * base))) if rate and base else 1


def decode(stream: Any, packets: Iterable[Any]) -> Iterator[Any]:
    """The frames of these packets, in the order in which they are shown, to the last."""
    from av.error import InvalidDataError

    begun = False
    for packet in chain(packets, [None]):
        try:
            frames = stream.codec_context.decode(packet)
        except InvalidDataError:
            if begun:
                raise
            continue  # nothing to begin with before the first key frame
        begun = begun or bool(frames)
        yield from frames


def shown(
    container: Any, stream: Any, path: Path, deadline: Deadline
) -> Iterator[tuple[int, Any]]:
    """Every frame, by decoding all, and its time stamp, in the stream's time base.

    Where a format does not tell when frames are shown that come in another order, the stamps are
    those of all frames, but not each its own.

    Raises:
        InputError: cut off, without time stamps, or without a frame.
    """
    stamp: int | None = None
    for frame in decode(stream, Packets(container, stream, path, deadline)):
        if frame.pts is not None:
            stamp = frame.pts
        elif stamp is None:
            raise no_stamps(path)
        else:
            stamp += step(stream)
        yield stamp, frame
    if stamp is None:
        raise no_frames(path)


def no_stamps(path: Path) -> InputError:
    return InputError(
        f"{path}: has no time stamps; put it into a container: ffmpeg -i {path.name} "
        "-c copy new.mp4"
    )


def no_frames(path: Path) -> InputError:
    return InputError(f"{path}: has no frames that can be decoded, or is truncated")


def _is_cut_off(path: Path, name: str) -> bool:
    """Whether a file that holds fewer packets than its header counts ends too early.

    Headers of AVI and MP4 count empty and hidden packets too: there, whether an outermost part
    says that it goes on behind the file's end. Of other formats the count is believed.
    """
    size, at = path.stat().st_size, 0
    with path.open("rb") as file:
        while at + 16 <= size:
            file.seek(at)
            head = file.read(16)
            if name == "avi":
                known, length = head[:4] == b"RIFF", int.from_bytes(head[4:8], "little")
                length += 8 if length else 0
            else:
                known = name.startswith("mov") and head[4:8].isalnum()
                long = head[:4] == b"\0\0\0\1"
                length = int.from_bytes(head[8:16] if long else head[:4], "big")
            if not known:
                return at == 0
            if length < 8:  # never filled in, or all that follows
                return True
            at += length
    return at > size

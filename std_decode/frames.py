"""Frames of any video file, at even distances in time, in bounded memory and time."""

from __future__ import annotations

import bisect
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from std_decode.media import MOST_PACKETS, Deadline, InputError, open_video

# Decoded frames in memory come to 192 MiB at most, however long and large the video is.
MOST_PIXELS = 2**26


@dataclass(frozen=True)
class Video:
    """Frames of a video, at even distances in time.

    Attributes:
        frames: RGB, uint8 ``[F, H, W, 3]``.
        indices: of these frames among the `total` ones, ascending.
        total: frames in the file.
        fps: of the file, on average.
    """

    frames: np.ndarray
    indices: list[int]
    total: int
    fps: float

    @property
    def seconds(self) -> float:
        return self.total / self.fps


def read_video(path: Path, frames: int) -> Video:
    """Decode at most `frames` frames (1 to 4096) of any video file, evenly over its length.

    Seeks to what it needs. Frames are made smaller where all of them would have more than 2^26
    pixels, and turned upright as the file says.

    Raises:
        InputError: missing, a folder, empty, no video, cut off, without time stamps, or too large
            (see media.py).
    """
    deadline = Deadline(path)
    with open_video(path) as (container, stream):
        stamps, keys = _time_stamps(container, stream, path, deadline)
        wanted = _evenly(stamps, frames)
        pictures = _decode(container, stream, stamps[wanted].tolist(), keys, deadline)
        time_base = stream.time_base or Fraction(1)
    if len(pictures) < len(wanted):
        raise InputError(f"{path}: truncated: some frames cannot be decoded")
    since = [float((int(stamps[i]) - int(stamps[0])) * time_base) for i in (*wanted, -1)]
    length = since.pop()
    fps = (len(stamps) - 1) / length if length else 1.0
    return Video(np.stack(pictures), [round(x * fps) for x in since], len(stamps), fps)


def _time_stamps(
    container: Any, stream: Any, path: Path, deadline: Deadline
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Of all frames, int64, and of those that decoding can start at, with their decoding times."""
    stamps, keys = array("q"), []
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.pts is None:
            raise InputError(
                f"{path}: has no time stamps; put it into a container: ffmpeg -i {path.name} "
                "-c copy new.mp4"
            )
        if len(stamps) == MOST_PACKETS:
            raise InputError(f"{path}: more than {MOST_PACKETS:,} frames; cut it")
        stamps.append(packet.pts)
        if packet.is_keyframe:
            keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        deadline.check()
    if not stamps:
        raise InputError(f"{path}: has no frames, or is truncated")
    if len(stamps) < stream.frames:
        raise InputError(f"{path}: truncated: {len(stamps)} of {stream.frames} frames are there")
    return np.unique(np.array(stamps)), sorted(keys)


def _evenly(stamps: np.ndarray, frames: int) -> list[int]:
    """Indices of the frames nearest to evenly spread times, each once."""
    if len(stamps) <= frames:
        return list(range(len(stamps)))
    stamps = stamps.astype(np.float64)  # differences may be beyond int64
    times = np.linspace(stamps[0], stamps[-1], frames)
    at = np.searchsorted(stamps, times).clip(1, len(stamps) - 1)
    before = stamps[at - 1], stamps[at]
    return sorted(set((at - (times - before[0] < before[1] - times)).tolist()))


def _decode(
    container: Any,
    stream: Any,
    wanted: list[int],
    keys: list[tuple[int, int]],
    deadline: Deadline,
) -> list[np.ndarray]:
    """The pictures at these time stamps, as far as they are there, all of the first one's size."""
    pictures: list[np.ndarray] = []
    source, at = None, -math.inf  # where decoding has come to
    shape: tuple[int, int] | None = None
    turns = 0
    for stamp in wanted:
        key = bisect.bisect_right(keys, (stamp, math.inf)) - 1
        if source is None or (key >= 0 and keys[key][0] > at):
            source = _frames_from(container, stream, stamp, keys[max(0, key - 2) : key + 1])
        for frame in source:
            deadline.check()
            at = frame.pts if frame.pts is not None else at
            if at >= stamp:
                if shape is None:
                    shape, turns = _size(frame, len(wanted)), round(frame.rotation / 90) % 4
                pictures.append(_picture(frame, *shape, turns))
                break
    return pictures


def _frames_from(
    container: Any, stream: Any, stamp: int, keys: list[tuple[int, int]]
) -> Iterator[Any]:
    """Frames in order, from one on that is not after `stamp`, as near as can be."""
    # Some formats are sought by showing times, some by decoding times, which are earlier; where
    # both come out too late, further back.
    for place in (*(time for key in reversed(keys) for time in key), -(2**62)):
        container.seek(place, stream=stream, backward=True)
        frames = container.decode(stream)
        first = next(frames, None)
        if first is not None and (first.pts is None or first.pts <= stamp):
            break
    return chain([] if first is None else [first], frames)


def _size(frame: Any, frames: int) -> tuple[int, int]:
    """Width and height that so many such frames are kept in."""
    shrink = min(1.0, math.sqrt(MOST_PIXELS / frames / (frame.width * frame.height)))
    # No less than a pixel, but of a frame that is long and thin not more than all may have.
    width, height = (max(1, int(side * shrink)) for side in (frame.width, frame.height))
    most = MOST_PIXELS // frames
    return min(width, most // height or 1), min(height, most // width or 1)


def _picture(frame: Any, width: int, height: int, turns: int) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA")
    return np.rot90(pixels, turns)

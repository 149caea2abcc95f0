"""Frames of any video file, at even distances in time, in bounded memory and time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from std_decode.errors import InputError
from std_decode.video.media import Deadline, open_video
from std_decode.video.packets import shown
from std_decode.video.seeking import Index, decode_runs, read_index

# Decoded frames in memory come to 192 MiB at most, however long and large the video is.
MOST_PIXELS = 2**26


@dataclass(frozen=True)
class Video:
    """Frames of a video, at even distances in time.

    Attributes:
        frames: RGB, uint8 ``[F, H, W, 3]``.
        indices: of these frames among the `total` ones, ascending.
        total: frames that a player shows of the file.
        fps: of these, on average.
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

    Frames and their times are those that a player shows: without what an edit list hides, and one
    after another where recordings were joined. Seeks to what it needs, and decodes the whole file
    only where its packets do not tell its frames. Frames are made smaller where all of them would
    have more than 2^26 pixels, and turned upright as the file says.

    Raises:
        InputError: missing, a folder, empty, no video, cut off, without time stamps, or too large
            (see video/media.py).
    """
    deadline = Deadline(path)
    index = read_index(path, deadline)
    stamps = index.stamps
    wanted = _evenly(stamps, frames)
    pictures = _seek(path, index, wanted, deadline)
    if pictures is None:
        stamps = _all_stamps(path, deadline)
        wanted = _evenly(stamps, frames)
        pictures = _decode_all(path, wanted, deadline)
    since = [float((int(stamps[i]) - int(stamps[0])) * index.time_base) for i in (*wanted, -1)]
    length = since.pop()
    fps = (len(stamps) - 1) / length if length else 1.0
    return Video(np.stack(pictures), [round(x * fps) for x in since], len(stamps), fps)


def _seek(
    path: Path, index: Index, wanted: list[int], deadline: Deadline
) -> list[np.ndarray] | None:
    """The wanted pictures, or None where the packets do not tell the frames.

    That is seen where more, fewer or other frames are decoded than the packets say: two fields or
    hidden pictures in packets of their own, two frames in one packet, damage.
    """
    # Once more from further back: where no picture is whole, but a part of each is renewed, all
    # are right from the next key frame but one on. And without seeking, which may have led astray.
    for seek, back in ((True, 0), (False, 2)):
        if seek and not index.seeks:
            continue
        with open_video(path) as (container, stream):
            frames = decode_runs(container, stream, path, index, wanted, deadline, seek, back)
            pictures = _pictures(frames, len(wanted))
        if len(pictures) == len(wanted):
            return pictures
    return None


def _all_stamps(path: Path, deadline: Deadline) -> np.ndarray:
    """When each frame is shown, by decoding all, int64 ``[total]``."""
    with open_video(path) as (container, stream):
        times = [time for time, _ in shown(container, stream, path, deadline)]
    return np.sort(np.array(times, np.int64))


def _decode_all(path: Path, wanted: list[int], deadline: Deadline) -> list[np.ndarray]:
    chosen = set(wanted)
    with open_video(path) as (container, stream):
        frames = (frame for _, frame in shown(container, stream, path, deadline))
        pictures = _pictures((f for i, f in enumerate(frames) if i in chosen), len(wanted))
    if len(pictures) < len(wanted):
        raise InputError(f"{path}: truncated: some frames cannot be decoded")
    return pictures


def _evenly(stamps: np.ndarray, frames: int) -> list[int]:
    """Indices of the frames nearest to evenly spread times, each once."""
    if len(stamps) <= frames:
        return list(range(len(stamps)))
    stamps = stamps.astype(np.float64)  # differences may be beyond int64
    times = np.linspace(stamps[0], stamps[-1], frames)
    at = np.searchsorted(stamps, times).clip(1, len(stamps) - 1)
    before = stamps[at - 1], stamps[at]
    return sorted(set((at - (times - before[0] < before[1] - times)).tolist()))


def _pictures(frames: Iterable[Any], most: int) -> list[np.ndarray]:
    """At most so many, upright and all of the first one's size."""
    pictures: list[np.ndarray] = []
    for frame in frames:
        if not pictures:
            shape, turns = _size(frame, most), round(frame.rotation / 90) % 4
        pictures.append(_picture(frame, *shape, turns))
    return pictures


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

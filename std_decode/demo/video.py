"""Camera clips as real video files: written and read with PyAV."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from std_decode.demo.camera import (
    COLOURS,
    FRAME,
    FRAMES_PER_SECOND,
    PATTERNS,
    TAGS,
    Clip,
    draw_seconds,
)
from std_decode.errors import InputError
from std_decode.video.media import Deadline, open_video
from std_decode.video.packets import shown

SCALE = 4  # pixels of the file per pixel of the camera
MOST_SECONDS = 4096  # 16,384 video tokens
_NOISE = 0.05
_SAME_TIME = 1e-6
_TAG = "comment"  # of the container, where a rendered clip tells its own content


def render(clip: Clip, path: Path, rng: np.random.Generator) -> None:
    """Film `clip` into an H.264 file: 224 x 224 noisy pixels, two frames a second."""
    import av

    side = FRAME * SCALE
    with av.open(str(path), "w", format="mp4") as container:
        container.metadata[_TAG] = json.dumps(clip.to_dict())
        stream: Any = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width = stream.height = side
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "14", "preset": "fast"}
        for picture in draw_seconds(clip):
            for _ in range(FRAMES_PER_SECOND):
                noisy = picture + rng.normal(0, _NOISE, picture.shape)
                pixels = (np.clip(noisy, 0, 1) * 255).round().astype(np.uint8)
                large = pixels.transpose(1, 2, 0).repeat(SCALE, 0).repeat(SCALE, 1)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(large, format="rgb24")))
        container.mux(stream.encode())


def read(path: Path) -> tuple[np.ndarray, Clip | None]:
    """Decode any video file to what the demo model sees.

    Returns:
        uint8 RGB ``[2 * seconds, 56, 56, 3]``, sampled at two frames a second, and the clip that
        was rendered into the file, or None if it is no file of `render`.

    Raises:
        InputError: missing, a folder, empty, no video, or cut off.
    """
    with open_video(path) as (container, stream):
        frames = _sample(container, stream, path)
        told = container.metadata.get(_TAG, "")
    return frames, _clip(told)


def _sample(container: Any, stream: Any, path: Path) -> np.ndarray:
    """Two frames a second: at each half second the newest frame there is."""
    frames: list[np.ndarray] = []
    start, at, newest = None, 0.0, None

    def show_until(end: float) -> None:
        while newest is not None and len(frames) / FRAMES_PER_SECOND < end:
            if len(frames) == MOST_SECONDS * FRAMES_PER_SECOND:
                raise InputError(
                    f"{path}: longer than {MOST_SECONDS} s, the most the demo model takes"
                )
            frames.append(newest)

    for stamp, frame in shown(container, stream, path, Deadline(path)):
        start = stamp if start is None else start
        at = max(at, float((stamp - start) * (stream.time_base or 1)))
        show_until(at - _SAME_TIME)
        newest = frame.to_ndarray(format="rgb24", width=FRAME, height=FRAME, interpolation="AREA")
    show_until(at + _SAME_TIME)
    if len(frames) < FRAMES_PER_SECOND:
        raise InputError(f"{path}: shorter than the one second that a time step takes")
    return np.stack(frames)


def _clip(told: str) -> Clip | None:
    """What a file says of itself, which may be anything."""
    try:
        clip = Clip.from_dict(json.loads(told))
        values = [value for event in clip.events for value in asdict(event).values()]
        possible = all(type(value) is int for value in values) and all(
            0 <= event.second < clip.seconds <= MOST_SECONDS
            and 0 <= event.tag < TAGS
            and 0 <= event.colour < len(COLOURS)
            and 0 <= event.pattern < len(PATTERNS)
            for event in clip.events
        )
        return clip if possible and len(clip.events) <= TAGS else None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None

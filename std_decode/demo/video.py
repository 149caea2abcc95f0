"""Camera clips as real video files: written and read with PyAV."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from std_decode.demo.camera import FRAME, FRAMES_PER_SECOND, Clip, draw_seconds

SCALE = 4  # pixels of the file per pixel of the camera
MOST_SECONDS = 4096  # 16,384 video tokens
_NOISE = 0.05
_SAME_TIME = 1e-6
_TAG = "comment"  # of the container, where a rendered clip tells its own content


class VideoError(ValueError):
    """A file that cannot be read as a video; the message is one line, for a user."""


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
        VideoError: missing, a folder, empty, no video, or cut off.
    """
    import av

    if not path.exists():
        raise VideoError(f"{path}: no such file")
    if not path.is_file():
        raise VideoError(f"{path}: not a file; expected a video such as clip.mp4")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: the file is empty")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path}: has no video stream")
            frames = _sample(container, path)
            told = container.metadata.get(_TAG, "")
    except av.error.FFmpegError as error:
        what = str(error.strerror).lower()
        raise VideoError(f"{path}: not a readable video, or a truncated one ({what})") from error
    return frames, _clip(told)


def _sample(container: Any, path: Path) -> np.ndarray:
    """Two frames a second: at each half second the newest frame there is."""
    stream = container.streams.video[0]
    start = float((stream.start_time or 0) * stream.time_base)
    frames: list[np.ndarray] = []
    decoded, at, newest = 0, 0.0, None

    def show_until(end: float) -> None:
        while newest is not None and len(frames) / FRAMES_PER_SECOND < end:
            if len(frames) == MOST_SECONDS * FRAMES_PER_SECOND:
                raise VideoError(
                    f"{path}: longer than {MOST_SECONDS} s, the most the demo model takes"
                )
            frames.append(newest)

    for frame in container.decode(stream):
        decoded += 1
        at = max(at, (frame.time or 0.0) - start)
        show_until(at - _SAME_TIME)
        newest = frame.to_ndarray(format="rgb24", width=FRAME, height=FRAME, interpolation="AREA")
    show_until(at + _SAME_TIME)
    if decoded < stream.frames:
        raise VideoError(f"{path}: truncated: {decoded} of {stream.frames} frames are there")
    if len(frames) < FRAMES_PER_SECOND:
        raise VideoError(f"{path}: shorter than the one second that a time step takes")
    return np.stack(frames)


def _clip(told: str) -> Clip | None:
    try:
        return Clip.from_dict(json.loads(told))
    except (ValueError, TypeError, KeyError):
        return None

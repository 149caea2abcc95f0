"""Opening a video file that may come from a stranger: within bounds, and with errors of one line.

A file is read as what it contains, whatever its name. Only formats that hold the video themselves
are opened: a playlist, a cue sheet or an SDP description would have ffmpeg open other files and
addresses.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from std_decode.errors import InputError

# 8192 x 4096, so 8K. A decoder may keep some twenty frames of it: 2 GiB, at 8 bits a sample.
MOST_FRAME_PIXELS = 2**25
MOST_THREADS = 4  # of a decoder; each keeps a frame more
MOST_PACKETS = 2**22  # frames in the file, 19 hours at 60 a second
MOST_SECONDS = 600.0  # to read a file

# As av.formats_available names them.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "flv", "asf", "ogg",
    "mxf", "nut", "wtv", "rm", "dv", "gif", "ivf", "h264", "hevc", "av1", "obu", "mpegvideo",
    "mjpeg", "m4v", "yuv4mpegpipe", "apng", "webp_pipe",
)  # fmt: skip


class Deadline:
    """Raises where reading a file takes too long."""

    def __init__(self, path: Path):
        self.path, self.end = path, time.monotonic() + MOST_SECONDS

    def check(self) -> None:
        if time.monotonic() > self.end:
            raise _too_long(self.path)


def _too_long(path: Path) -> InputError:
    return InputError(
        f"{path}: takes more than {MOST_SECONDS:g} s to read; cut it or make it smaller"
    )


@contextmanager
def open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and its first video stream that is no attached picture.

    Raises:
        InputError: missing, a folder, empty, no video, damaged, or too large; also where reading
            it inside the block fails.
    """
    import av

    if not path.is_file():
        raise InputError(f"{path}: {_no_file(path)}")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty, so not a readable video")
        with av.open(
            # As a file: a name must not be taken for an address.
            f"file:{path.absolute()}",
            options={
                "format_whitelist": ",".join(FORMATS),
                "protocol_whitelist": "file",
                "max_pixels": str(MOST_FRAME_PIXELS),
                "threads": str(MOST_THREADS),
            },
            metadata_errors="replace",
            timeout=MOST_SECONDS,
        ) as container:
            yield container, _stream(container, path)
    except av.error.ExitError:  # ffmpeg itself waited for so long
        raise _too_long(path) from None
    except av.error.FFmpegError as error:
        what = str(error.strerror).lower()
        raise InputError(f"{path}: not a readable video, or a truncated one ({what})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except MemoryError:
        raise InputError(f"{path}: takes more memory to read than there is") from None


def _no_file(path: Path) -> str:
    if path.exists():
        return "not a file; expected a video such as clip.mp4"
    if re.search(r"(^|[/\\])[a-z][a-z0-9+]+:[/\\]", str(path)):  # Path makes // of it one
        return "an address, and only files are read; download it first"
    return "no such file"


def _stream(container: Any, path: Path) -> Any:
    from av.stream import Disposition

    if not container.streams.video:
        raise InputError(f"{path}: has no video stream")
    films = (s for s in container.streams.video if not s.disposition & Disposition.attached_pic)
    stream = next(films, None)
    if stream is None:
        raise InputError(f"{path}: has no video stream, only a picture attached to it (a cover)")
    context = stream.codec_context
    if context is None:
        raise InputError(f"{path}: its video is of a kind that cannot be decoded")
    if context.width * context.height > MOST_FRAME_PIXELS:
        raise InputError(
            f"{path}: frames of {context.width} x {context.height}, expected at most 8192 x 4096 "
            "pixels; make it smaller: ffmpeg -i FILE -vf scale=1280:-2 new.mp4"
        )
    context.options = {"max_pixels": str(MOST_FRAME_PIXELS)}  # a stream may grow on its way
    context.thread_count = MOST_THREADS
    stream.thread_type = "AUTO"
    return stream

"""Which videos are asked about, about how long each is, and which go together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from std_decode.errors import BadInput

ENDINGS = frozenset(
    ".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv".split()
)
SPREAD = 1.5  # the longest of a batch over its shortest, at most: padding is work for nothing


def find_videos(given: Iterable[Path]) -> list[str]:
    """Absolute paths of all videos, each once, in the order in which they are named.

    A file is taken at its word, there or not: reading it will tell.

    Raises:
        BadInput: a list cannot be read, or there is no video at all.
    """
    found: dict[str, None] = {}
    for path in given:
        for video in _expand(path):
            found[os.path.abspath(video)] = None
    if not found:
        names = ", ".join(map(str, given))
        raise BadInput(
            f"no videos in {names}; expected files that end in {' '.join(sorted(ENDINGS))}"
        )
    return list(found)


def _expand(path: Path) -> Iterable[str | Path]:
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    if path.suffix.lower() != ".txt":
        return [path]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not a list of videos ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def estimate(path: str, frames: int | None) -> float:
    """About how many tokens the video comes to, up to a factor; 0 where it cannot be told.

    Reads no more than the file's header.

    Args:
        frames: that will be sampled; None for the demo model, which samples by the second.
    """
    import av

    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            seconds = (container.duration or 0) / av.time_base
            if frames is None:
                return seconds
            there = stream.frames or seconds * float(stream.average_rate or 1)
            return min(there, frames) * stream.width * stream.height
    except Exception:  # whatever is wrong with it: reading the video will say so, in its own line
        return 0.0


def batches(videos: Sequence[str], lengths: Sequence[float], size: int) -> list[list[str]]:
    """Videos of similar lengths together, at most `size`, the longest ones first.

    So what does not fit into memory shows early, and the time left is not guessed too short.
    """
    order = sorted(range(len(videos)), key=lambda i: -lengths[i])
    made: list[list[str]] = []
    longest = 0.0
    for i in order:
        if not made or len(made[-1]) == size or lengths[i] * SPREAD < longest:
            made.append([])
            longest = lengths[i]
        made[-1].append(videos[i])
    return made

"""The demo's world: a camera that sees numbered events among idle frames, and what to say.

One second of video is two frames of 56 x 56 pixels (Qwen2-VL's sampling rate and one temporal
patch), hence one time step of 2 x 2 video tokens. An idle second is grey noise. An event fills one
second with four tiles::

    +-----------+-----------+
    | tag / 8   | tag % 8   |    plain tiles in the colours that stand for the octal digits
    +-----------+-----------+
    | colour    | pattern   |    a ring in the event's colour; its pattern in white
    +-----------+-----------+

Asked to ``narrate from #13.``, a viewer says ``#13 red checks``, ``#14 blue ring``, ... in order.
Tags are consecutive within a clip, so each answer can be looked up in the video, and only there.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan", "white", "black")
PATTERNS = ("solid", "stripes", "checks", "ring")
FRAME = 56
FRAMES_PER_SECOND = 2
TOKENS_PER_SECOND = 4
TAGS = 64
_TILE = FRAME // 2
_RGB = np.array(
    [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 0]],
    dtype=np.float32,
)
_WHITE = COLOURS.index("white")


@dataclass(frozen=True)
class Event:
    """One second in which something happens: `tag` in 0..63, indices of a colour and a pattern."""

    second: int
    tag: int
    colour: int
    pattern: int

    @property
    def words(self) -> tuple[str, str]:
        return COLOURS[self.colour], PATTERNS[self.pattern]


@dataclass(frozen=True)
class Clip:
    """What a camera clip shows: its length in seconds and its events in order of time."""

    seconds: int
    events: tuple[Event, ...]

    @property
    def first_tag(self) -> int:
        return self.events[0].tag if self.events else 0

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Clip:
        return cls(int(data["seconds"]), tuple(Event(**event) for event in data["events"]))


def random_clip(seconds: int, events: int, rng: np.random.Generator) -> Clip:
    """A clip with `events` events at random seconds, consecutive tags, random looks.

    Raises:
        ValueError: more events than seconds or than there are tags.
    """
    if not 1 <= events <= min(seconds, TAGS):
        raise ValueError(
            f"random_clip: events is {events}, expected 1 <= events <= min(seconds = {seconds}, "
            f"{TAGS} tags); ask for fewer events or more seconds"
        )
    at = np.sort(rng.permutation(seconds)[:events])
    first = int(rng.integers(0, TAGS - events + 1))
    colours = rng.integers(0, len(COLOURS), events)
    patterns = rng.integers(0, len(PATTERNS), events)
    return Clip(
        seconds,
        tuple(
            Event(int(at[i]), first + i, int(colours[i]), int(patterns[i])) for i in range(events)
        ),
    )


def _tile(colour: int, pattern: int) -> np.ndarray:
    y, x = np.mgrid[0:_TILE, 0:_TILE]
    radius = np.hypot(y - (_TILE - 1) / 2, x - (_TILE - 1) / 2)
    mask = (
        np.ones((_TILE, _TILE), bool),
        (y // 4) % 2 == 0,
        (y // 4 + x // 4) % 2 == 0,
        (radius > 6) & (radius < 12),
    )[pattern]
    tile = np.full((3, _TILE, _TILE), 0.5, np.float32)
    tile[:, mask] = _RGB[colour][:, None]
    return tile


_TILES = np.stack(
    [np.stack([_tile(c, p) for p in range(len(PATTERNS))]) for c in range(len(COLOURS))]
)


def draw_seconds(clip: Clip) -> np.ndarray:
    """The noiseless picture of each second, float32 in 0..1, ``[seconds, 3, 56, 56]``."""
    picture = np.full((clip.seconds, 3, FRAME, FRAME), 0.5, np.float32)
    solid, ring = PATTERNS.index("solid"), PATTERNS.index("ring")
    for event in clip.events:
        frame = picture[event.second]
        frame[:, :_TILE, :_TILE] = _TILES[event.tag // 8, solid]
        frame[:, :_TILE, _TILE:] = _TILES[event.tag % 8, solid]
        frame[:, _TILE:, :_TILE] = _TILES[event.colour, ring]
        frame[:, _TILE:, _TILE:] = _TILES[_WHITE, event.pattern]
    return picture


def narration(clip: Clip) -> str:
    """The right answer, one line an event: ``#13 red checks``, the tag in octal."""
    return "".join(f"\n#{event.tag:02o} {' '.join(event.words)}" for event in clip.events)


def attributes_right(text: str, clip: Clip) -> float:
    """Share of the clip's colours and patterns that `text` tells under the right tag, 0..1."""
    told: dict[str, list[str]] = {}
    for line in text.split("\n"):
        words = line.split()
        if len(words) == 3 and words[0].startswith("#"):
            told.setdefault(words[0], words[1:])
    right = sum(
        said == word
        for event in clip.events
        for said, word in zip(told.get(f"#{event.tag:02o}", ("", "")), event.words)
    )
    return right / max(1, 2 * len(clip.events))

"""The demo's picture: which seconds of the clip the drafts read, round by round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from std_decode.app.output import new_figure
from std_decode.app.sparsity.measure import watched
from std_decode.demo import camera
from std_decode.demo.model import VIDEO_TOKEN
from std_decode.rounds.loop import Decoding

_MOST_COLUMNS = 256  # more would be too thin to see; the greatest of several seconds is shown
_MOST_LABELS = 48
_MOST_THUMBNAILS = 16
_MARK, _LINE = "#D55E00", "#6E6E6E"


class Recorder(Decoding):
    """Notes the keys that the drafts of each round may read.

    Attributes:
        selected: of each round the positions selected, int32 ``[layers, Hkv, K]``, on the CPU.
        at: tokens generated before each round.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.selected: list[torch.Tensor] = []
        self.at: list[int] = []

    def round(self) -> None:
        layers = self.engine.cache.selecting_layers
        self.selected.append(torch.stack([layer.indices[0].cpu() for layer in layers]))
        self.at.append(self.rows.at[0])
        super().round()


@dataclass(frozen=True)
class Walk:
    """How the selection walks through the clip while the narration proceeds.

    Attributes:
        share: of each second's keys, all layers and KV heads, those that the round's drafts may
            read, float64 ``[rounds, seconds]``.
        texts: what each round added to the narration.
        told: for each round, the seconds of the events it spoke of.
    """

    share: np.ndarray
    texts: list[str]
    told: list[list[int]]


def record(
    model: Any, tokenizer: Any, inputs: dict[str, Any], clip: camera.Clip | None, **options: Any
) -> Walk:
    """Narrate once more, with someone looking on.

    Args:
        model: unpatched.
        clip: what the video shows, if that is known.
        **options: `sampling`, of generate, and those of `patch`.
    """
    recorder, answer, _ = watched(model, inputs, Recorder, 5 * camera.TAGS + 8, **options)
    first = int((inputs["input_ids"][0] == VIDEO_TOKEN).int().argmax())
    seconds = int(inputs["video_grid_thw"][0, 0])
    share = np.stack([second_shares(one, first, seconds) for one in recorder.selected])
    ends = [*recorder.at[1:], len(answer)]
    texts = [tokenizer.decode(answer[a:b]) for a, b in zip(recorder.at, ends)]
    told = [_told(tokenizer, answer, a, b, clip) for a, b in zip(recorder.at, ends)]
    return Walk(share, texts, told)


def second_shares(selected: torch.Tensor, first: int, seconds: int) -> np.ndarray:
    """Which share of each second's keys is selected, float64 ``[seconds]``.

    Args:
        selected: positions, int32 ``[layers, Hkv, K]``, -1 where there is none.
        first: position of the first video token.
        seconds: of the clip.
    """
    second = (selected.long().flatten() - first).div(
        camera.TOKENS_PER_SECOND, rounding_mode="floor"
    )
    inside = second[(second >= 0) & (second < seconds)]
    count = torch.bincount(inside, minlength=seconds).double()
    lists = selected.shape[0] * selected.shape[1]
    return (count / (lists * camera.TOKENS_PER_SECOND)).numpy()


def _told(
    tokenizer: Any, answer: torch.Tensor, start: int, end: int, clip: camera.Clip | None
) -> list[int]:
    """Seconds of the events whose lines tokens `start` to `end` of the answer belong to."""
    if clip is None:
        return []
    lines = tokenizer.decode(answer).split("\n")
    touched = {tokenizer.decode(answer[: at + 1]).count("\n") for at in range(start, end)}
    tags = {lines[line].split(" ")[0] for line in touched}
    return [event.second for event in clip.events if f"#{event.tag:02o}" in tags]


def draw(walk: Walk, frames: np.ndarray, clip: camera.Clip | None, conditions: str) -> Any:
    """A matplotlib figure: the clip's time from left to right, rounds from top to bottom.

    Args:
        frames: as `video.read` returns them.
        clip: what the video shows, if that is known.
        conditions: for the title.
    """
    rounds, seconds = walk.share.shape
    height = min(14.0, 1.9 + 0.24 * rounds + 1.2)
    figure = new_figure(12, height)
    figure.get_layout_engine().set(hspace=0, h_pad=0.02)
    thumbnails, axes = figure.subplots(
        2, 1, gridspec_kw={"height_ratios": [1.3, height - 2.2]}, sharex=True
    )
    width = -(-seconds // _MOST_COLUMNS)
    padded = np.pad(walk.share, ((0, 0), (0, -seconds % width)))
    columns = padded.reshape(rounds, -1, width).max(axis=2)
    image = axes.imshow(
        columns, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest",
        extent=(0, columns.shape[1] * width, rounds + 0.5, 0.5),
    )  # fmt: skip
    marks = [(at + 0.5, i) for i, told in enumerate(walk.told, 1) for at in told]
    if marks:
        axes.plot(*zip(*marks), linestyle="none", marker="o", ms=9, mfc="none", mec=_MARK, mew=1.6,
                  label="event that the round speaks of")  # fmt: skip
        figure.legend(loc="outside lower right", fontsize=8, frameon=False)
    step = -(-rounds // _MOST_LABELS)
    shown = range(0, rounds, step)
    axes.set_yticks([i + 1 for i in shown], [_label(i, walk.texts[i]) for i in shown], fontsize=8)
    axes.set_xlim(0, seconds)
    axes.set_xlabel("time in the clip, s")
    axes.set_ylabel("round, and the text it added")
    figure.colorbar(
        image, ax=[thumbnails, axes], pad=0.01, fraction=0.03,
        label="share of a second's video keys that drafts read\n(mean over layers and KV heads)",
    )  # fmt: skip
    _thumbnails(thumbnails, frames, clip, seconds)
    figure.suptitle(
        "What the drafts look at: keys selected from the video, round by round\n" + conditions,
        fontsize=11,
    )
    return figure


def _label(round: int, text: str) -> str:
    return f"{' '.join(text.replace('<eos>', '(end)').split())}   {round + 1}"


def _thumbnails(axes: Any, frames: np.ndarray, clip: camera.Clip | None, seconds: int) -> None:
    """Pictures of the events, or of even times, with lines down to where they are."""
    at = [event.second for event in clip.events] if clip is not None else []
    at = at or list(range(seconds))
    shown = np.linspace(0, len(at) - 1, min(len(at), _MOST_THUMBNAILS)).astype(int)
    at = [at[i] for i in shown]
    axes.set_ylim(0, 1)
    axes.axis("off")
    slot = seconds / max(len(at), 8)
    for i, second in enumerate(at):
        middle = (i + 0.5) * seconds / len(at)
        inset = axes.inset_axes(
            (middle - 0.45 * slot, 0.35, 0.9 * slot, 0.65), transform=axes.transData
        )
        inset.imshow(frames[camera.FRAMES_PER_SECOND * second])
        inset.set(xticks=[], yticks=[], anchor="S")
        inset.spines[:].set(color=_LINE, linewidth=0.5)
        axes.plot([middle, second + 0.5], [0.33, 0], color=_LINE, linewidth=0.8, clip_on=False)

"""A patched model that answers batches of videos; the same in this process and on Ray."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import std_decode
from std_decode.errors import BadInput
from std_decode.inputs import to_model

Row = dict[str, Any]
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What answers depend on, besides the prompt; the lines of a file have the same."""

    model: str
    frames: int | None
    max_new_tokens: int
    dtype: str


@dataclass(frozen=True)
class Job:
    """One question, and who is to answer it, and how.

    Attributes:
        prompt: None for the demo model's own.
        own_model: whether `settings.model` is a model of the user's.
        patch: options of `std_decode.patch`.
    """

    prompt: str | None
    settings: Settings
    own_model: bool
    patch: dict[str, Any]
    device: str | None = None
    trust_remote_code: bool = False


class Worker:
    """Holds the model of a job.

    Raises:
        InputError: the model cannot be loaded.
        BadInput: it cannot be patched, or the demo model cannot be asked this.
    """

    def __init__(self, job: Job):
        self.job = job
        self.stopped = False  # whether the rest need not be read
        make = _own if job.own_model else _demo
        self.model, self.tokenizer, self.inputs_of = make(job)
        # Answers are decoded while another thread makes inputs: the tokenizer is not for two.
        self.decode = copy.deepcopy(self.tokenizer).decode
        try:
            std_decode.patch(self.model, **job.patch)
        except NotImplementedError as error:
            raise BadInput(str(error)) from error

    def read(self, videos: Sequence[str]) -> list[tuple[str, Inputs | str]]:
        """Each video's inputs for generate, on the CPU, or what is wrong with it."""
        return [(video, self._read(video)) for video in videos if not self.stopped]

    def _read(self, video: str) -> Inputs | str:
        try:
            return self.inputs_of(video)
        except Exception as error:  # one bad video is not to stop the rest, whatever is wrong
            return _told(error)

    def answer(self, read: Sequence[tuple[str, Inputs | str]]) -> list[Row]:
        """A row for each of the videos."""
        rows = [self._row(video, error=e) for video, e in read if isinstance(e, str)]
        groups: dict[Any, list[tuple[str, Inputs]]] = {}
        for video, inputs in read:
            if not isinstance(inputs, str):
                groups.setdefault(_kind(inputs), []).append((video, inputs))
        for group in groups.values():
            rows += self._answer(group)
        return rows

    def _answer(self, group: list[tuple[str, Inputs]]) -> list[Row]:
        try:
            told = self._generate([inputs for _, inputs in group])
        except Exception as error:
            if len(group) == 1:
                return [self._row(group[0][0], error=_told(error))]
            told = None
        if told is None:  # one of them is at fault, or together they are too large
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return [row for one in group for row in self._answer([one])]
        return [
            self._row(
                video,
                answer=self.decode(tokens, skip_special_tokens=True),
                prompt_tokens=inputs["input_ids"].shape[1],
                tokens=len(tokens),
            )
            for (video, inputs), tokens in zip(group, told)
        ]

    def _generate(self, group: list[Inputs]) -> list[list[int]]:
        """The tokens of each answer, its end included."""
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        together = collate(group, pad or 0)
        inputs = to_model(together, self.model)
        most = self.job.settings.max_new_tokens
        sequences = self.model.generate(
            **inputs, max_new_tokens=most, do_sample=False, pad_token_id=pad
        )
        told = sequences[:, together["input_ids"].shape[1] :].tolist()
        return [
            tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), None)]
            for tokens in told
        ]

    def _row(self, video: str, **found: Any) -> Row:
        return {"video": video, "prompt": self.job.prompt, **found}


def collate(group: Sequence[Inputs], pad: int) -> Inputs:
    """Inputs of single prompts as those of a batch, padded on the left.

    What has a value for each token (as `input_ids` ``[1, S]``) is padded, by zeros but for
    `input_ids`; all else (pixels, grids) is put one behind the other.
    """
    if len(group) == 1:
        return group[0]
    longest = max(inputs["input_ids"].shape[1] for inputs in group)
    together: Inputs = {}
    for name, first in group[0].items():
        values = [inputs[name] for inputs in group]
        if not isinstance(first, Tensor):
            together[name] = [item for value in values for item in value]
            continue
        if _by_token(name, group[0]):
            fill = pad if name == "input_ids" else 0
            values = [
                torch.nn.functional.pad(value, (longest - value.shape[1], 0), value=fill)
                for value in values
            ]
        together[name] = torch.cat(values)
    return together


def _by_token(name: str, inputs: Inputs) -> bool:
    return inputs[name].shape == inputs["input_ids"].shape


def _kind(inputs: Inputs) -> tuple:
    """Those of the same kind can be put together."""
    kinds: list[Any] = []
    for name, value in inputs.items():
        by_row = isinstance(value, Tensor) and not _by_token(name, inputs)
        kinds.append((name, value.shape[1:] if by_row else None))
    return tuple(kinds)


def _told(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    known = isinstance(error, ValueError) and type(error).__module__.startswith("std_decode")
    return first if known else f"{type(error).__name__}: {first}"


Make = tuple[Any, Any, Callable[[str], Inputs]]


def _demo(job: Job) -> Make:
    from transformers.utils.logging import disable_progress_bar

    from std_decode.demo import video
    from std_decode.demo.model import generate_inputs, load_model, load_tokenizer

    disable_progress_bar()
    own_tag = demo_tag(job.prompt)
    model, tokenizer = load_model(), load_tokenizer()

    def inputs_of(path: str) -> Inputs:
        frames, clip = video.read(Path(path))
        tag = own_tag if own_tag is not None else clip.first_tag if clip is not None else 0
        return generate_inputs(frames, tag, tokenizer)

    return model, tokenizer, inputs_of


def demo_tag(prompt: str | None) -> int | None:
    """The tag that the demo model is to narrate from; None where it is each clip's first.

    Raises:
        BadInput: it does nothing but narrate.
    """
    if prompt is None:
        return None
    asked = re.fullmatch(r"narrate from #([0-7]{2})\.?", prompt.strip())
    if asked is None:
        raise BadInput(
            f'the demo model only narrates: --prompt is "{prompt}", expected "narrate from #00."; '
            "or give --model M"
        )
    return int(asked[1], 8)


def _own(job: Job) -> Make:
    from std_decode.frames import read_video
    from std_decode.inputs import load_model, load_processor, make_inputs

    settings = job.settings
    processor = load_processor(settings.model, trust_remote_code=job.trust_remote_code)
    model = load_model(
        settings.model,
        dtype=settings.dtype,
        device=job.device,
        trust_remote_code=job.trust_remote_code,
    )

    def inputs_of(path: str) -> Inputs:
        assert settings.frames is not None and job.prompt is not None
        return dict(make_inputs(processor, read_video(Path(path), settings.frames), job.prompt))

    return model, processor.tokenizer, inputs_of

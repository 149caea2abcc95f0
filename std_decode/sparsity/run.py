"""``std-decode sparsity``: measure, suggest, draw."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

import std_decode
from std_decode.cli import BadInput
from std_decode.output import check_file, check_picture, png, replace_file
from std_decode.sparsity import measure
from std_decode.sparsity.page import draw
from std_decode.sparsity.prompt import with_cache
from std_decode.sparsity.suggest import Suggestion, speedups, suggest, suggest_keys


@dataclass(frozen=True)
class Question:
    """A model, unpatched, and one prompt for it.

    Attributes:
        inputs: as generate takes them, one row, on the model's device.
        decode: token ids to text.
        most_tokens: of the answer.
        about: what was asked of what, for the title.
    """

    model: Any
    inputs: dict[str, Tensor]
    decode: Callable[[Tensor], str]
    most_tokens: int
    about: str


def sparsity(options: argparse.Namespace) -> int:
    """Run ``std-decode sparsity``. Returns 0."""
    _check(options)
    console = Console()
    disable_progress_bar()
    if options.model is None:
        question = _demo_question(options, console)
    else:
        question = _own_question(options, console)
    with Progress(console=console, transient=True) as progress:
        found = _measure(question, options, progress)
    replace_file(options.picture, png(draw(found)))
    replace_file(options.json, (json.dumps(found, indent=1) + "\n").encode())
    _tell(found, console)
    console.print(f"[dim]picture: {options.picture}; figures: {options.json}[/dim]")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse what would fail only after the work is done."""
    clip, own = ("seconds", "events", "seed"), ("prompt", "frames", "dtype", "device")
    if options.model is not None and options.video is None:
        raise BadInput("--model needs a video to be asked about; give --video FILE")
    if options.model is None:
        _refuse(options, (*own, "trust_remote_code"), "is for a model of yours; give --model too")
    if options.video is not None:
        _refuse(options, clip, "is for a rendered clip; drop it or --video")
    options.seconds, options.events = options.seconds or 256, options.events or 12
    if options.events > options.seconds:
        raise BadInput(
            f"--events is {options.events}, expected at most one a second, {options.seconds}; "
            "raise --seconds"
        )
    check_picture("--picture", options.picture)
    options.json = options.json or options.picture.with_suffix(".json")
    check_file("--json", options.json)


def _refuse(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name in names:
        given = getattr(options, name)
        if given is not None and given is not False:
            raise BadInput(f"--{name.replace('_', '-')} {why}")


def _demo_question(options: argparse.Namespace, console: Console) -> Question:
    from std_decode.demo import camera, video
    from std_decode.demo.model import generate_inputs, load_model, load_tokenizer

    if options.video is not None:
        frames, clip = video.read(options.video)
        shown = options.video.name
    else:
        seed = options.seed or 0
        rng = np.random.default_rng(seed)
        clip = camera.random_clip(options.seconds, options.events, rng)
        shown = f"clip of {options.seconds} s, {options.events} events, seed {seed}"
        with (
            tempfile.TemporaryDirectory() as folder,
            console.status(f"filming {options.seconds} s with {options.events} events"),
        ):
            video.render(clip, Path(folder) / "clip.mp4", rng)
            frames, clip = video.read(Path(folder) / "clip.mp4")
    model, tokenizer = load_model(), load_tokenizer()
    inputs = generate_inputs(frames, clip.first_tag if clip is not None else 0, tokenizer)
    most = options.max_new_tokens or 5 * camera.TAGS + 8
    return Question(model, inputs, tokenizer.decode, most, f"demo model, {shown}")


def _own_question(options: argparse.Namespace, console: Console) -> Question:
    from std_decode.inputs import (
        check_packages,
        load_model,
        load_processor,
        make_inputs,
        read_video,
    )

    check_packages()
    trust = options.trust_remote_code
    with console.status(f"reading {options.video}") as status:
        clip = read_video(options.video, options.frames or 32)
        status.update("loading the processor")
        processor = load_processor(options.model, trust_remote_code=trust)
        inputs = make_inputs(processor, clip, options.prompt or "Describe the video in detail.")
        status.update(f"loading {options.model}")
        model = load_model(
            options.model,
            dtype=options.dtype or "auto",
            device=options.device,
            trust_remote_code=trust,
        )
    name = options.model.rstrip("/").rpartition("/")[2]
    return Question(
        model,
        dict(inputs.to(model.device)),
        processor.tokenizer.decode,
        options.max_new_tokens or 128,
        f"{name}, {options.video.name}, {len(clip.frames)} frames",
    )


def _measure(
    question: Question, options: argparse.Namespace, progress: Progress
) -> dict[str, Any]:
    """All figures, as they are written to the JSON file."""
    model, inputs = question.model, question.inputs
    try:
        most = measure.candidates(model, inputs)
        sweep = sorted({k for k in options.top_k_keys if k < most} | {most})
        lengths = [0, *sorted(set(options.draft_lengths))]
        task = progress.add_task("the dense answer", total=2 + len(sweep) + 2 * len(lengths))
        _, answer, stats = measure.watched(
            model, inputs, measure.Timed, question.most_tokens, draft_length=0
        )
    except (NotImplementedError, measure.NotMeasurable) as error:
        raise BadInput(str(error)) from error
    if len(answer) < 3:
        raise BadInput(
            f"the dense answer has {len(answer)} tokens, too few to measure drafts by; ask for "
            "a longer one"
        )
    progress.update(task, advance=1, description="the video, once and for all")
    inputs = with_cache(model, inputs, answer)
    points, text, best = [], {}, {}
    for keys in sweep:
        progress.update(task, advance=1, description=f"along the answer with {keys} keys")
        point, teacher = measure.teach(model, inputs, answer, keys, sweep if keys == most else ())
        points.append(point)
        if keys == most:
            text, best = teacher.mean(teacher.kept_by_text), teacher.mean(teacher.kept_by_best)
    chosen = suggest_keys(points)

    def tell(gamma: int) -> None:
        progress.update(task, advance=1, description=f"rounds of {gamma} drafts, {chosen} keys")

    rounds = measure.time_rounds(model, inputs, len(answer), chosen, lengths, tell)
    gains = speedups(rounds)
    return {
        "about": question.about,
        **_conditions(question, stats, len(answer)),
        "answer": question.decode(answer),
        "suggestion": asdict(suggest(points, rounds, chosen)),
        "keys": [
            {
                "top_k_keys": point.top_k_keys,
                "drafted": point.drafted,
                "agreed": point.agreed,
                "agreement": point.agreement,
                "attention_kept": point.kept,
                "attention_kept_by_best": {at: kept[i] for at, kept in best.items()},
            }
            for i, point in enumerate(points)
        ],
        "attention_kept_by_text": text,
        "draft_lengths": [
            {**asdict(point), "tokens_per_second": point.tokens_per_second} for point in rounds
        ],
        "speedup_by_draft_length": gains,
    }


def _conditions(question: Question, stats: Any, tokens: int) -> dict[str, Any]:
    model = question.model
    device = model.device
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{device.type.upper()}, {torch.get_num_threads()} thread(s)"
    return {
        "prompt_tokens": stats.prompt_tokens,
        "candidates": measure.candidates(model, question.inputs),
        "answer_tokens": tokens,
        "decoding": "greedy, batch 1",
        "dtype": str(model.dtype).removeprefix("torch."),
        "hardware": hardware,
        "versions": {
            "std_decode": std_decode.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _tell(found: dict[str, Any], console: Console) -> None:
    keys = Table(title="by number of keys", title_style="bold")
    for name in ("keys", "attention kept", "by the best keys", "next tokens agreeing"):
        keys.add_column(name, justify="right")
    for point in found["keys"]:
        kept = (
            f"{np.mean(list(point[name].values())):.1%}"
            for name in ("attention_kept", "attention_kept_by_best")
        )
        keys.add_row(f"{point['top_k_keys']:,}", *kept, f"{point['agreement']:.1%}")
    console.print(keys)
    suggestion = Suggestion(**found["suggestion"])
    drafts = Table(title=f"by draft length, {suggestion.top_k_keys:,} keys", title_style="bold")
    for name in ("draft length", "acceptance", "tokens per dense pass", "tokens/s"):
        drafts.add_column(name, justify="right")
    for point in found["draft_lengths"]:
        acceptance = point["acceptance"]
        drafts.add_row(
            str(point["draft_length"]),
            "-" if acceptance is None else f"{acceptance:.1%}",
            f"{point['tokens_per_pass']:.2f}",
            f"{point['tokens_per_second']:.1f}",
        )
    console.print(drafts)
    console.print(
        f"suggested: top_k_keys={suggestion.top_k_keys}, draft_length={suggestion.draft_length}",
        style="bold",
        highlight=False,
    )
    console.print(suggestion.why, highlight=False)

"""The demo: film a clip, narrate the file patched and unpatched, compare."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import TextStreamer
from transformers.utils.logging import disable_progress_bar

import std_decode
from std_decode.cli import BadInput
from std_decode.demo import camera, video
from std_decode.demo.model import generate_inputs, load_model, load_tokenizer
from std_decode.output import check_file, check_picture, png, replace_file


@dataclass
class Narration:
    """One generate call: its tokens ``[1, S + T]``, its text, and when tokens came out."""

    sequences: torch.Tensor
    text: str
    tokens: int
    total_seconds: float
    tokens_per_second: float  # of decoding: after the first token


class _TimedStreamer(TextStreamer):
    """Prints (or swallows) the text as it comes, and notes the time of each token."""

    def __init__(self, tokenizer: Any, console: Console | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console, self.times = console, [time.perf_counter()]

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        self.times.append(time.perf_counter())

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.console is not None:
            self.console.print(text, end="\n" if stream_end else "", markup=False, highlight=False)


def demo(options: argparse.Namespace) -> int:
    """Run ``std-decode demo``. Returns 0 if the tokens were identical, else 1."""
    console = Console()
    _check(options)
    disable_progress_bar()  # of loading weights: a flash of one line for a model this small
    with tempfile.TemporaryDirectory() as folder:
        frames, clip = _film(options, Path(folder) / "clip.mp4", console)
    with console.status("loading the demo model"):
        model, tokenizer = load_model(), load_tokenizer()
        first_tag = clip.first_tag if clip is not None else 0
        inputs = generate_inputs(frames, first_tag, tokenizer)
    video_tokens = int((inputs["mm_token_type_ids"] > 0).sum())
    console.print(f"[dim]{video_tokens} video tokens; narrating from tag #{first_tag:02o}[/dim]")
    sampling = dict(do_sample=options.sample, top_k=0) if options.sample else dict(do_sample=False)

    def narrate(shown: Console | None) -> Narration:
        torch.manual_seed(options.seed)
        streamer = _TimedStreamer(tokenizer, shown)
        start = time.perf_counter()
        most = 5 * camera.TAGS + 8
        sequences = model.generate(**inputs, **sampling, max_new_tokens=most, streamer=streamer)
        told = sequences[0, inputs["input_ids"].shape[1] :]
        first, last = streamer.times[2], streamer.times[-1]
        return Narration(
            sequences,
            tokenizer.decode(told, skip_special_tokens=True),
            len(told),
            time.perf_counter() - start,
            (len(told) - 1) / (last - first) if len(told) > 1 else 0.0,
        )

    # The first calls pay for setting up; neither side should.
    few = generate_inputs(frames[:8], first_tag, tokenizer)
    model.generate(**few, max_new_tokens=8)
    with std_decode.patched(
        model, top_k_keys=options.top_k_keys, draft_length=options.draft_length
    ):
        model.generate(**few, max_new_tokens=8)
        patched = narrate(console)
        stats = std_decode.last_stats(model)
    with console.status("the same without the patch"):
        plain = narrate(None)
    assert stats is not None
    identical = torch.equal(plain.sequences, patched.sequences)
    right = None if clip is None else camera.attributes_right(patched.text, clip)
    figures = {
        "video_tokens": video_tokens,
        "identical": identical,
        "unpatched_tokens_per_second": plain.tokens_per_second,
        "patched_tokens_per_second": patched.tokens_per_second,
        "attributes_right": right,
        **asdict(stats),
    }
    console.print(_table(plain, patched, figures))
    if options.json is not None:
        replace_file(options.json, (json.dumps(figures, indent=2) + "\n").encode())
    if options.picture is not None:
        with console.status("once more, looking on, for the picture"):
            torch.manual_seed(options.seed)
            _draw(options, model, tokenizer, inputs, frames, clip, sampling)
        console.print(f"[dim]picture: {options.picture}[/dim]")
    return 0 if identical else 1


def _draw(options, model, tokenizer, inputs, frames, clip, sampling) -> None:
    from std_decode.demo.picture import draw, record

    walk = record(
        model,
        tokenizer,
        inputs,
        clip,
        sampling=sampling,
        top_k_keys=options.top_k_keys,
        draft_length=options.draft_length,
    )
    conditions = (
        f"{options.video.name if options.video else f'rendered clip, seed {options.seed}'}, "
        f"{len(frames) // camera.FRAMES_PER_SECOND:,} s; {options.top_k_keys} keys a layer and KV "
        f"head, draft length {options.draft_length}, {'sampled' if options.sample else 'greedy'}"
    )
    replace_file(options.picture, png(draw(walk, frames, clip, conditions)))


def _check(options: argparse.Namespace) -> None:
    """Refuse what would fail only after the work is done."""
    if options.video is None and options.events > options.seconds:
        raise BadInput(
            f"--events is {options.events}, expected at most one a second, {options.seconds}; "
            "raise --seconds"
        )
    if options.video is not None and options.keep is not None:
        raise BadInput("--keep saves a rendered clip, but --video renders none; drop one of them")
    if options.keep is not None and options.keep.exists():
        raise BadInput(f"--keep: {options.keep} exists already, expected a new file")
    for name in ("keep", "json"):
        if getattr(options, name) is not None:
            check_file(f"--{name}", getattr(options, name))
    if options.picture is not None:
        check_picture("--picture", options.picture)
        if options.draft_length == 0:
            raise BadInput("--picture shows what drafts read, but --draft-length is 0: no drafts")


def _film(
    options: argparse.Namespace, path: Path, console: Console
) -> tuple[np.ndarray, camera.Clip | None]:
    if options.video is not None:
        with console.status(f"reading {options.video}"):
            return video.read(options.video)
    rng = np.random.default_rng(options.seed)
    clip = camera.random_clip(options.seconds, options.events, rng)
    with console.status(f"filming {options.seconds} s with {options.events} events"):
        video.render(clip, path, rng)
        frames, told = video.read(path)
    if options.keep is not None:
        shutil.copyfile(path, options.keep)
        console.print(f"[dim]clip kept as {options.keep}[/dim]")
    return frames, told


def _table(plain: Narration, patched: Narration, figures: dict[str, Any]) -> Table:
    table = Table(title="the same narration, unpatched and patched", title_style="bold")
    for name in ("", "unpatched", "patched", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    speeds = plain.tokens_per_second, patched.tokens_per_second
    ratio = f"{speeds[1] / speeds[0]:.2f}x" if speeds[0] else ""
    table.add_row("decoding, tokens/s", *(f"{speed:.1f}" for speed in speeds), ratio)
    seconds = plain.total_seconds, patched.total_seconds
    ratio = f"{seconds[0] / seconds[1]:.2f}x"
    table.add_row("total time, s", *(f"{second:.3f}" for second in seconds), ratio)
    table.add_row("tokens", str(plain.tokens), str(patched.tokens))
    rounds = figures["rounds"]
    table.add_row("rounds", "", str(rounds))
    accepted = f"{figures['accepted'] / rounds:.2f}" if rounds else "-"
    table.add_row("accepted per round", "", accepted)
    table.add_row("acceptance rate", "", f"{figures['acceptance_rate']:.1%}")
    if figures["attributes_right"] is not None:
        table.add_row("attributes right", "", f"{figures['attributes_right']:.1%}")
    identical = "[green]yes[/green]" if figures["identical"] else "[bold red]NO[/bold red]"
    table.add_row("tokens identical", "", identical)
    return table

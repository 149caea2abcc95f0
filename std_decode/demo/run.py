"""The demo: film a clip, narrate the file patched and unpatched, compare."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
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
    stats: std_decode.DecodeStats | None = None


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

    few = generate_inputs(frames[:8], first_tag, tokenizer)

    def tell(patch: dict[str, Any] | None, shown: Console | None = None) -> Narration:
        with nullcontext() if patch is None else std_decode.patched(model, **patch):
            model.generate(**few, max_new_tokens=16)  # the first call pays for setting up
            narration = narrate(shown)
            return replace(narration, stats=std_decode.last_stats(model) if patch else None)

    ways = {
        "patched": dict(top_k_keys=options.top_k_keys, draft_length=options.draft_length),
        "unpatched": None,
        "dense path": dict(draft_length=0),
    }
    told: dict[str, list[Narration]] = {name: [] for name in ways}
    for run in range(options.repeat):
        for name, patch in ways.items():
            if run == 0 and name == "patched":
                told[name].append(tell(patch, console))
                continue
            with console.status(f"the same, {name}, {run + 1} of {options.repeat}"):
                told[name].append(tell(patch))
    patched = told["patched"][0]
    everything = [narration for runs in told.values() for narration in runs]
    identical = all(torch.equal(x.sequences, patched.sequences) for x in everything)
    right = None if clip is None else camera.attributes_right(patched.text, clip)
    assert patched.stats is not None
    figures = {
        "video_tokens": video_tokens,
        "identical": identical,
        **{
            f"{name.replace(' ', '_')}_tokens_per_second": _median(runs, "tokens_per_second")
            for name, runs in told.items()
        },
        "over_unpatched": _ratio(told, "unpatched"),
        "over_dense_path": _ratio(told, "dense path"),
        "attributes_right": right,
        **asdict(patched.stats),
    }
    console.print(_table(told, figures))
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

    # Where drafting does not pay, "auto" leaves nothing to look at.
    drafts = 4 if options.draft_length == "auto" else options.draft_length
    walk = record(
        model,
        tokenizer,
        inputs,
        clip,
        sampling=sampling,
        top_k_keys=options.top_k_keys,
        draft_length=drafts,
    )
    conditions = (
        f"{options.video.name if options.video else f'rendered clip, seed {options.seed}'}, "
        f"{len(frames) // camera.FRAMES_PER_SECOND:,} s; {options.top_k_keys} keys a layer and KV "
        f"head, draft length {drafts}, {'sampled' if options.sample else 'greedy'}"
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
        replace_file(options.keep, path.read_bytes())
        console.print(f"[dim]clip kept as {options.keep}[/dim]")
    return frames, told


def _median(runs: list[Narration], name: str) -> float:
    return median(getattr(run, name) for run in runs)


def _ratio(told: dict[str, list[Narration]], rival: str) -> float | None:
    """Median of the decoding speeds' ratios, patched over `rival`, run by run."""
    pairs = zip(told["patched"], told[rival])
    ratios = [x.tokens_per_second / y.tokens_per_second for x, y in pairs if y.tokens_per_second]
    return median(ratios) if ratios else None


def _table(told: dict[str, list[Narration]], figures: dict[str, Any]) -> Table:
    runs = len(told["patched"])
    of_runs = f", medians of {runs} runs" if runs > 1 else ""
    table = Table(title=f"the same narration, patched and not{of_runs}", title_style="bold")
    for name in ("", "unpatched", "dense path", "patched"):
        table.add_column(name, justify="left" if not name else "right")
    rivals = ("unpatched", "dense path")

    def row(title: str, name: str, digits: int) -> None:
        cells = (f"{_median(told[way], name):.{digits}f}" for way in (*rivals, "patched"))
        table.add_row(title, *cells)

    row("decoding, tokens/s", "tokens_per_second", 1)
    ratios = (figures["over_unpatched"], figures["over_dense_path"])
    table.add_row("patched is", *(f"{r:.2f}x" if r else "" for r in ratios), "")
    row("total time, s", "total_seconds", 3)
    row("tokens", "tokens", 0)
    lengths = Counter(figures["draft_lengths"])
    lengths[0] = figures["calls"]["dense"]
    chosen = ", ".join(f"{g} ({lengths[g]}x)" for g in sorted(lengths) if lengths[g])
    rows = {
        "drafts a round": chosen or "-",
        "tokens per dense pass": f"{figures['mean_accepted_length']:.2f}",
        "acceptance rate": f"{figures['acceptance_rate']:.1%}" if figures["drafted"] else "-",
    }
    if figures["attributes_right"] is not None:
        rows["attributes right"] = f"{figures['attributes_right']:.1%}"
    rows["tokens identical"] = "[green]yes[/]" if figures["identical"] else "[bold red]NO[/]"
    for title, value in rows.items():
        table.add_row(title, "", "", value)
    return table

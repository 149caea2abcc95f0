"""The demo: film a clip, narrate the file patched and unpatched, compare."""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

import std_decode
from std_decode.app.answer import (
    Answer,
    Show,
    add_drafting,
    answer,
    middle,
    ratio,
    side_by_side,
)
from std_decode.app.output import check_file, check_picture, png, replace_file
from std_decode.demo import camera, video
from std_decode.demo.model import generate_inputs, load_model, load_tokenizer
from std_decode.errors import BadInput


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

    few = generate_inputs(frames[:8], first_tag, tokenizer)

    def show(text: str) -> None:
        console.print(text, end="", markup=False, highlight=False)

    def tell(patch: dict[str, Any] | None, shown: Show | None = None) -> Answer:
        most = 5 * camera.TAGS + 8
        with nullcontext() if patch is None else std_decode.patched(model, **patch):
            model.generate(**few, max_new_tokens=16)  # the first call pays for setting up
            how = dict(sampling, max_new_tokens=most)
            told = answer(model, inputs, tokenizer, options.seed, shown, **how)
            return replace(told, stats=std_decode.last_stats(model) if patch else None)

    names = ("top_k_keys", "draft_length", "prompt_lookup")
    drafting = {name: getattr(options, name) for name in names}
    ways = {"unpatched": None, "dense path": dict(draft_length=0), "patched": drafting}
    told: dict[str, list[Answer]] = {name: [] for name in ways}
    for run in range(options.repeat):
        for name in ("patched", "unpatched", "dense path"):
            patch = ways[name]
            if run == 0 and name == "patched":
                told[name].append(tell(patch, show))
                continue
            with console.status(f"the same, {name}, {run + 1} of {options.repeat}"):
                told[name].append(tell(patch))
    patched = told["patched"][0]
    everything = [one for runs in told.values() for one in runs]
    identical = all(torch.equal(x.sequences, patched.sequences) for x in everything)
    right = None if clip is None else camera.attributes_right(patched.text, clip)
    assert patched.stats is not None
    figures = {
        "video_tokens": video_tokens,
        "identical": identical,
        **{
            f"{name.replace(' ', '_')}_tokens_per_second": middle(runs, "tokens_per_second")
            for name, runs in told.items()
        },
        "over_unpatched": ratio(told, "unpatched", "tokens_per_second"),
        "over_dense_path": ratio(told, "dense path", "tokens_per_second"),
        "attributes_right": right,
        **asdict(patched.stats),
    }
    console.print(_table(told, figures))
    if options.draft_length == "auto" and hardly_drafted(patched.stats):
        longer = options.video is None and options.seconds < video.MOST_SECONDS
        more = f"Longer videos do better, as of --seconds {video.MOST_SECONDS}; " if longer else ""
        console.print(
            "[dim]It hardly drafted by sparse attention, which does not pay where a draft step "
            f"takes about as long as a dense one. {more}--draft-length 4 drafts anyway.[/dim]",
            highlight=False,
        )
    if options.json is not None:
        replace_file(options.json, (json.dumps(figures, indent=2) + "\n").encode())
    if options.picture is not None:
        with console.status("once more, looking on, for the picture"):
            torch.manual_seed(options.seed)
            _draw(options, model, tokenizer, inputs, frames, clip, sampling)
        console.print(f"[dim]picture: {options.picture}[/dim]")
    return 0 if identical else 1


def hardly_drafted(stats: std_decode.DecodeStats) -> bool:
    """Whether few tokens are drafts by sparse attention, which looks like a failure."""
    return stats.accepted - stats.lookup_accepted < stats.emitted / 4


def _draw(options, model, tokenizer, inputs, frames, clip, sampling) -> None:
    from std_decode.app.picture import draw, record

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


def _table(told: dict[str, list[Answer]], figures: dict[str, Any]) -> Table:
    table = side_by_side("the same narration, patched and not", told)
    stats = told["patched"][0].stats
    assert stats is not None
    add_drafting(table, stats)
    if figures["attributes_right"] is not None:
        table.add_row("attributes right", "", "", f"{figures['attributes_right']:.1%}")
    identical = "[green]yes[/]" if figures["identical"] else "[bold red]NO[/]"
    table.add_row("tokens identical", "", "", identical)
    return table

"""``std-decode sparsity``: measure, suggest, draw."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from std_decode.app.output import check_file, check_picture, png, replace_file
from std_decode.app.question import Question, ask, check_question, refuse
from std_decode.app.sparsity.findings import investigate
from std_decode.app.sparsity.measure import NotMeasurable
from std_decode.app.sparsity.page import draw
from std_decode.app.sparsity.suggest import Suggestion, speedups
from std_decode.errors import BadInput


def sparsity(options: argparse.Namespace) -> int:
    """Run ``std-decode sparsity``. Returns 0."""
    _check(options)
    console = Console()
    disable_progress_bar()
    question = ask(options, console)
    with Progress(console=console, transient=True) as progress:
        found = _measure(question, options, progress)
    _tell(found, console)
    replace_file(options.json, (json.dumps(found, indent=1) + "\n").encode())
    replace_file(options.picture, png(draw(found)))
    console.print(f"[dim]picture: {options.picture}; figures: {options.json}[/dim]")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse what would fail only after the work is done."""
    if options.model is not None and options.video is None and options.prompt is None:
        raise BadInput("--model needs something to be asked about; give --video or --prompt-file")
    check_question(options)
    if options.video is not None:
        refuse(
            options, ("seconds", "events", "seed"), "is for a rendered clip; drop it or --video"
        )
    options.seconds, options.events = options.seconds or 256, options.events or 12
    if options.events > options.seconds:
        raise BadInput(
            f"--events is {options.events}, expected at most one a second, {options.seconds}; "
            "raise --seconds"
        )
    check_picture("--picture", options.picture)
    options.json = options.json or options.picture.with_suffix(".json")
    check_file("--json", options.json)


def _measure(
    question: Question, options: argparse.Namespace, progress: Progress
) -> dict[str, Any]:
    """All figures, as they are written to the JSON file."""
    try:
        found = investigate(
            question.model,
            question.inputs,
            question.most_tokens,
            options.top_k_keys,
            options.draft_lengths,
            progress,
        )
    except (NotImplementedError, NotMeasurable) as error:
        raise BadInput(str(error)) from error
    answer = found.answer
    return {
        "about": question.about,
        "prompt_tokens": found.stats.prompt_tokens,
        "candidates": found.keys[-1].top_k_keys,
        "answer_tokens": len(answer),
        "decoding": "greedy, batch 1",
        **question.conditions(),
        "answer": question.decode(answer),
        "suggestion": asdict(found.suggestion),
        "keys": [
            {
                "top_k_keys": point.top_k_keys,
                "drafted": point.drafted,
                "agreed": point.agreed,
                "agreement": point.agreement,
                "attention_kept": point.kept,
                "attention_kept_by_best": {at: kept[i] for at, kept in found.kept_by_best.items()},
            }
            for i, point in enumerate(found.keys)
        ],
        "attention_kept_by_text": found.kept_by_text,
        "draft_lengths": [
            {**asdict(point), "tokens_per_second": point.tokens_per_second}
            for point in found.rounds
        ],
        "speedup_by_draft_length": speedups(found.rounds),
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

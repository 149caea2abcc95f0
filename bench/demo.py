"""The demo's figures over a grid of clips and draft lengths, for the documentation's tables."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from bench.arguments import between, new_parser
from bench.environment import ROOT, checkpoint, environment
from bench.records import Journal, Record, file_of

_HELP = """\
Runs `std-decode demo --repeat R --seconds N --draft-length G` for each clip length and draft
length, each in a process of its own, and keeps what it measures: tokens/s unpatched, by our dense
path and patched, their ratios, acceptance, tokens per dense pass, whether all tokens were
identical, and how many of the clip's attributes the narration tells right.

For the tables of README and docs/pays.md run it on a quiet machine:
python -m bench demo --draft-length auto --out bench/results, then
python -m bench report. The three ways take turns within a run, and ratios are medians of the
turns' ratios, so a machine that slows down slows all of them.

Writes demo-DEVICE.jsonl into DIR as it goes. --resume keeps the runs that are in there already,
given the same sources, demo model and threads.
Exit status: 0, 1 if a run failed or its tokens were not identical."""
_EXAMPLES = """\
examples:
  python -m bench demo --out bench/results                     a quarter of an hour on two cores
  python -m bench demo --seconds 64 --draft-length 4 --repeat 1    half a minute
  python -m bench demo --draft-length 2 4 8 --top-k-keys 256"""
KEPT = ("video_tokens", "identical", "unpatched_tokens_per_second", "dense_path_tokens_per_second",
        "patched_tokens_per_second", "over_unpatched", "over_dense_path", "attributes_right",
        "drafted", "accepted", "acceptance_rate", "mean_accepted_length", "emitted",
        "rounds")  # fmt: skip
_SHOWN = ("seconds", "draft_length", "unpatched_tokens_per_second",
          "dense_path_tokens_per_second", "patched_tokens_per_second", "over_unpatched",
          "over_dense_path", "acceptance_rate", "mean_accepted_length", "identical")  # fmt: skip


def _draft_length(text: str) -> str | int:
    return text if text == "auto" else between(int, 0, 63)(text)


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "demo",
        "the demo's figures over clips and draft lengths, for README and docs/pays.md",
        _HELP,
        _EXAMPLES,
    )
    add = parser.add_argument
    add("--seconds", type=between(int, 1, 4096), nargs="+", metavar="N", default=[256, 1024, 4096],
        help="length of the clips, 4 video tokens each (default 256 1024 4096)")  # fmt: skip
    add("--draft-length", type=_draft_length, nargs="+", metavar="G", default=["auto", 4],
        help="tokens drafted a round, or auto (default auto 4)")  # fmt: skip
    add("--repeat", type=between(int, 1, 1000), default=5, metavar="R",
        help="runs of each way (default 5)")  # fmt: skip
    add("--top-k-keys", type=between(int, 1, 2**31), default=64, metavar="K",
        help="video keys a draft reads per layer and KV head (default 64)")  # fmt: skip
    add("--events", type=between(int, 1, 64), default=12, metavar="N",
        help="in a clip (default 12)")  # fmt: skip
    add("--seed", type=between(int, 0, 2**31), default=0, help="of the clips (default 0)")
    add("--resume", action="store_true", help="go on where a run into DIR was cut off")
    add("--out", type=Path, metavar="DIR", help="where to write (default: only print)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.table import Table

    given = {name: getattr(options, name) for name in ("repeat", "top_k_keys", "events", "seed")}
    about = environment(torch.device("cpu"), checkpoint=checkpoint(), **given)
    path = None if options.out is None else file_of(options.out, "demo", about["device"])
    complete = (lambda record: record["status"] == "ok") if options.resume else None
    journal = Journal(path, about, complete)
    known = {(record["draft_length"], record["seconds"]) for record in journal.records[1:]}
    console = Console(width=None if sys.stdout.isatty() else 160)
    for length, seconds in product(options.draft_length, options.seconds):
        if (length, seconds) not in known:
            with console.status(f"{seconds} s, {length} drafts a round"):
                journal.keep(_one(seconds, length, given))
    table = Table(*(name.replace("_", " ") for name in (*_SHOWN, "status")))
    for record in journal.records[1:]:
        table.add_row(*map(_cell, (record.get(name) for name in (*_SHOWN, "status"))))
    console.print(table)
    if path is not None:
        console.print(f"written to {path}", soft_wrap=True)
    good = all(r["status"] == "ok" and r["identical"] for r in journal.records[1:])
    return 0 if good else 1


def _one(seconds: int, length: str | int, given: Record) -> Record:
    """The record of one run of the demo."""
    where = {"kind": "demo", "seconds": seconds, "draft_length": length, **given}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        words: Sequence[Any] = (
            sys.executable, "-m", "std_decode", "demo", "--seconds", seconds, "--draft-length",
            length, "--json", path, *(w for name, value in given.items()
                                      for w in (f"--{name.replace('_', '-')}", value)),
        )  # fmt: skip
        done = subprocess.run([*map(str, words)], cwd=ROOT, capture_output=True, text=True)
        if not path.exists():
            told = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
            return {**where, "status": f"failed: {told}"[:300]}
        figures = json.loads(path.read_text(encoding="utf-8"))
    figures["acceptance_rate"] = figures["acceptance_rate"] if figures["drafted"] else None
    return {**where, "status": "ok", **{name: figures[name] for name in KEPT}}


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

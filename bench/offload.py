"""A model whose weights are on a disk: tokens a second, patched beside unpatched."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from bench.arguments import between, new_parser
from bench.models import pretrained
from bench.records import Journal, Record, failure, file_of

_HELP = f"""\
Loads {pretrained.NAME} in float32 with device_map={{"": "disk"}}, so that accelerate brings each
weight in when its module runs, and answers questions about real texts: unpatched, and patched
with draft_weights="int4", draft_length="auto".

THE LINK. A stand-in between accelerate and the file says what reading costs, for both sides alike:
  cached       the file is in the page cache: where offloading costs least, and drafts gain least
  disk         what was read is dropped from the page cache at once (posix_fadvise DONTNEED), so
               that every pass reads the disk of this machine
  a number     so many GB/s: it sleeps for as long as a link of that speed would take, one weight
               after another. A STAND-IN: the file itself is in the page cache.

HOW IT IS TIMED. Both sides, each a model of its own, take turns in one process, and who goes first
alternates; each turn has a text of its own. A call is timed from its beginning to its end, the
prompt's pass included. "speedup" is the median of the turns' ratios, with the least and the most;
"same" is whether both sides said the same tokens in every turn. patch itself is timed apart, with
the file in the page cache; the first call of the patched side, which times dense steps first, is
part of the turns.

Needs the packages of `bench real`: {pretrained.INSTALL}, and accelerate. Writes into DIR as it
goes: offload-DEVICE.jsonl. Exit status: 0, 1 if tokens differed, 2 if it cannot run here. Being
slow is no error: look at the table."""
_EXAMPLES = """\
examples:
  OMP_NUM_THREADS=2 python -m bench offload --out bench/results      under 8 minutes on two cores
  python -m bench offload --links 0.25 --chosen greedy --resume --out bench/results  6 minutes more
  python -m bench offload --links 1 --turns 1 --new 16               half a minute"""
SEED = 7


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands, "offload", "weights on a disk, 4-bit drafts in memory", _HELP, _EXAMPLES
    )
    add = parser.add_argument
    add("--links", type=_link, nargs="+", metavar="LINK", default=[1.0, "disk", "cached"],
        help="cached, disk, or GB/s (default 1 disk cached)")  # fmt: skip
    add("--new", type=between(int, 2, 2**31), default=40, metavar="N",
        help="tokens of an answer (default 40)")  # fmt: skip
    add("--prompt", type=between(int, 16, 8000), default=500, metavar="N",
        help="tokens of a text (default 500)")  # fmt: skip
    add("--turns", type=between(int, 1, 2**31), default=3, metavar="R",
        help="of both sides (default 3)")  # fmt: skip
    add("--chosen", choices=["greedy", "sampled"], nargs="+", default=["greedy", "sampled"],
        help="how tokens are chosen (default: both ways)")  # fmt: skip
    add("--seconds", type=between(float, 0, 2**31), default=460.0, metavar="T",
        help="time box; what does not fit is listed as skipped (default 460)")  # fmt: skip
    add("--resume", action="store_true", help="keep what a run into DIR has measured, go on")
    add("--out", type=Path, metavar="DIR", help="where to write (default: only print)")
    parser.set_defaults(run=run)


def _link(text: str) -> float | str:
    return text if text in ("cached", "disk") else between(float, 0.001, 1e6)(text)


def run(options: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.markdown import Markdown

    from bench.environment import environment
    from bench.report.offload import tables

    if not pretrained.installed():
        print(f"bench offload: no pretrained model; {pretrained.INSTALL}", file=sys.stderr)
        return 2
    about = environment(
        torch.device("cpu"), model=pretrained.NAME, new_tokens=options.new, prompt=options.prompt
    )
    path = None if options.out is None else file_of(options.out, "offload", about["device"])
    complete = (lambda record: record["status"] == "ok") if options.resume else None
    journal = Journal(path, about, complete)
    with tempfile.TemporaryDirectory() as folder:
        for record in _records(options, Path(folder), journal.records[1:]):
            journal.keep(record)
    console = Console(width=None if sys.stdout.isatty() else 160)
    about, *records = journal.records
    console.print(Markdown("\n".join(tables(about, records))))
    return int(any(record.get("same") is False for record in records))


class Link(Mapping):
    """Stands between accelerate and the weights.

    Args:
        weights: by name, from files of a folder.

    Attributes:
        kind: as the command line names it.
        nbytes: that were read so far.
    """

    def __init__(self, weights: Mapping[str, Any], files: list[Path]):
        self.weights, self.files = weights, files
        self.kind: float | str = "cached"
        self.nbytes, self.free_at, self.lock = 0, 0.0, threading.Lock()

    def __getitem__(self, name: str) -> Any:
        begin = time.perf_counter()
        tensor = self.weights[name].clone()  # which reads it: a tensor of a mapped file does not
        if self.kind == "disk":
            for file in self.files:
                _drop(file)
        with self.lock:
            self.nbytes += tensor.nbytes
            if isinstance(self.kind, float):
                self.free_at = max(self.free_at, begin) + tensor.nbytes / (1e9 * self.kind)
        time.sleep(max(0.0, self.free_at - time.perf_counter()))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def _drop(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def load(folder: Path) -> tuple[Any, dict[str, tuple[Any, Link]]]:
    """The tokenizer, and both sides' model and link, from files in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer, model = pretrained.load(torch.float32)
    model.save_pretrained(folder)
    del model
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with open(file, "rb") as written:
            os.fsync(written.fileno())  # what is not written yet cannot be dropped
    sides = {}
    for side in ("unpatched", "patched"):
        one = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map={"": "disk"}, offload_folder=folder / side
        ).eval()
        sides[side] = one, _linked(one, files)
    return tokenizer, sides


def _linked(model: Any, files: list[Path]) -> Link:
    link: Link | None = None
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            link = link or Link(weights.dataset, files)
            weights.dataset = link
    assert link is not None
    return link


def _records(options: argparse.Namespace, folder: Path, known: list[Record]) -> Iterator[Record]:
    import std_decode

    deadline = time.monotonic() + options.seconds
    tokenizer, sides = load(folder)
    model, link = sides["patched"]
    begin = time.perf_counter()
    std_decode.patch(model, draft_weights="int4")
    twins = model._std_decode.draft_weights.twins
    yield {
        "part": "patch",
        "status": "ok",
        "seconds": time.perf_counter() - begin,
        "gb_read": link.nbytes / 1e9,
        "gb_kept": twins.nbytes / 1e9,
        "gb_dense_pass": twins.offload.fetched_bytes / 1e9,
    }
    prompts = [pretrained.prompt(tokenizer, options.prompt, turn) for turn in range(options.turns)]
    first, *others = options.links  # in the order of what matters: time may be short
    cells = [(first, False), (first, True), *((x, False) for x in others)]
    wanted = [chosen == "sampled" for chosen in options.chosen]
    done = [(record["link"], record["sampled"]) for record in known if record["part"] == "speed"]
    for kind, sampled in [*cells, *((x, True) for x in others)]:
        if sampled not in wanted or (kind, sampled) in done:
            continue
        record = {"part": "speed", "link": kind, "sampled": sampled}
        try:
            yield record | _cell(sides, prompts, kind, sampled, options.new, deadline)
        except Exception as error:
            yield record | {"status": failure(error)}
    std_decode.unpatch(model)


def _cell(
    sides: dict[str, tuple[Any, Link]],
    prompts: list[Any],
    kind: float | str,
    sampled: bool,
    new: int,
    deadline: float,
) -> Record:
    """What both sides did with each prompt over one kind of link."""
    turns: list[dict[str, Any]] = []
    for turn, prompt in enumerate(prompts):
        longest = max((sum(one["seconds"].values()) for one in turns), default=0.0)
        if time.monotonic() + longest > deadline:
            break
        order = ["unpatched", "patched"]
        calls = {side: _call(*sides[side], prompt, kind, sampled, new)
                 for side in order[:: -1 if turn % 2 else 1]}  # fmt: skip
        turns.append({
            "seconds": {side: calls[side]["seconds"] for side in order},
            "gb_read": {side: calls[side]["gb_read"] for side in order},
            "same": calls["unpatched"]["tokens"] == calls["patched"]["tokens"],
            "tokens": len(calls["patched"]["tokens"]),
            **calls["patched"]["stats"],
        })  # fmt: skip
    if not turns:
        return {"status": "skipped: out of time"}
    ratios = [one["seconds"]["unpatched"] / one["seconds"]["patched"] for one in turns]
    return {
        "status": "ok",
        "speedup": median(ratios),
        "ratios": ratios,
        "same": all(one["same"] for one in turns),
        "turns": turns,
    }


def _call(
    model: Any, link: Link, prompt: Any, kind: float | str, sampled: bool, new: int
) -> dict[str, Any]:
    import torch

    import std_decode

    torch.manual_seed(SEED)
    link.kind, before, begin = kind, link.nbytes, time.perf_counter()
    length = prompt["input_ids"].shape[1]
    told = model.generate(**prompt, max_new_tokens=new, do_sample=sampled)[0, length:]
    seconds = time.perf_counter() - begin
    link.kind = "cached"
    stats = std_decode.last_stats(model) if std_decode.is_patched(model) else None
    return {
        "seconds": seconds,
        "gb_read": (link.nbytes - before) / 1e9,
        "tokens": told.tolist(),
        "stats": {} if stats is None else {
            "tokens_per_dense_pass": stats.mean_accepted_length,
            "draft_lengths": stats.draft_lengths,
            "acceptance": stats.acceptance_rate,
            "stages": stats.seconds,
            "calls": stats.calls,
            "looked_up": stats.lookup_accepted,
            "fallback": stats.fallback,
        },
    }  # fmt: skip

"""Random calls, patched and unpatched, by the thousand."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHARD = 100  # cases that are drawn from one seed
TIES = 3 / 2000  # that are no coincidence, of a case

_HELP = """\
Generates from random tiny models with random prompts and options, patched and unpatched, and
compares the tokens, what streamers, processors and criteria saw, and the state of the random
number generator: any family of tests/decode/families with pixels or text; videos, images and
text in any order; batches, left padding, masks with holes; any draft length each round; few or
all keys, re-selected or not, or random keys instead of the best, or none; EOS ids; processors and
sampling; captured passes; buffers that grow in mid-answer; two calls one after the other.

In float32 a token may differ where rounding decides between two that are closer than 1e-4
(tests/decode/margin.py): such ties are printed and counted. With another --dtype none may differ,
and of returned scores no bit. Cases come in shards of 100, each
drawn from the number of the shard; a failing one is reduced to a smallest one and printed. With
--state what is done is kept in FILE, and a run that was interrupted goes on from there.
Exit status: 0, 1 if any case fails or more than 3 in 2,000 had ties."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "lossless",
        help="random calls, patched and unpatched",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cases", type=int, default=2000, metavar="N", help="rounded up to hundreds (2000)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="of the models (float32)")  # fmt: skip
    add("--shard", default="1/1", metavar="I/N", help="every N-th hundred, from the I-th (1/1)")
    add("--state", type=Path, metavar="FILE", help="keep what is done here, and go on from it")
    add("--out", type=Path, metavar="DIR", help="write a section of DIR/reliability.md")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from bench.sections import about
    from tests.reliability import report

    quiet()
    here, of = map(int, options.shard.split("/"))
    shards = range(here - 1, math.ceil(options.cases / SHARD), of)
    done: dict[int, Any] = {}
    if options.state is not None and options.state.exists():
        lines = map(json.loads, options.state.read_text().splitlines())
        done = {line["shard"]: line for line in lines if line["shard"] in shards}
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("cases", total=len(shards) * SHARD, completed=len(done) * SHARD)
        for shard in shards:
            if shard in done:
                continue
            record = {"shard": shard, **cases(
                shard, SHARD, lambda: progress.advance(task), dtype=options.dtype
            )}  # fmt: skip
            done[shard] = record
            print(f"shard {shard}: {summary([record])}", flush=True)
            for line in (*record["ties"], *record["failures"]):
                print(f"  {line}", flush=True)
            if options.state is not None:
                with options.state.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    records = list(done.values())
    print(summary(records))
    title = "Random calls, patched and unpatched"
    if options.dtype != "float32":
        title += f", {options.dtype}"
    report.write(options.out, title, section(records, about(), options.dtype))
    failures, ties = (sum(len(r[name]) for r in records) for name in ("failures", "ties"))
    return int(bool(failures) or ties > math.ceil(TIES * len(records) * SHARD))


def quiet() -> None:
    """Silence what transformers says of unusual options, which here is every option."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers")
    warnings.filterwarnings("ignore", message=".*draft.*weights.*", category=UserWarning)


def cases(
    shard: int,
    count: int,
    each: Callable[[], None] = lambda: None,
    shrink: bool = True,
    dtype: str = "float32",
) -> dict:
    """Run `count` cases drawn from the number `shard`.

    The same number draws the same cases, as long as hypothesis and our source stay as they are (it
    draws constants found there, too). A failing
    one is reduced to a smallest one, if `shrink`.

    Returns:
        Counts, and the `ties` and `failures` in words.
    """
    from hypothesis import HealthCheck, Phase, given, seed, settings

    from tests.reliability.trials import run as run_trial
    from tests.reliability.trials import trials

    counts: Counter = Counter()
    families: Counter = Counter()
    ties, failures = [], []
    start = time.process_time()

    def body(trial: Any) -> None:
        each()
        outcome = run_trial(trial)
        families[trial.family] += 1
        counts["cases"] += 1
        for name in ("tokens", "rounds", "drafted", "accepted", "lockstep", "as_unpatched"):
            counts[name] += getattr(outcome, name)
        counts["captured"] += trial.captured
        counts["sampled"] += dict(trial.options)["do_sample"]
        counts["batches"] += len(trial.rows) > 1
        if outcome.ties:
            ties.append(f"ties at (call, row, step) {outcome.ties} of {trial}")

    plain = settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
    )
    test = plain(given(trials(dtype))(body))
    try:
        seed(shard)(test)()
    except Exception as error:
        failures.append(f"{type(error).__name__}: {error} | {'; '.join(notes(error))}")
    seconds = round(time.process_time() - start, 1)
    return dict(counts) | dict(
        families=dict(families), ties=ties, failures=failures, seconds=seconds
    )


def notes(error: BaseException) -> list[str]:
    """Of hypothesis, with the smallest failing case."""
    return [" ".join(note.split()) for note in getattr(error, "__notes__", ())]


def total(records: list[dict], name: str) -> Any:
    values = [record.get(name, 0) for record in records]
    return [line for value in values for line in value] if name in ("ties", "failures") else (
        sum(values)
    )  # fmt: skip


def summary(records: list[dict]) -> str:
    names = ("cases", "tokens", "rounds", "drafted", "accepted")
    figures = ", ".join(f"{total(records, name):,} {name}" for name in names)
    return (
        f"{figures}, {len(total(records, 'ties'))} near ties, "
        f"{len(total(records, 'failures'))} failed, {total(records, 'seconds'):.0f} s of CPU"
    )


def section(records: list[dict], about: str, dtype: str) -> str:
    families: Counter = Counter()
    for record in records:
        families.update(record["families"])
    kinds = ", ".join(f"{name} {count}" for name, count in sorted(families.items()))
    parts = {name: total(records, name) for name in ("lockstep", "captured", "sampled", "batches")}
    worst = [*total(records, "failures"), *total(records, "ties")]
    option, more = "", ""
    if dtype != "float32":
        option = f" --dtype {dtype}"
        more = (
            " No token may differ, however near a tie: from the unpatched model's in "
            f"{total(records, 'as_unpatched'):,} cases, from those without drafts in passes of "
            "one shape in the others."
        )
    return "\n".join(
        [
            f"`python -m tests.reliability lossless --cases {len(records) * SHARD}{option}` "
            f"({about}):",
            "",
            f"{summary(records)}.",
            "",
            f"Families: {kinds}. In lockstep {parts['lockstep']}, with captured passes "
            f"{parts['captured']}, sampled {parts['sampled']}, batches {parts['batches']}.{more}",
            *(["", *(f"- {line}" for line in worst)] if worst else []),
        ]
    )

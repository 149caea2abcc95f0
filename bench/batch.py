"""How many videos a minute `std-decode batch` answers, beside a loop over one at a time."""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from typing import Any

from bench.arguments import between, new_parser

_HELP = """\
Renders camera clips of many lengths into video files and has the demo model narrate all of them:
by a plain loop that reads, asks and generates one at a time, unpatched and patched, and as
`std-decode batch` does, at several batch sizes. Reading the files is part of the time, loading the
model is not; "reading alone" is what it comes to. "loop over compare" is what a user without
`batch` might do: `std-decode compare --no-advice` for each file, which answers three times, two of
them patched, and loads the model; here in one process, so without starting Python anew.

HOW IT IS TIMED. All ways take turns in one process, in an order that is reversed each time, and so
often as --repeat says. The seconds are medians; "over the loop" is the median of the ratios to the
unpatched loop of the same turn, with their least and greatest. "same answers" counts the videos
whose text is that of the unpatched loop, in every turn. On a machine that others use set
OMP_NUM_THREADS=1: threads that wait for each other would measure them.

Writes into DIR: batch.jsonl (a record for each way) and batch.md (a table). Exit status: 0, 1 if
an answer differs, 2 if it cannot run. Being slow is no error: look at the table."""
_EXAMPLES = """\
examples:
  python -m bench batch --out bench/results                          a few minutes on two cores
  python -m bench batch --clips 4 --seconds 8 16 --batch-sizes 2 --repeat 1    a few seconds"""
EVENTS = 6
LOOP = "loop, unpatched"
_HEAD = ("way", "seconds", "videos/s", "tokens/s", "over the loop", "least-most", "same answers")


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "batch",
        "videos answered together and one at a time, demo model",
        _HELP,
        _EXAMPLES,
    )
    add = parser.add_argument
    count = between(int, 1, 2**31)
    add("--clips", type=count, default=24, metavar="N", help="to narrate (default 24)")
    add("--seconds", type=between(int, EVENTS, 4096), nargs=2, metavar=("LEAST", "MOST"),
        default=[32, 256], help="of the shortest and the longest clip (default 32 256); 4 video "
        "tokens a second")  # fmt: skip
    add("--batch-sizes", type=count, nargs="+", metavar="B", default=[1, 4, 8, 16],
        help="of `std-decode batch` (default 1 4 8 16)")  # fmt: skip
    add("--draft-length", type=between(int, 0, 63), metavar="G",
        help="where patched (default: auto)")  # fmt: skip
    add("--repeat", type=count, default=5, metavar="R", help="turns (default 5)")
    add("--seed", type=int, default=0, help="of the clips (default 0)")
    add("--out", type=Path, metavar="DIR", help="where to write (default: only print)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from bench.environment import environment

    if options.seconds[0] > options.seconds[1]:
        least, most = options.seconds
        print(
            f"bench batch: --seconds is {least} {most}, expected the least first", file=sys.stderr
        )
        return 2
    about = environment(torch.device("cpu"))
    console = Console(width=None if sys.stdout.isatty() else 120)
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        videos = _film(options, Path(folder), progress)
        records = _measure(options, videos, progress)
    about |= {"conditions": _conditions(options, about)}
    console.print(about["conditions"], soft_wrap=True)
    console.print(_table(records))
    if options.out is not None:
        _write(options.out, about, records)
    return 1 if any(record["same"] < options.clips for record in records) else 0


def _film(options: argparse.Namespace, folder: Path, progress: Any) -> list[str]:
    import numpy as np

    from std_decode.demo import camera, video

    rng = np.random.default_rng(options.seed)
    least, most = options.seconds
    seconds = np.linspace(least, most, options.clips).round().astype(int)
    paths = []
    for i, length in enumerate(progress.track(rng.permutation(seconds), description="filming")):
        paths.append(folder / f"{i}.mp4")
        video.render(camera.random_clip(int(length), EVENTS, rng), paths[-1], rng)
    return list(map(str, paths))


def _measure(
    options: argparse.Namespace, videos: list[str], progress: Any
) -> list[dict[str, Any]]:
    import std_decode
    from std_decode.app.batch.run import answer_here
    from std_decode.app.batch.videos import batches, estimate
    from std_decode.app.batch.worker import Job, Row, Settings, Worker
    from std_decode.demo.camera import TAGS

    draft_length = "auto" if options.draft_length is None else options.draft_length
    settings = Settings("demo", None, 5 * TAGS + 8, "float32")
    worker = Worker(Job(None, settings, False, dict(draft_length=draft_length)))

    def loop() -> list[Row]:
        return [row for video in videos for row in worker.answer(worker.read([video]))]

    def together(size: int) -> Callable[[], list[Row]]:
        def call() -> list[Row]:
            lengths = [estimate(video, None) for video in videos]
            work = batches(videos, lengths, size)
            return [row for rows in answer_here(worker, work) for row in rows]

        return call

    def compared() -> list[Row]:
        return [_compare(video, str(draft_length)) for video in videos]

    ways = {LOOP: loop, "loop, patched": loop, "loop over compare": compared}
    ways |= {f"batch, size {size}": together(size) for size in options.batch_sizes}
    spans: dict[str, list[float]] = {name: [] for name in (*ways, "reading alone")}
    told: dict[str, list[dict[str, Row]]] = {name: [] for name in ways}
    worker.answer(worker.read(videos[:2]))  # what is done once, not to be timed
    task = progress.add_task("narrating", total=options.repeat * (len(ways) + 1))
    for turn in range(options.repeat):
        for name, way in list(ways.items())[:: -1 if turn % 2 else 1]:
            if name == LOOP:
                std_decode.unpatch(worker.model)
            begun = time.perf_counter()
            rows = way()
            spans[name].append(time.perf_counter() - begun)
            if name == LOOP:
                std_decode.patch(worker.model, **worker.job.patch)
            told[name].append({row["video"]: row for row in rows})
            progress.advance(task)
        begun = time.perf_counter()
        worker.read(videos)
        spans["reading alone"].append(time.perf_counter() - begun)
        progress.advance(task)
    return _records(videos, spans, told)


def _compare(video: str, draft_length: str) -> dict[str, Any]:
    """The row of an answer by `std-decode compare`."""
    from std_decode.app import main as cli

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        figures = Path(folder) / "figures.json"
        given = ["--no-advice", "--draft-length", draft_length, "--json", str(figures)]
        if cli.main(["compare", "--video", video, *given]) != 0:
            return {"video": video, "error": "the tokens were not identical"}
        told = json.loads(figures.read_text())
    return {"video": video, "answer": told["answer"], "tokens": told["answer_tokens"]}


def _records(
    videos: Sequence[str], spans: dict[str, list[float]], told: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    right = told[LOOP][0]
    tokens = sum(row.get("tokens", 0) for row in right.values())
    records = []
    for name, seconds in spans.items():
        ratios = [loop / own for loop, own in zip(spans[LOOP], seconds)]
        same = sum(
            all("answer" in r[v] and r[v]["answer"] == right[v]["answer"] for r in told[name])
            for v in (videos if name in told else ())
        )
        records.append(
            {
                "way": name,
                "seconds": median(seconds),
                "videos_per_s": len(videos) / median(seconds),
                "tokens_per_s": tokens / median(seconds),
                "ratio": median(ratios),
                "ratios": ratios,
                "same": same if name in told else len(videos),
                "videos": len(videos),
            }
        )
    return records


def _conditions(options: argparse.Namespace, about: dict[str, Any]) -> str:
    least, most = options.seconds
    drafts = "auto" if options.draft_length is None else options.draft_length
    return (
        f"{options.clips} clips of {least} to {most} s ({4 * least:,} to {4 * most:,} video "
        f"tokens), {EVENTS} events each, seed {options.seed}; demo model, float32, greedy, "
        f"draft length {drafts}; {options.repeat} turns, on {about['device']}, "
        f"{about['threads']} thread(s); torch {about['torch']}, transformers "
        f"{about['transformers']}, commit {about['commit']}, {about['date']}."
    )


def _cells(record: dict[str, Any]) -> list[str]:
    cells = [record["way"], f"{record['seconds']:.2f}"]
    if record["way"] == "reading alone":
        return [*cells, f"{record['videos_per_s']:.2f}", *["-"] * (len(_HEAD) - 3)]
    return [
        *cells,
        f"{record['videos_per_s']:.2f}",
        f"{record['tokens_per_s']:.0f}",
        f"{record['ratio']:.2f}x",
        f"{min(record['ratios']):.2f}-{max(record['ratios']):.2f}",
        f"{record['same']} of {record['videos']}",
    ]


def _table(records: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    shown = Table(*_HEAD, title="Many videos, one question")
    for record in records:
        shown.add_row(*_cells(record))
    return shown


def _write(out: Path, about: dict[str, Any], records: list[dict[str, Any]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) + "\n" for record in (about, *records)]
    from std_decode.app.output import replace_file

    replace_file(out / "batch.jsonl", "".join(lines).encode())
    rows = [_HEAD, ["---"] * len(_HEAD), *map(_cells, records)]
    text = [
        "# Many videos answered together, beside a loop over one at a time", "",
        about["conditions"], "How it is timed: `python -m bench batch --help`.", "",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]  # fmt: skip
    replace_file(out / "batch.md", ("\n".join(text) + "\n").encode())

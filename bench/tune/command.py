"""Finds launch configurations on this machine's GPU, for the table in std_kernels/_tuning.py."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.arguments import between, new_parser

_OPS = ("verify_attention", "sparse_attention", "score_keys", "select_topk")
SECONDS = 0.06  # of a row at a size
_HELP = """\
Sweeps tile sizes, warps, pipeline stages and split lengths of each Triton kernel over the sizes
that its row of the launch table is for, and prints the rows to put into std_kernels/_tuning.py,
as source lines, with the gain over the rows that are there. Nothing is changed by itself: the
table is frozen, so that a kernel gives the same bits tomorrow.

  1. Each configuration is compiled as `bench compile` does; what spills registers, takes more
     shared memory than the GPU has or makes no use of tensor cores is dropped untimed.
  2. Those left are timed at one size, as `bench kernels` does (median of a captured CUDA graph's
     replays, L2 cache cleared before each); what is not right by the float64 reference, or breaks
     verify_attention's promise of the same bits for any T, is dropped.
  3. The best 6 and the present one are timed at every size; of the best, each split length.

A row is changed only for a gain of 2% over all its sizes. Every timing is in DIR/tune.jsonl as
soon as it is known; --resume goes on from there. For float32 and other head dims run it again
with --dtype and --head-dim. It has not been run on a GPU yet: expect half an hour each.

Exit status: 0, 1 if a present row is not right or the time box ended first, 2 without a GPU."""
_EXAMPLES = """\
examples:
  python -m bench tune --out tune                     every kernel, bfloat16, head dim 128
  python -m bench tune --op sparse_attention --head-dim 64 --out tune64
  python -m bench tune --out tune --seconds 540 --resume"""


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "tune",
        "on a GPU: find the launch configurations to put into the table",
        _HELP,
        _EXAMPLES,
    )
    add = parser.add_argument
    add("--op", choices=_OPS, nargs="+", default=list(_OPS), metavar="OP",
        help=f"of {', '.join(_OPS)} (default: all)")  # fmt: skip
    add("--head-dim", type=int, choices=(64, 128, 256), default=128, help="default 128")
    add("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16",
        help="fp16 and bf16 share their rows (default bfloat16)")  # fmt: skip
    add("--seconds", type=between(float, 0, 2**31), metavar="S", help="time box (default: none)")
    add("--resume", action="store_true",
        help="keep what DIR has of the same commit, device and versions")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="where to write (default: only print)")
    parser.set_defaults(run=run)


class OutOfTime(Exception):
    """The time box has ended."""


def run(options: argparse.Namespace, clock: Callable[[], float] = time.monotonic) -> int:
    import torch

    if not torch.cuda.is_available():
        print("bench tune: torch finds no GPU on this machine; nothing was run", file=sys.stderr)
        return 2
    from bench.environment import environment
    from bench.kernels.ops import Inputs
    from bench.kernels.results import Results
    from bench.tune.search import subjects
    from std_kernels import _tuning

    device, dtype = torch.device("cuda"), getattr(torch, options.dtype)
    about = environment(device, dtype=options.dtype)
    path = None if options.out is None else options.out / "tune.jsonl"
    results = Results(path, about, options.resume, kept=lambda record: True)
    deadline = math.inf if options.seconds is None else clock() + options.seconds
    lab = Lab(Inputs(device, dtype), results, lambda: clock() >= deadline)
    chosen = [
        subject
        for subject in subjects(options.head_dim, _tuning.precision(dtype))
        if subject.op in options.op
    ]
    with torch.inference_mode():
        return tune(chosen, lab, _tuning.arch_of(device))


def tune(chosen: Sequence[Any], lab: Lab, arch: str) -> int:
    """Search for each subject, print what was found; the exit status."""
    from rich.console import Console

    from bench.tune.search import present_row, search

    console = Console(width=None if sys.stdout.isatty() else 120)
    code = 0
    for subject in chosen:
        lab.begin(subject)
        present = present_row(subject, arch)
        try:
            choice = search(subject, present, lab.compiling_well, lab.time)
        except OutOfTime:
            console.print(f"{subject.name}: out of time; go on with --resume", style="yellow")
            code = 1
            continue
        for line in report(choice, present, lab.results.about):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        for status in dict.fromkeys(lab.bad_present(present)):
            console.print(f"  the present row is {status}", style="red")
            code = 1
    return code


def report(choice: Any, present: Any, about: dict[str, Any]) -> list[str]:
    """What to put into the table, in lines."""
    from bench.tune.search import source_line

    where = f"{about.get('gpu') or about.get('cpu')}, Triton {about['triton']}"
    title = f"{present.op}, {present.kernel}, {present.dtype}"
    if choice.row == present:
        source = f"measured on {where}: none of {choice.timed} timings was 2% faster"
        head = f"{title}: keep the present row"
    else:
        source = f"measured on {where}: {choice.gain:.2f}x the speed of the row before"
        head = f"{title}: {choice.gain:.2f}x the speed of the present row"
        if choice.gain == math.inf:
            source = f"measured on {where}, where the row before is not right"
            head = f"{title}: the present row is not right, this one is"
    return [head, source_line(choice.row._replace(source=source))]


class Lab:
    """Compiles, checks and times rows; each once, also across runs that go on from a file."""

    def __init__(self, inputs: Any, results: Any, late: Callable[[], bool], timer: Any = None):
        self.inputs, self.results, self.late = inputs, results, late
        self.timer = timer or self._median
        self.subject: Any = None
        self.point: Any = None
        self.case: Any = None
        self.notes: dict[str, str] = {}  # on the newest timing
        self.known: dict[Any, dict[str, Any]] = {}
        for record in results.rows:
            self.known[_key(record)] = record

    def begin(self, subject: Any) -> None:
        self.subject = subject

    def compiling_well(self, rows: Sequence[Any]) -> list[Any]:
        """Those that `bench compile` finds nothing wrong with, if it knows the target."""
        from bench import compile as aot
        from std_kernels import _tuning

        if not rows or rows[0].arch not in _tuning.TARGETS:
            return list(rows)
        asked = [row for row in rows if _key(self._record(row, None)) not in self.known]
        kind = "fp32" if self.subject.dtype == _tuning.FLOAT else "bf16"
        cases = [
            aot.Case(row.arch, kind, row, index)
            for row in asked
            for index, _ in enumerate(aot.specs_of(row.arch, kind, row))
        ]
        problems: dict[Any, list[str]] = {row: [] for row in asked}
        for case, result in zip(cases, aot.compile_all(cases, None) if cases else ()):
            problems[case.row] += result.problems
        for row, found in problems.items():
            self._keep(row, None, f"dropped: {found[0]}" if found else "ok")
        return [row for row in rows if self.known[_key(self._record(row, None))]["status"] == "ok"]

    def time(self, row: Any, point: Any) -> float:
        """Milliseconds, infinity for a row that is not right."""
        from bench.tune.search import launched_with

        known = self.known.get(_key(self._record(row, point)))
        if known is None:
            if self.late():
                raise OutOfTime
            with launched_with(row):
                known = self._measured(row, point)
        return known.get("ms", math.inf)

    def _measured(self, row: Any, point: Any) -> dict[str, Any]:
        from bench.records import failure

        try:
            if point != self.point:
                self.case = None  # before the next is made
                self.case, self.point = self.inputs.case(point), point
            found = self.case.check()
            if not found <= 1:
                return self._keep(row, point, f"wrong: error {found:.3g} times what is allowed")
            if self.case.promise is not None and not self.case.promise():
                return self._keep(row, point, "wrong: a token's bits depend on T")
            ms = self.timer(row, point)
            return self._keep(row, point, "ok", ms=ms, **self.notes)
        except Exception as error:  # too much shared memory, registers, ...
            return self._keep(row, point, failure(error))

    def _median(self, row: Any, point: Any) -> float:
        from bench.kernels.timing import as_graph, cold

        device = self.inputs.device
        launch, why = as_graph(self.case.run, device)
        self.notes = {} if why is None else {"relaunched": why}
        return median(cold(launch, device, SECONDS))

    def bad_present(self, present: Any) -> list[str]:
        """What is wrong with the present row at some size."""
        records = (self.known.get(_key(self._record(present, p))) for p in self.subject.points)
        return [r["status"] for r in records if r is not None and r["status"] != "ok"]

    def _record(self, row: Any, point: Any) -> dict[str, Any]:
        from bench.tune.search import describe

        where = dict(kernel=self.subject.kernel, dtype=self.subject.dtype, what="tuning")
        size = dict(op=row.op) if point is None else point._asdict()
        return {**size, **where, "head_dim": self.subject.head_dim, **describe(row)}

    def _keep(self, row: Any, point: Any, status: str, **more: Any) -> dict[str, Any]:
        record = {**self._record(row, point), "status": status, **more}
        self.results.keep(record)
        self.known[_key(record)] = record
        return record


def _key(record: dict[str, Any]) -> str:
    """What a timing is of."""
    return str(
        sorted((k, v) for k, v in record.items() if k not in ("status", "ms", "relaunched"))
    )

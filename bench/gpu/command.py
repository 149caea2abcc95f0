"""One whole round on a GPU: test, time ops, prefill, decoding. All is on disk once it is known."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench.arguments import new_parser
from bench.environment import ROOT

GRACE = 12  # seconds after its time box that a part may take to end by itself
_HELP = """\
Runs the GPU test suite, then times each op at a few real sizes beside its rivals, then prefill and
decoding at a 7B model's shape and of the demo model beside transformers' (see --help of python -m
bench kernels, prefill and decode). Takes less than 9 minutes: each part has a time box, and what
did not fit is listed as skipped. What computes something wrong is reported and not timed. Writes
into DIR as it goes, so that a run that is cut off still counts:

  round-DEVICE.jsonl     GPU, driver, versions, commit, date; then each part and how it ended
  tests.log, tests.xml   what pytest said
  kernels-DEVICE.jsonl, .md, kernels.log   each op beside its rivals
  prefill-DEVICE.jsonl, .md, prefill.log   time to the first token, patched beside unpatched
  decode-DEVICE.jsonl, .md, .png, decode.log   decoding, whole models

--resume goes on where a run into DIR was cut off or ran out of time, given the same sources and
GPU: it leaves out parts that are complete, and their time is for the rest, which keep the figures
they have. Run it until nothing is skipped for want of time. To publish, copy the .jsonl files but
the first to bench/results and run python -m bench report.

The exit status is 0 if everything passed, 1 if something failed or is wrong, and 2 without a GPU.
"""


class Part(NamedTuple):
    """A command in a process group of its own.

    Attributes:
        seconds: its time box; pytest is stopped then, the others end by themselves.
        options: of pytest for "tests", else of ``python -m bench NAME``.
    """

    name: str
    seconds: float
    options: list[str]
    grace: float = GRACE


PARTS = [
    Part("tests", 210, ["-m", "gpu", "-v", "-rfEs", "--durations=10", "tests"], grace=0),
    Part("kernels", 100, ["--preset", "round"]),
    Part("prefill", 30, ["--shape", "qwen2-vl-7b", "--tokens", "4096", "25000", "--pairs", "7"]),
    Part(
        "decode",
        155,
        ["--shape", "qwen2-vl-7b", "demo", "--batch", "1", "8", "--draft-weights", "own", "int4"],
    ),
]


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "gpu",
        "test and time ops and decoding on the GPU of this machine, in under 9 minutes",
        _HELP,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where to write")
    add("--skip-tests", action="store_true", help="go straight to the timing")
    add("--resume", action="store_true", help="go on where a run into DIR was cut off")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import torch

    from bench.environment import environment

    if not torch.cuda.is_available():
        print("bench gpu: torch finds no GPU on this machine; nothing was run", file=sys.stderr)
        return 2
    parts = [part for part in PARTS if part.name != "tests" or not options.skip_tests]
    return run_parts(options.out, environment(torch.device("cuda")), parts, options.resume)


def run_parts(out: Path, about: dict[str, Any], parts: list[Part], resume: bool) -> int:
    """Those that an earlier run has not completed; 0 if all have passed, now or then."""
    from bench.records import Journal, file_of

    path = file_of(out, "round", about["device"])
    journal = Journal(path, about, (lambda record: record["complete"]) if resume else None)
    known = {record["part"] for record in journal.records[1:]}
    for name in sorted(known):
        print(f"{name}: complete since an earlier run")
    rest = [part for part in parts if part.name not in known]
    more = sum(part.seconds for part in parts) / max(1, sum(part.seconds for part in rest))
    for part in rest:
        results = file_of(out, part.name, about["device"])
        journal.keep(time_part(part, out, results, more * part.seconds, resume))
    wanted = {part.name for part in parts}
    ended = [record for record in journal.records[1:] if record["part"] in wanted]
    return 0 if all(record["passed"] for record in ended) else 1


def time_part(
    part: Part, out: Path, results: Path, seconds: float, resume: bool = False
) -> dict[str, Any]:
    """Runs a part and says how it ended: whether it passed, and whether anything is left to do."""
    out.mkdir(parents=True, exist_ok=True)
    if part.name == "tests":
        xml = (out / "tests.xml").resolve()
        command = [sys.executable, "-m", "pytest", *part.options, f"--junitxml={xml}"]
    else:
        command = [sys.executable, "-m", "bench", part.name, *part.options,
                   "--seconds", str(seconds), "--out", str(out.resolve())]  # fmt: skip
        command += ["--name", results.stem] if part.name == "kernels" else []
        command += ["--resume"] if resume else []
    log = out / f"{part.name}.log"
    started = time.monotonic()
    code = _run_apart(part.name, command, log, seconds + part.grace)
    if part.name != "tests":
        print(log.read_text(errors="replace"))
    text = results.read_text(encoding="utf-8") if results.exists() else ""
    return {
        "kind": "part",
        "part": part.name,
        "exit_status": code,
        "seconds": round(time.monotonic() - started, 1),
        "passed": code == 0,
        "complete": code in (0, 1) and "out of time" not in text,
    }


def _run_apart(name: str, command: list[str], log: Path, seconds: float) -> int | None:
    """The exit status; None if after `seconds` the command and what it started was killed."""
    started = time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            # The group is ours alone: tests and compilers start processes of their own.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    lines = log.read_text(errors="replace").strip().splitlines()
    verdict = f"stopped after {seconds:.0f} s" if code is None else f"exit status {code}"
    print(f"{name}: {verdict}, {time.monotonic() - started:.0f} s: {lines[-1] if lines else ''}")
    return code

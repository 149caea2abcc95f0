"""The parts of a round, each a command in a process group of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from bench.environment import ROOT, in_words, output
from bench.gpu import passed, summary
from bench.records import Journal, Record, file_of, read

START = 15  # seconds that a process may take before its time box begins: it imports torch
GRACE = 12  # and after it, for what was begun in time
LOOK = 10  # seconds from one look at the GPU's clocks to the next
LOG = "round.log"
_CLOCKS = ("clocks.sm", "temperature.gpu", "power.draw", "clocks_event_reasons.active")


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Part(NamedTuple):
    """A command.

    Attributes:
        weight: its share of the time that is left, beside those of the parts after it.
        options: of pytest for "pytest", else of ``python -m bench COMMAND``.
        command: where it is not the name. Parts of one command share its results file.
    """

    name: str
    weight: float
    options: list[str]
    command: str | None = None

    @property
    def runs(self) -> str:
        return self.command or self.name


_DECODE = ["--draft-weights", "own", "int4", "--new-tokens", "41", "--runs", "3"]
# In the order of what one would know if the time ended there. The first three take four minutes:
# whether tokens are the same on this device, what a step, a draft and a verification of a 7B take,
# captured and compiled, with and without 4-bit drafts, and whose bits depend on the tokens fed.
PARTS = [
    Part(
        "identity",
        35,
        ["-m", "gpu", "-v", "-rfEs", "tests/decode/test_gpu.py", "-k",
         "qwen2_vl and (same_tokens and ragged or one_shape)"],
        "pytest",
    ),
    Part("one", 160, ["--shape", "qwen2-vl-7b", "--batch", "1", *_DECODE], "decode"),
    Part(
        "promises",
        40,
        ["--models", "qwen2-vl-7b", "--tokens", "25000", "--dtypes", "bfloat16", "--new", "24",
         "--runs", "2"],
    ),
    Part(
        "tests",
        140,
        ["-m", "gpu", "-v", "-rfEs", "--durations=10", "-k", "not memcheck"],
        "pytest",
    ),
    Part("kernels", 70, ["--preset", "round"]),
    # From where weights no longer decide alone to where keys do; what fits on an 80 GB GPU.
    Part(
        "many",
        100,
        ["--shape", "qwen2-vl-7b", "demo", "--batch", "8", "32", *_DECODE],
        "decode",
    ),
    Part("prefill", 35, ["--shape", "qwen2-vl-7b", "--tokens", "4096", "25000", "--pairs", "7"]),
    # With what is left: it may take minutes.
    Part(
        "memcheck",
        10,
        ["-m", "gpu", "-v", "-rfEs", "tests/kernels/test_gpu.py", "-k", "memcheck"],
        "pytest",
    ),
]  # fmt: skip


def run_parts(
    out: Path, about: Record, parts: list[Part], deadline: float, resume: bool
) -> int:  # fmt: skip
    """Those that an earlier run has not completed; 0 if all have passed, now or then.

    Args:
        deadline: on the clock of `time.monotonic`.
    """
    path = file_of(out, "round", about["device"])
    journal = Journal(path, about, _goes_on if resume else None)
    _say(f"{in_words(journal.about)}, sources {about.get('sources')}")
    known = {r["part"] for r in journal.records[1:] if r["kind"] == "part"}
    rest = [part for part in parts if part.name not in known]
    for part in parts:
        if part.name in known:
            _tell(part, out, about, f"{part.name}: complete since an earlier run")
            continue
        weight = part.weight / sum(other.weight for other in rest[rest.index(part) :])
        seconds = weight * max(0.0, deadline - time.monotonic())
        # A part before it may have begun its results file.
        adds = any(part.runs == earlier.runs for earlier in parts[: parts.index(part)])
        journal.keep(time_part(part, out, about, seconds, resume or adds))
    wanted = {part.name for part in parts}
    last = {r["part"]: r["passed"] for r in read(path)[1:] if r.get("part") in wanted}
    return 0 if all(last.values()) else 1


def _goes_on(record: Record) -> bool:
    """What a resumed round keeps of the one before: tests that were run, and complete parts."""
    return record["kind"] == "test" or record.get("complete", False)


def time_part(
    part: Part, out: Path, about: Record, seconds: float, resume: bool = False
) -> Record:  # fmt: skip
    """Runs a part and says how it ended: whether it passed, and whether anything is left to do."""
    out.mkdir(parents=True, exist_ok=True)
    results = file_of(out, part.runs, about["device"])
    journal = file_of(out, "round", about["device"])
    if part.runs == "pytest":
        command = [sys.executable, "-m", "pytest", *part.options]
        command += _tests() if part.name == "tests" else []
        command += ["-p", "bench.gpu.passed"]
    else:
        box = max(0.0, seconds - START)
        command = [sys.executable, "-m", "bench", part.runs, *part.options,
                   "--seconds", f"{box:.1f}", "--out", str(out.resolve())]  # fmt: skip
        command += ["--name", results.stem] if part.runs == "kernels" else []
        command += ["--resume"] if resume else []
    started = time.monotonic()
    surroundings = {
        passed.JOURNAL: str(journal.resolve()),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }
    looks: list[str] = []
    with open(out / LOG, "ab") as log:
        log.write(f"\n==== {part.name}: {' '.join(command)}\n".encode())
        log.flush()
        begun = log.tell()
        code = _run_apart(command, log, seconds + GRACE, surroundings, looks)
    # Its tables are in the log as well, and some machines give back few files.
    results.with_suffix(".md").unlink(missing_ok=True)
    took = time.monotonic() - started
    status = f"stopped after {took:.0f} s" if code is None else f"exit status {code}"
    # 5: of the tests none was left to run.
    complete = code in ((0, 1, 5) if part.runs == "pytest" else (0, 1))
    found = read(results) if results.exists() else []
    complete &= not any(map(summary.is_late, summary.of(part.name, found)))
    _tell(part, out, about, f"{part.name}: {status}, {took:.0f} s of {seconds:.0f}")
    if code not in (0, 1, 5):
        _say(summary.tail(out / LOG, begun))
    if looks:
        _say(f"  GPU meanwhile ({', '.join(_CLOCKS)}): {looks[len(looks) // 2]}")
    return {
        "kind": "part",
        "part": part.name,
        "exit_status": code,
        "seconds": round(took, 1),
        "passed": code in (0, 5),
        "complete": complete,
        "gpu": looks,
    }


def _tests() -> list[str]:
    """Options, and the files with GPU tests: others need packages that a GPU machine may lack."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [path for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]
    # Compiling takes most of the time. Each process takes little of the GPU.
    many = ["-n", "4", "--dist", "worksteal"] if find_spec("xdist") is not None else []
    return [*many, *(str(path.relative_to(ROOT)) for path in marked)]


def _tell(part: Part, out: Path, about: Record, head: str) -> None:
    _say(head)
    name = "round" if part.runs == "pytest" else part.runs
    path = file_of(out, name, about["device"])
    if path.exists():
        kind = part.name if part.name in summary.MOST else part.runs
        for line in summary.lines(kind, read(path)):
            _say(f"  {line}")


def _say(line: str) -> None:
    # At once: what is in a buffer is lost when the run is cut off.
    print(line, flush=True)


def _end_with_parent() -> None:
    """Have Linux kill this process when the round is killed: two must not write into one file."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)


def _run_apart(
    command: list[str], log: Any, seconds: float, surroundings: dict[str, str], looks: list[str]
) -> int | None:
    """The exit status; None if after `seconds` the command and what it started was killed."""
    end = time.monotonic() + seconds
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, **surroundings}, preexec_fn=_end_with_parent,
    )  # fmt: skip
    try:
        while (left := end - time.monotonic()) > 0:
            try:
                return process.wait(min(LOOK, left))
            except subprocess.TimeoutExpired:
                look = output(
                    "nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader"
                )
                looks += [look] if look else []
        return None
    finally:
        if process.poll() is None:
            # The group is ours alone: tests and compilers start processes of their own.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

"""One whole round on a GPU: test, time ops, time decoding. All is on disk once it is known."""

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from std_decode.output import replace_file

ROOT = Path(__file__).parents[1]
TEST_SECONDS, TIME_SECONDS, PREFILL_SECONDS, DECODE_SECONDS = 210, 105, 35, 135
GRACE = 15  # seconds that prefill and decoding may take to end by itself
_HELP = """\
Runs the GPU test suite, then times each op at a few real sizes beside torch's own, then prefill
and decoding at a 7B model's shape beside transformers' (see python -m bench prefill --help and
python -m bench decode --help). Takes less than 9 minutes: each part has a time box, and what did
not fit is listed as skipped. What computes something wrong is reported and not timed. Writes into
DIR as it goes:

  environment.json   GPU, driver, versions, commit, date
  tests.log, tests.xml   what pytest said
  ops.jsonl          one line per timing: median, 20th and 80th percentile in milliseconds, GB/s
  ops.md             the same as a table
  prefill.jsonl, prefill.md, prefill.log   time to the first token, patched beside unpatched
  decode.jsonl, decode.md, decode.log   decoding with random weights and forced acceptance

"cold" clears the L2 cache before each run and includes the launch; "graph" replays a CUDA graph
of the same call over and over, so small inputs come from the cache. GB/s counts every input and
output once, over the cold median; the share is of a large copy's GB/s on the same GPU.

The exit status is 0 if everything passed, 1 if something failed or is wrong, and 2 without a GPU.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "gpu",
        help="test and time ops and decoding on the GPU of this machine, in under 9 minutes",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument("--skip-tests", action="store_true", help="go straight to the timing")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        print("bench gpu: torch finds no GPU on this machine; nothing was run", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    about = json.dumps(environment(), indent=2) + "\n"
    replace_file(options.out / "environment.json", about.encode())
    passed = options.skip_tests or run_tests(options.out, TEST_SECONDS)
    try:
        right = time_ops(options.out, torch.device("cuda"), time.monotonic() + TIME_SECONDS)
    except Exception as error:  # decoding can be timed all the same
        print(f"bench gpu: ops: {error!r}"[:300], file=sys.stderr)
        right = False
    torch.cuda.empty_cache()
    read = time_part("prefill", options.out, PREFILL_SECONDS, PREFILL)
    decoded = time_part("decode", options.out, DECODE_SECONDS, DECODING)
    return 0 if passed and right and read and decoded else 1


def environment() -> dict[str, Any]:
    import torch
    import triton

    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu": gpu.name,
        "memory_gb": round(gpu.total_memory / 1e9, 1),
        "multiprocessors": gpu.multi_processor_count,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda or torch.version.hip,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": output("git", "rev-parse", "HEAD"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def run_tests(out: Path, seconds: float) -> bool:
    """Runs `pytest -m gpu` in its own process group; False if it failed or ran out of time."""
    xml = (out / "tests.xml").resolve()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-rfEs", "--durations=10",
               f"--junitxml={xml}", "tests"]  # fmt: skip
    return _run_apart("tests", command, out / "tests.log", seconds)


PREFILL = ["--shape", "qwen2-vl-7b", "--tokens", "4096", "25000", "--pairs", "7"]
DECODING = ["--shape", "qwen2-vl-7b", "--batch", "1", "8", "--context", "25000",
            "--draft-weights", "own", "int4"]  # fmt: skip


def time_part(
    name: str, out: Path, seconds: float, options: list[str], grace: float = GRACE
) -> bool:
    """`bench NAME` in a process group of its own; False if anything was wrong or hung."""
    command = [sys.executable, "-m", "bench", name, *options,
               "--seconds", str(seconds), "--out", str(out.resolve())]  # fmt: skip
    log = out / f"{name}.log"
    passed = _run_apart(name, command, log, seconds + grace)
    print(log.read_text(errors="replace"))
    return passed


def _run_apart(name: str, command: list[str], log: Path, seconds: float) -> bool:
    """Whether the command exits with 0 within `seconds`; then it and what it started is killed."""
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
    return code == 0


def time_ops(out: Path, device: Any, deadline: float, small: bool = False) -> bool:
    """Times what fits before `deadline` (of time.monotonic); False if anything was wrong."""
    from rich.console import Console

    from bench import ops

    records: list[dict[str, Any]] = []

    def keep(record: dict[str, Any]) -> None:
        records.append(record)
        with open(out / "ops.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        replace_file(out / "ops.md", markdown(records).encode())

    (out / "ops.jsonl").unlink(missing_ok=True)
    copy = ops.copy_case(device, 1 << (16 if small else 29))
    measured = measure(copy.run, device)
    ceiling = copy.bytes / measured["cold"][0] / 1e6
    keep(_record(copy, "copy", measured, ceiling))
    for make in ops.cases(device, small):
        if time.monotonic() > deadline:
            keep({"op": "the rest", "size": "", "what": "ours", "status": _SKIPPED})
            break
        for record in _time_case(make, device, ceiling):
            keep(record)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table(records))
    bad = [r for r in records if r["what"] == "ours" and r["status"] not in ("ok", _SKIPPED)]
    return not bad


_SKIPPED = "skipped: out of time"


def _time_case(make: Callable[[], Any], device: Any, ceiling: float) -> list[dict[str, Any]]:
    try:
        case = make()
        excess = case.check()
    except Exception as error:  # whatever one case runs into must not cost the others
        return [{"op": "?", "size": "?", "what": "ours", "status": f"failed: {error!r}"[:500]}]
    if not excess <= 1:
        status = f"wrong: error {excess:.3g} times what is allowed"
        return [{"op": case.op, "size": case.size, "what": "ours", "status": status}]
    records = []
    for what, call in {"ours": case.run, **case.rivals}.items():
        try:
            records.append(_record(case, what, measure(call, device), ceiling))
        except Exception as error:
            status = f"failed: {str(error).strip().splitlines()[0] if str(error) else error!r}"
            records.append({"op": case.op, "size": case.size, "what": what, "status": status})
    return records


def measure(call: Callable[[], Any], device: Any) -> dict[str, list[float]]:
    """Median, 20th and 80th percentile in ms, cold and (where it can be captured) as a graph."""
    if device.type == "cpu":
        started = time.perf_counter()
        call()
        return {"cold": [1e3 * (time.perf_counter() - started)] * 3}
    from triton.testing import do_bench, do_bench_cudagraph

    quantiles = [0.5, 0.2, 0.8]
    measured = {"cold": list(do_bench(call, warmup=25, rep=150, quantiles=quantiles))}
    try:
        measured["graph"] = list(do_bench_cudagraph(call, rep=50, quantiles=quantiles))
    except Exception as error:
        print(f"bench gpu: no graph: {error!r}"[:200], file=sys.stderr)
    return measured


def _record(
    case: Any, what: str, measured: dict[str, list[float]], ceiling: float
) -> dict[str, Any]:
    bandwidth = case.bytes / measured["cold"][0] / 1e6
    record = {"op": case.op, "size": case.size, "what": what, "status": "ok", "bytes": case.bytes}
    for kind, (median, low, high) in measured.items():
        record |= {f"{kind}_ms": median, f"{kind}_p20_ms": low, f"{kind}_p80_ms": high}
    return {**record, "gb_per_s": bandwidth, "of_copy": bandwidth / ceiling, "note": case.note}


_HEADER = ("op", "size", "what", "cold us", "p20", "p80", "graph us", "GB/s", "of copy", "note")


def _cells(record: dict[str, Any]) -> list[str]:
    head = [record["op"], record["size"], record["what"]]
    if record["status"] != "ok":
        return [*head, *["-"] * 6, record["status"][:60]]
    micro = [record.get(name, math.nan) * 1e3 for name in ("cold_ms", "cold_p20_ms",
                                                           "cold_p80_ms", "graph_ms")]  # fmt: skip
    numbers = ["-" if math.isnan(us) else f"{us:.1f}" for us in micro]
    share = f"{record['of_copy']:.0%}"
    return [*head, *numbers, f"{record['gb_per_s']:.0f}", share, record["note"]]


def table(records: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    shown = Table(*_HEADER)
    for record in records:
        shown.add_row(*_cells(record), style="bold" if record["what"] == "ours" else None)
    return shown


def markdown(records: list[dict[str, Any]]) -> str:
    rows = ["| " + " | ".join(_cells(record)) + " |" for record in records]
    head = ["| " + " | ".join(_HEADER) + " |", "|" + "---|" * len(_HEADER)]
    return "\n".join(["# The ops on this GPU", "", *head, *rows]) + "\n"

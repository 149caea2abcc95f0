"""One whole round on a GPU: test, time ops, time decoding. All is on disk once it is known."""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.timing import measure  # noqa: F401

ROOT = Path(__file__).parents[1]
TEST_SECONDS, TIME_SECONDS, PREFILL_SECONDS, DECODE_SECONDS = 210, 105, 35, 135
GRACE = 15  # seconds that prefill and decoding may take to end by itself
_HELP = """\
Runs the GPU test suite, then times each op at a few real sizes beside torch's own, then prefill
and decoding at a 7B model's shape beside transformers' (see --help of python -m bench kernels,
prefill and decode). Takes less than 9 minutes: each part has a time box, and what did not fit is
listed as skipped. What computes something wrong is reported and not timed. Writes into DIR as it
goes:

  environment.json   GPU, driver, versions, commit, date
  tests.log, tests.xml   what pytest said
  kernels.jsonl, kernels.md, kernels.log   each op beside its rivals
  prefill.jsonl, prefill.md, prefill.log   time to the first token, patched beside unpatched
  decode.jsonl, decode.md, decode.log   decoding with random weights and forced acceptance

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
    (options.out / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    passed = options.skip_tests or run_tests(options.out, TEST_SECONDS)
    right = time_part("kernels", options.out, TIME_SECONDS, KERNELS)
    read = time_part("prefill", options.out, PREFILL_SECONDS, PREFILL)
    decoded = time_part("decode", options.out, DECODE_SECONDS, DECODING)
    return 0 if passed and right and read and decoded else 1


def environment(device: Any = None) -> dict[str, Any]:
    """What figures depend on; of the GPU unless `device` is a CPU."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    try:
        triton = version("triton")
    except PackageNotFoundError:  # macOS, Windows
        triton = None
    return {
        **(_the_cpu() if device is not None and device.type == "cpu" else _the_gpu()),
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "commit": output("git", "rev-parse", "HEAD"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _the_gpu() -> dict[str, Any]:
    import torch

    found = torch.cuda.get_device_properties(0)
    return {
        "gpu": found.name,
        "memory_gb": round(found.total_memory / 1e9, 1),
        "multiprocessors": found.multi_processor_count,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda or torch.version.hip,
    }


def _the_cpu() -> dict[str, Any]:
    import torch

    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            named = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        named = []
    return {
        "cpu": named[0] if named else name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
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


KERNELS = ["--preset", "round"]
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

"""What figures depend on: the device, versions, sources, date; the first record of a file."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def environment(device: Any, **more: Any) -> dict[str, Any]:
    """The first record of a file: the device, versions, commit, date, and whatever is given.

    Args:
        device: a torch.device.
        more: that results depend on; a run that was cut off goes on only with the same.
    """
    from importlib.metadata import PackageNotFoundError, version

    import torch
    import transformers

    found = _the_cpu() if device.type == "cpu" else _the_gpu(device)
    try:
        triton = version("triton")
    except PackageNotFoundError:  # macOS, Windows
        triton = None
    return {
        "kind": "environment",
        "device": found.get("gpu") or found["cpu"],
        **found,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "commit": output("git", "rev-parse", "HEAD"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **more,
        "transformers": transformers.__version__,
        "sources": sources(),
    }


def _the_gpu(device: Any) -> dict[str, Any]:
    import torch

    found = torch.cuda.get_device_properties(device)
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


def sources() -> str:
    """A hash of the packages: changes that are not committed count, and git need not be there."""
    digest = hashlib.sha256()
    for package in ("bench", "std_decode", "std_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def checkpoint() -> str:
    """A hash of the demo model's weights."""
    from std_decode.demo.model import FOLDER

    return hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()[:12]


def in_words(about: dict[str, Any]) -> str:
    """What a file's results were made on."""
    threads = about.get("threads")
    return ", ".join(filter(None, (
        about.get("device") or about.get("gpu") or about.get("cpu"),
        f"{threads} thread{'s' if threads > 1 else ''}" if threads else None,
        f"driver {about['driver']}" if about.get("driver") else None,
        f"torch {about['torch']}",
        f"transformers {about['transformers']}" if about.get("transformers") else None,
        f"commit {about['commit'][:9]}" if about.get("commit") else None,
        about["date"][:10],
        about.get("note"),
    )))  # fmt: skip

"""How long calls take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

QUANTILES = [0.5, 0.2, 0.8]
Call = Callable[[], Any]
# Written before each call on the CPU, so that it finds nothing of its inputs in a cache.
CPU_CACHE_BYTES = 64 << 20
CPU_SECONDS, CPU_ROUNDS = 2.0, (3, 15)  # for the calls that are timed together


def measure(call: Call, device: Any) -> dict[str, list[float]]:
    """Median, 20th and 80th percentile in ms, cold and (where it can be captured) as a graph."""
    if device.type == "cpu":
        found = _measure_on_cpu({"": call})[""]
        if isinstance(found, Exception):
            raise found
        return found
    from triton.testing import do_bench, do_bench_cudagraph

    measured = {"cold": list(do_bench(call, warmup=25, rep=150, quantiles=QUANTILES))}
    try:
        measured["graph"] = list(do_bench_cudagraph(call, rep=50, quantiles=QUANTILES))
    except Exception as error:
        print(f"bench: no graph: {error!r}"[:200], file=sys.stderr)
    return measured


def measure_all(calls: dict[str, Call], device: Any) -> dict[str, Any]:
    """`measure` of each, or the exception it raised. On the CPU they take turns."""
    measured: dict[str, Any] = {}
    if device.type == "cpu":
        return _measure_on_cpu(calls)
    for name, call in calls.items():
        try:
            measured[name] = measure(call, device)
        except Exception as error:
            measured[name] = error
    return measured


def _measure_on_cpu(calls: dict[str, Call]) -> dict[str, Any]:
    """In turns: whatever else the machine does falls on all of them."""
    import torch

    other = torch.empty(CPU_CACHE_BYTES // 4)

    def timed(call: Call) -> float:
        other.fill_(0)
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)

    failed: dict[str, Any] = {}
    first = {}
    for name, call in calls.items():
        try:
            first[name] = timed(call)
        except Exception as error:
            failed[name] = error
    least, most = CPU_ROUNDS
    rounds = int(1e3 * CPU_SECONDS / max(sum(first.values()), 1e-3))
    times: dict[str, list[float]] = {name: [] for name in first}
    for _ in range(max(least, min(most, rounds))):
        for name in first:
            times[name].append(timed(calls[name]))
    quantiles = torch.tensor(QUANTILES, dtype=torch.float64)
    return failed | {
        name: {"cold": torch.tensor(found, dtype=torch.float64).quantile(quantiles).tolist()}
        for name, found in times.items()
    }

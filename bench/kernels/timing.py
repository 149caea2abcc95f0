"""How long calls take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

QUANTILES = [0.5, 0.2, 0.8]
Call = Callable[[], Any]
# Written before each call on the CPU, so that it finds nothing of its inputs in a cache.
CPU_CACHE_BYTES = 64 << 20
# The same on a GPU: several times the L2 cache of any.
L2_BYTES = 256 << 20
FIRST, LEAST, MOST = 5, 5, 2000  # runs on a GPU: to see how many, at least and at most
AT_ONCE = 10  # calls in the graph of those that follow each other
POISON = -7
CPU_SECONDS, CPU_ROUNDS = 2.0, (3, 15)  # for the calls that are timed together


def measure(call: Call, device: Any) -> dict[str, Any]:
    """Median, 20th and 80th percentile in ms, cold and, on a GPU, over and over as "graph".

    Returns:
        Besides, as "relaunched", why the call was launched from Python each time, if it was.
    """
    if device.type == "cpu":
        found = _measure_on_cpu({"": call})[""]
        if isinstance(found, Exception):
            raise found
        return found
    launch, why = as_graph(call, device)
    measured: dict[str, Any] = {"cold": quantiles(cold(launch, device))}
    if why is not None:
        return measured | {"relaunched": why}

    def repeated() -> Any:
        for _ in range(AT_ONCE):
            result = call()
        return result

    launch, why = as_graph(repeated, device)
    if why is None:
        times = quantiles(cold(launch, device, clear=False))
        measured["graph"] = [ms / AT_ONCE for ms in times]
    return measured


def as_graph(call: Call, device: Any) -> tuple[Call, str | None]:
    """What launches all that `call` does as one CUDA graph; else `call` itself, and why.

    From Python a small op takes the host longer than the GPU: 60 to 98 us a call, of which
    clearing the cache hides 60 to 90.
    """
    from std_decode.passes import graphs

    if graphs.spoiled is not None:
        return call, graphs.spoiled
    call()  # compiles, plans and takes workspaces, which a capture cannot
    try:
        replay = graphs.capture(call, graphs.Pool(device))
    except Exception as error:  # of a library, whatever stands in its way
        print(f"bench: no graph: {error!r}"[:200], file=sys.stderr)
        return call, str(error).strip().partition("\n")[0] or type(error).__name__
    if not _writes(replay):  # a library with a stream of its own
        return call, "a capture does not see what it launches"
    return replay, None


def _writes(replay: Call) -> bool:
    """Whether a replay gives every tensor that it returns new contents."""
    from torch.utils._pytree import tree_leaves

    results = tree_leaves(replay())
    for result in results:
        result.fill_(POISON)
    replay()
    return not any(bool((result == POISON).all()) for result in results)


def cold(call: Call, device: Any, seconds: float = 0.15, clear: bool = True) -> list[float]:
    """Milliseconds of each run, by CUDA events on either side of `call`.

    In the timed region: what `call` launches, the start of its graph where it is one (a few us),
    and, where the host is slower than the GPU, its launches. Not in it: clearing the L2 cache, by
    writing 256 MB of other memory right before; what of that is not yet in memory is written back
    meanwhile. While the GPU clears, the host gets ahead.
    """
    import torch

    with torch.cuda.device(device):
        other = torch.empty(L2_BYTES // 4, dtype=torch.int32, device=device)

        def timed() -> tuple[Any, Any]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if clear:
                other.zero_()
            start.record()
            call()
            end.record()
            return start, end

        first = [timed() for _ in range(FIRST)]
        torch.cuda.synchronize(device)
        each = min(start.elapsed_time(end) for start, end in first)
        runs = max(LEAST, min(MOST, int(1e3 * seconds / max(each, 1e-3))))
        spans = [timed() for _ in range(runs + runs // 5)][runs // 5 :]  # warm by then
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) for start, end in spans]


def quantiles(times: Sequence[float]) -> list[float]:
    import torch

    wanted = torch.tensor(QUANTILES, dtype=torch.float64)
    return torch.tensor(times, dtype=torch.float64).quantile(wanted).tolist()


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
    return failed | {name: {"cold": quantiles(found)} for name, found in times.items()}

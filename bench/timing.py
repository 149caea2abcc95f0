"""How long a call takes."""

import sys
import time
from collections.abc import Callable
from typing import Any


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
        print(f"bench: no graph: {error!r}"[:200], file=sys.stderr)
    return measured

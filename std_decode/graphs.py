"""Capturing a forward pass once and replaying it, so that its launches cost next to nothing.

On a GPU a decoding step of a 7B model in plain PyTorch waits for the host: some thousand kernels
of a few microseconds each, launched one by one. A captured step is one launch. What is captured
has to run without the host (no reads, no shapes that change) over tensors that stay where they
are; engine.py and cache.py see to that.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Live at a time, of one engine: draft, dense step, and a verification for each of policy.LENGTHS,
# with some room for variants. A graph that is dropped too early is captured again and again.
MOST_GRAPHS = 16


def unavailable(devices: set[torch.device]) -> str | None:
    """Why the passes of a model on these devices cannot be captured, or None."""
    if any(device.type == "meta" for device in devices):
        return "weights are offloaded"
    if len(devices) > 1:
        return "the layers are on several devices"
    kind = next(iter(devices)).type
    return None if kind == "cuda" else f"the model is on the {kind.upper()}, not on a CUDA device"


def capture(step: Callable[[], Tensor], pool: Any) -> Callable[[], Tensor]:
    """Record what `step` launches, without running it.

    Returns:
        A function that launches all of it again, and returns the tensor that `step` returned,
        whose contents are new each time.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class Graphs:
    """The captured passes of one engine.

    The first time a pass runs as it is, which also compiles and tunes its kernels; the second
    time it is captured; from then on it is replayed. What cannot be captured goes on as it is.

    Attributes:
        captures, replays: how often each has happened.
        seconds: that first uses and captures have taken, on the host.
        failure: what stood in the way of a capture, or None.
    """

    def __init__(self) -> None:
        self.captured: dict[Hashable, Callable[[], Tensor] | None] = {}
        self.pool: Any = None
        self.captures = self.replays = 0
        self.seconds = 0.0
        self.failure: str | None = None

    def run(self, key: Hashable, step: Callable[[], Tensor]) -> Tensor:
        """The result of `step`, which is the same code over the same tensors for the same key."""
        new = key not in self.captured
        replay = None if new else self.captured.pop(key) or self._capture(step)
        self.captured[key] = replay  # last, as the most recently used
        for oldest in list(self.captured)[:-MOST_GRAPHS]:
            del self.captured[oldest]
        if new:
            with self._timed():
                return step()
        if replay is None:
            return step()
        self.replays += 1
        return replay()

    def _capture(self, step: Callable[[], Tensor]) -> Callable[[], Tensor] | None:
        if self.failure is not None:
            return None
        try:
            with self._timed():
                replay = capture(step, self._pool())
        except RuntimeError as error:
            self.failure = f"a pass could not be captured ({_first_line(error)})"
            warnings.warn(f"std_decode: {self.failure}; it runs uncaptured", stacklevel=2)
            return None
        self.captures += 1
        return replay

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def account(self) -> dict[str, Any]:
        """Captures, replays and seconds since the last time, as fields of the stats."""
        counts = dict(
            graph_captures=self.captures,
            graph_replays=self.replays,
            first_use_seconds=self.seconds,
        )
        self.captures, self.replays, self.seconds = 0, 0, 0.0
        return counts

    def clear(self) -> None:
        """Forget all graphs: the tensors they refer to are gone."""
        self.captured.clear()
        self.pool = None

    def _pool(self) -> Any:
        if self.pool is None and torch.cuda.is_available():
            self.pool = torch.cuda.graph_pool_handle()
        return self.pool


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]

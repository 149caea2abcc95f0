"""Capturing a forward pass once and replaying it, so that its launches cost next to nothing.

On a GPU a decoding step of a 7B model in plain PyTorch waits for the host: some thousand kernels
of a few microseconds each, launched one by one. A captured step is one launch. What is captured
has to run without the host (no reads, no shapes that change) over tensors that stay where they
are; engine.py and model/cache.py see to that.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Live at a time, of one engine: draft, dense step, and a verification for each of policy.LENGTHS
# and of LOOKUP_LENGTHS, with some room for variants. A graph that is dropped too early is captured
# again and again.
MOST_GRAPHS = 21


# Why captures are over for this process: one failed and could not be undone. None where none did.
spoiled: str | None = None

# PyTorch allows one capture at a time in a process.
_one_at_a_time = threading.Lock()
# One per device: graphs that share memory must have been captured on the same stream.
_streams: dict[torch.device, Any] = {}
# Kept, since PyTorch's allocators may go on asking them what they capture.
_failed: list[Any] = []


def unavailable(devices: set[torch.device]) -> str | None:
    """Why the passes of a model on these devices cannot be captured, or None."""
    if any(device.type == "meta" for device in devices):
        return "weights are offloaded"
    if len(devices) > 1:
        return "the layers are on several devices"
    kind = next(iter(devices)).type
    if kind != "cuda":
        return f"the model is on the {kind.upper()}, not on a CUDA device"
    return spoiled


class Pool:
    """Memory of a CUDA device that captured passes share, and the stream they are captured on."""

    def __init__(self, device: torch.device):
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.handle = torch.cuda.graph_pool_handle()

    @property
    def stream(self) -> Any:
        if self.device not in _streams:
            _streams[self.device] = torch.cuda.Stream(self.device)
        return _streams[self.device]


def capture(step: Callable[[], T], pool: Pool) -> Callable[[], T]:
    """Record what `step` launches on the pool's device, without running it.

    What goes wrong in `step` is raised as it is, and leaves the thread and the device as they
    were; where that cannot be, `spoiled` says so.

    Returns:
        A function that launches all of it again, and returns what `step` returned, with contents
        that are new each time.
    """
    own: list[BaseException] = []
    with _one_at_a_time:
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        options = {"stream": pool.stream, "capture_error_mode": "thread_local"}
        try:
            # By itself torch.cuda.graph captures on a stream of the device that was current at the
            # process's first capture, where a model on another launches nothing; and leaves that
            # stream current where a capture cannot be begun or ended. A stream enters its device.
            with torch.cuda.stream(pool.stream):
                with torch.cuda.graph(graph, pool=pool.handle, **options):
                    result = _noting(step, own)
        except BaseException as error:
            _undo(graph, pool)
            raise own.pop() if own else error from None

    def replay() -> T:
        graph.replay()
        return result

    return replay


def _noting(step: Callable[[], T], raised: list[BaseException]) -> T:
    """What a capture's end says of an error is only that there was one; a time box's is lost."""
    try:
        return step()
    except BaseException as error:
        raised.append(error)
        raise


def _undo(graph: Any, pool: Pool) -> None:
    """Take back what a failed capture leaves behind.

    PyTorch ends its allocator's and its generator's part in a capture after CUDA has ended its
    own, or not at all: the allocator would keep all that is freed, and drawing a random number
    would be an error.
    """
    global spoiled
    _failed.append(graph)
    try:
        torch._C._cuda_endAllocateToPool(pool.device.index, pool.handle)
        torch._C._cuda_releasePool(pool.device.index, pool.handle)
    except RuntimeError:
        pass  # the capture was ended as it should be: by an error of Python's
    try:
        # A capture that goes well also ends what the generator has begun.
        number, well = torch.zeros((), device=pool.device), torch.cuda.CUDAGraph()
        with torch.cuda.stream(pool.stream):
            with torch.cuda.graph(well, stream=pool.stream, capture_error_mode="thread_local"):
                number.zero_()
        torch.cuda.synchronize(pool.device)
    except RuntimeError as error:
        spoiled = f"an earlier capture failed and could not be undone ({_first_line(error)})"


class Graphs:
    """The captured passes of one engine, on one device.

    The first time a pass runs as it is, which also compiles and tunes its kernels; the second
    time it is captured; from then on it is replayed. What cannot be captured goes on as it is.

    Attributes:
        captures, replays: how often each has happened.
        seconds: that first uses and captures have taken, on the host.
        failure: what stood in the way of a capture, or None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
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
            self.failure += f"; {spoiled}" if spoiled else ""
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
        if self.pool is None and self.device.type == "cuda":
            self.pool = Pool(self.device)
        return self.pool


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]

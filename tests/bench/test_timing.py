"""Timing on a pretend GPU whose clock is made up: what is in a figure and what is not."""

from statistics import median
from types import SimpleNamespace

import pytest
import torch

from bench.kernels import ops, timing
from bench.kernels.runner import Runner
from bench.tune.command import Lab
from std_decode.passes import graphs

DEVICE = torch.device("cuda", 1)
# Microseconds, of the host and of the GPU.
PYTHON, START, ENQUEUE = 90, 8, 5
OP, GRAPH, CLEAR = 10, 2, 70


class Gpu:
    """A host that launches, and a GPU that runs what it was given, one after the other."""

    def __init__(self):
        self.host = self.busy = 0.0
        self.launched = self.cleared = 0
        self.capturing = None
        self.device = torch.device("cuda", 0)
        self.out = torch.zeros(4)

    def enqueue(self, on_host, on_gpu):
        self.host += on_host
        self.busy = max(self.busy, self.host) + on_gpu

    def op(self):
        """An op of small inputs, whose launch from Python takes longer than it runs."""
        if self.capturing is not None:
            self.capturing.append(OP)
            return self.out
        self.launched += 1
        self.enqueue(PYTHON, OP)
        return self.out.fill_(1)

    def capture(self, step, pool):
        assert pool.device == DEVICE
        self.capturing = kept = []
        try:
            result = step()
        finally:
            self.capturing = None

        def replay():
            self.enqueue(START, GRAPH + sum(kept))
            return result.fill_(1) if kept else result

        return replay


@pytest.fixture
def gpu(monkeypatch):
    here, empty = Gpu(), torch.empty

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            assert here.device == DEVICE, "of another device's stream"
            here.enqueue(ENQUEUE, 0)
            self.at = here.busy

        def elapsed_time(self, end):
            return (end.at - self.at) / 1e3

    class Buffer:
        def zero_(self):
            here.cleared += 1
            here.enqueue(ENQUEUE, CLEAR)

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            self.before, here.device = here.device, self.device

        def __exit__(self, *_):
            here.device = self.before

    def made(*size, device=None, **options):
        return empty(*size, **options) if device is None else Buffer()

    def synchronize(device):
        assert device == DEVICE
        here.host = here.busy = max(here.host, here.busy)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch, "empty", made)
    monkeypatch.setattr(graphs, "Pool", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(graphs, "capture", here.capture)
    return here


def test_a_small_op_takes_what_the_gpu_takes(gpu):
    measured = timing.measure(gpu.op, DEVICE)
    # The second event waits for nothing: the host has got ahead while the cache was cleared.
    assert measured["cold"][0] == pytest.approx((OP + GRAPH) / 1e3)
    assert measured["graph"][0] == pytest.approx((OP + GRAPH / timing.AT_ONCE) / 1e3)
    assert "relaunched" not in measured
    assert gpu.launched == 1 + timing.AT_ONCE  # before the captures
    assert gpu.cleared >= timing.FIRST + timing.LEAST
    assert gpu.device != DEVICE  # as it was


@pytest.mark.parametrize("what", ["refused", "unseen", "spoiled"])
def test_what_cannot_be_captured_is_launched_and_says_so(gpu, monkeypatch, what, capsys):
    def refuse(step, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    words = {
        "refused": "operation not permitted when stream is capturing",
        "unseen": "a capture does not see what it launches",
        "spoiled": "could not be undone",
    }[what]
    if what == "refused":
        monkeypatch.setattr(graphs, "capture", refuse)
    elif what == "unseen":
        monkeypatch.setattr(gpu, "capture", lambda step, pool: lambda: gpu.out)
        monkeypatch.setattr(graphs, "capture", gpu.capture)
    else:
        monkeypatch.setattr(graphs, "spoiled", words)
    measured = timing.measure(gpu.op, DEVICE)
    assert measured["relaunched"] == words and "graph" not in measured
    assert measured["cold"][0] > OP / 1e3 and gpu.launched > timing.LEAST
    runner = Runner(ops.Inputs(torch.device("cpu"), torch.float32), None, 1e9, None, None)
    runner.copy = 1.0
    record = runner._figures(ops.Case(8, gpu.op, None, note="a note"), "ours", measured)
    assert record["note"] == f"a note; no graph, launched from Python: {words}"


def test_rows_of_the_launch_table_are_timed_the_same_way(gpu, monkeypatch):
    lab = Lab(SimpleNamespace(device=DEVICE), SimpleNamespace(rows=[]), None)
    lab.case = SimpleNamespace(run=gpu.op)
    assert lab.timer(None, None) == pytest.approx((OP + GRAPH) / 1e3) and not lab.notes
    monkeypatch.setattr(graphs, "spoiled", "some reason")
    assert lab.timer(None, None) > OP / 1e3 and lab.notes == {"relaunched": "some reason"}


def test_a_large_op_is_timed_a_few_times(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "op", lambda: gpu.enqueue(PYTHON, 200_000))
    times = timing.cold(gpu.op, DEVICE)
    assert len(times) == timing.LEAST and median(times) == pytest.approx(200)

"""What a capture does to the devices, streams and allocators around it, on a pretend CUDA.

`torch.cuda.graph` is PyTorch's own; what it calls is strict about devices and streams, as CUDA is.
"""

import pytest
import torch

from std_decode.passes import graphs

FIRST, SECOND = (torch.device("cuda", index) for index in (0, 1))
BROKEN = "operation failed due to a previous error during capture"


class Stream:
    def __init__(self, device):
        self.device, self.capturing = torch.device(device), None


class OnStream:
    """As torch.cuda.stream; no generator, which would be left when it is freed."""

    def __init__(self, cuda, stream):
        self.cuda, self.stream = cuda, stream

    def __enter__(self):
        self.before = self.cuda.device, self.cuda.streams[self.stream.device]
        self.cuda.device, self.cuda.streams[self.stream.device] = self.stream.device, self.stream

    def __exit__(self, *_):
        self.cuda.device, self.cuda.streams[self.stream.device] = self.before


class Cuda:
    """Two devices. What is launched goes to the current stream of a device."""

    def __init__(self):
        self.device = FIRST
        self.streams = {device: Stream(device) for device in (FIRST, SECOND)}
        self.pools = 0
        self.recording, self.uses = set(), {}  # of (device index, pool handle)
        self.ran, self.synchronised = [], []
        self.drawing = False  # whether the generator believes that it is captured
        self.refuses_begin = self.unending = False

    def launch(self, what, device):
        graph = self.streams[device].capturing
        (self.ran if graph is None else graph.launches).append((what, device.index))

    def draw(self):
        if self.drawing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def on_stream(self, stream):
        return OnStream(self, stream)

    def handle(self):
        self.pools += 1
        return (0, self.pools)

    def synchronize(self, device=None):
        device = self.device if device is None else device
        if self.streams[device].capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.synchronised.append(device)

    def end_allocate(self, index, handle):
        if (index, handle) not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove((index, handle))

    def release(self, index, handle):
        self.uses[index, handle] -= 1
        assert self.uses[index, handle] >= 0


@pytest.fixture
def cuda(monkeypatch):
    here = Cuda()

    class Graph:
        broken = False

        def capture_begin(self, pool=(0, 0), **options):
            assert options["capture_error_mode"] == "thread_local"
            self.pool = here.handle() if pool == (0, 0) else pool
            self.device, self.launches = here.device, []
            self.stream = here.streams[here.device]
            here.drawing = True
            here.uses[self.place] = here.uses.get(self.place, 0) + 1
            assert self.place not in here.recording
            here.recording.add(self.place)
            if here.refuses_begin:
                here.refuses_begin = False
                raise RuntimeError("operation not permitted")
            assert self.stream.capturing is None
            self.stream.capturing = self

        @property
        def place(self):
            return self.device.index, self.pool

        def capture_end(self):
            if here.unending or here.streams[here.device] is not self.stream:
                raise RuntimeError("Capture must end on the same stream it began on.")
            self.stream.capturing = None
            if self.broken:
                raise RuntimeError(BROKEN)
            here.end_allocate(*self.place)
            here.drawing = False

        def replay(self):
            here.ran.extend(self.launches)

    zeros = torch.zeros
    fakes = dict(
        CUDAGraph=Graph, Stream=Stream, stream=here.on_stream, synchronize=here.synchronize,
        graph_pool_handle=here.handle, current_device=lambda: here.device.index,
        empty_cache=lambda: None,
    )  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    private = dict(
        _host_emptyCache=lambda: None, _cuda_endAllocateToPool=here.end_allocate,
        _cuda_releasePool=here.release,
    )  # fmt: skip
    for name, fake in private.items():
        monkeypatch.setattr(torch._C, name, fake, raising=False)
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None: zeros(*size))
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
    monkeypatch.setattr(graphs, "_streams", {})
    monkeypatch.setattr(graphs, "_failed", [])
    monkeypatch.setattr(graphs, "spoiled", None)
    return here


def passing(cuda, device, what="a pass"):
    def step():
        cuda.launch(what, device)
        return what

    return step


def test_a_model_on_a_device_that_is_not_current(cuda):
    """After one on the device that is, which PyTorch's own capture stream would belong to."""
    for device in (FIRST, SECOND, FIRST, SECOND):
        pool = graphs.Pool(device)
        replay = graphs.capture(passing(cuda, device), pool)
        assert cuda.ran == [] and cuda.device == FIRST
        assert cuda.synchronised.pop() == device
        assert replay() == "a pass" and cuda.ran.pop() == ("a pass", device.index)
        assert pool.stream is graphs.Pool(device).stream and pool.stream.device == device
    assert len(graphs._streams) == 2 and graphs.spoiled is None


def test_a_pool_without_an_index_is_of_the_current_device(cuda):
    with cuda.on_stream(Stream(SECOND)):
        pool = graphs.Pool(torch.device("cuda"))
    assert pool.device == SECOND and pool.stream.device == SECOND


def test_the_graphs_of_an_engine_are_of_its_device(cuda):
    kept = graphs.Graphs(SECOND)
    for _ in range(3):  # as it is, captured, replayed
        assert kept.run("key", passing(cuda, SECOND)) == "a pass"
    assert cuda.ran == [("a pass", 1)] * 3 and kept.captures == 1 and kept.replays == 2


def unchanged(cuda, streams):
    assert cuda.device == FIRST and cuda.streams == streams
    assert not cuda.recording and not cuda.drawing
    # The graphs that failed must not hold their pools for ever.
    assert sum(cuda.uses[graph.place] for graph in graphs._failed) == 0
    cuda.draw()


@pytest.mark.parametrize("device", [FIRST, SECOND])
def test_a_capture_that_fails_leaves_nothing_behind(cuda, device):
    before = dict(cuda.streams)

    def reads():
        cuda.streams[device].capturing.broken = True
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        graphs.capture(reads, graphs.Pool(device))
    unchanged(cuda, before)
    # The next one goes well, on a stream that has not been broken.
    assert graphs.spoiled is None and graphs.unavailable({device}) is None
    replay = graphs.capture(passing(cuda, device), graphs.Pool(device))
    assert replay() == "a pass" and cuda.ran == [("a pass", device.index)]


def test_a_capture_that_cannot_be_begun(cuda):
    before, cuda.refuses_begin = dict(cuda.streams), True
    with pytest.raises(RuntimeError, match="operation not permitted"):
        graphs.capture(passing(cuda, SECOND), graphs.Pool(SECOND))
    unchanged(cuda, before)
    assert graphs.spoiled is None and not cuda.ran


@pytest.mark.parametrize("broken", [False, True])
def test_what_breaks_a_capture_off_gets_through(cuda, broken):
    """Such as a time box, which is no Exception, or Ctrl-C."""

    class TimeBox(BaseException):
        pass

    def late():
        cuda.streams[FIRST].capturing.broken = broken
        raise TimeBox

    before, kept = dict(cuda.streams), graphs.Graphs(FIRST)
    kept.captured["key"] = None
    with pytest.raises(TimeBox):
        kept.run("key", late)
    assert kept.failure is None and cuda.streams == before and not cuda.recording


def test_what_cannot_be_undone_ends_all_captures(cuda):
    def lost():
        cuda.unending = True
        cuda.launch("a pass", FIRST)

    kept = graphs.Graphs(FIRST)
    kept.captured["key"] = None
    with pytest.warns(UserWarning, match="earlier capture failed and could not be undone"):
        kept.run("key", lost)
    assert "same stream it began on" in kept.failure
    assert "could not be undone" in graphs.unavailable({SECOND})
    assert graphs.unavailable({torch.device("cpu")}) != graphs.spoiled

"""Stand-ins for what torch.cuda has of a device: events, streams, graphs, memory."""

from __future__ import annotations

import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch

from tests.decode.recorder import Recorder
from tests.pretend_gpu.ledger import ledger
from tests.pretend_gpu.tensors import DEVICE

GIB = 1 << 30
PROPERTIES = SimpleNamespace(
    name="Pretend H100", major=9, minor=0, total_memory=78 * GIB, multi_processor_count=132,
    gcnArchName="", L2_cache_size=50 << 20, warp_size=32, uuid="0", max_threads_per_block=1024,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=232448, is_integrated=0, pci_bus_id=1,
)  # fmt: skip


class Event:
    """Times the host, for the device computes when it is asked to."""

    def __init__(self, enable_timing: bool = False, **_: Any):
        self.timed, self.at = enable_timing, None

    def record(self, stream: Any = None) -> None:
        if self.timed and ledger.capturing is not None:
            raise RuntimeError("an event that times is recorded while capturing")
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        if self.at is not None and self.at > ledger.waited:  # else it has come to pass
            ledger.sync("an event")

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        if not self.timed or self.at is None or other.at is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return max(1e-3, 1e3 * (other.at - self.at))


class Stream:
    device, cuda_stream, stream_id = DEVICE, 0, 0

    def __init__(self, *_: Any, **__: Any):
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        ledger.sync("a stream")

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        event = event or Event()
        event.record()
        return event


class Graph:
    recorder: Recorder | None = None
    launches: Counter = Counter()

    def __init__(self, *_: Any, **__: Any):
        pass

    def replay(self) -> None:
        ledger.replays += 1
        before = Counter(ledger.launches)
        self.recorder.replay()
        ledger.launches = before + self.launches  # not what the stand-in copies its results with

    def reset(self) -> None:
        self.recorder = None


class Capture:
    """`torch.cuda.graph`: what is inside is recorded, and changes nothing."""

    def __init__(self, graph: Graph, pool: Any = None, stream: Any = None, **_: Any):
        self.graph, self.recorder = graph, Recorder()

    def __enter__(self) -> None:
        ledger.sync("the beginning of a capture")
        ledger.captures += 1
        ledger.capturing = Counter()
        self.recorder.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.recorder.__exit__(kind, error, trace)
        counted, ledger.capturing = ledger.capturing, None
        self.recorder.undo()
        if error is None:
            ledger.captured.append(counted)
            self.graph.recorder, self.graph.launches = self.recorder, counted


class Profile:
    """`torch.profiler.profile`: an event for each launch and each wait of the host."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __enter__(self) -> Profile:
        self.before = Counter(ledger.launches), Counter(ledger.syncs)
        return self

    def __exit__(self, *_: Any) -> None:
        launches, syncs = ledger.launches - self.before[0], ledger.syncs - self.before[1]
        device, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
        took = SimpleNamespace(elapsed_us=lambda: 1.0)
        self.found = [
            SimpleNamespace(name=name, device_type=device, time_range=took, cpu_parent=None)
            for name in launches.elements()
        ]
        self.found += [
            SimpleNamespace(name="cudaStreamSynchronize", device_type=host, time_range=took)
            for _ in syncs.elements()
        ]

    def events(self) -> list[Any]:
        return self.found


class Generator(torch._C.Generator):
    """Of the CPU's numbers, which are others than a GPU's."""

    def __new__(cls, device: Any = "cpu") -> Any:
        kind = torch.device(device).type
        return super().__new__(cls, "cpu" if kind == "cuda" else device)


class Guard:
    """`torch.cuda.device` and `torch.cuda.stream`."""

    def __init__(self, which: Any):
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


def stand_ins() -> dict[str, Any]:
    """By their names in torch.cuda."""
    stream = Stream()
    one, nothing = lambda *_: 0, lambda *_, **__: None
    generator = torch.default_generator
    return dict(
        is_available=lambda: True, is_initialized=lambda: True, init=nothing, _lazy_init=nothing,
        device_count=lambda: 1, current_device=one, set_device=nothing,
        is_bf16_supported=lambda *_, **__: True,
        Event=Event, Stream=Stream, CUDAGraph=Graph, graph=Capture, device=Guard, stream=Guard,
        current_stream=lambda *_: stream, default_stream=lambda *_: stream,
        synchronize=lambda *_: ledger.sync("the device"), empty_cache=nothing,
        graph_pool_handle=lambda: (0, 1),
        is_current_stream_capturing=lambda: ledger.capturing is not None,
        mem_get_info=lambda *_: (70 * GIB, 78 * GIB), memory_reserved=lambda *_: 1 << 20,
        memory_allocated=lambda *_: 1 << 20, max_memory_allocated=lambda *_: 1 << 20,
        reset_peak_memory_stats=nothing, get_device_capability=lambda *_: (9, 0),
        get_device_properties=lambda *_: PROPERTIES, get_device_name=lambda *_: PROPERTIES.name,
        default_generators=(generator,), manual_seed=nothing, manual_seed_all=nothing,
        get_rng_state=lambda *_: generator.get_state(),
        set_rng_state=lambda state, *_: generator.set_state(state), ipc_collect=nothing,
        utilization=one,
    )  # fmt: skip

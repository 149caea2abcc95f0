"""Looking into generate calls from outside: what a pass takes, and drafts that agree as asked."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PROFILED_PASS = 5  # the how manieth of its kind is looked at; graphs are captured before it


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time of a call, of the device's work too."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


class OutOfTime(BaseException):
    """Not an Exception: a compiler that is interrupted by it must not take it for its own."""


@contextmanager
def at_most(limit: float) -> Iterator[None]:
    """Raise OutOfTime inside once `limit` seconds are over, where the platform can interrupt."""
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(limit, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Within, `owner`'s method `name` is what `make` returns given the original."""
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def unseen_cache() -> Iterator[None]:
    """Within, patched calls leave a cache that they were given as one that generate made itself.

    A prompt's cache that is read once stands in for that of each call. A user who passes none gets
    none back; one that is given is copied out at the end of each call, a whole KV cache more.
    """
    from std_decode import generation

    with replaced(generation, "_outlives", lambda _: lambda cache, config: False):
        yield


# Forced acceptance


def plan(tokens: Tensor, acceptance: float, vocabulary: int, seed: int) -> Tensor:
    """Drafts ``[B, n]``: the given tokens, but a share of 1 - `acceptance` of them is wrong.

    Which is random, how many is not, so that few tokens are enough to come near what was asked.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(tokens.numel(), generator=generator).view(tokens.shape)
    wrong = order < round((1 - acceptance) * tokens.numel())
    return torch.where(wrong.to(tokens.device), (tokens + 1) % vocabulary, tokens)


@contextmanager
def forced_drafts(planned: Tensor) -> Iterator[None]:
    """Within, a draft of a row's t-th token is ``planned[row, t]``.

    The draft pass runs and its choice is made as always; then this one takes its place, at the
    price of a few tiny kernels.
    """
    from std_decode.rounds.loop import Decoding

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def draft(self: Any, logits: Tensor, step: int) -> Tensor:
            original(self, logits, step)
            at = (self.rows.steps[:, None] + step).clamp(max=planned.shape[1] - 1)
            token = planned.gather(1, at)
            self.rows.write(token, step)
            return token[:, 0]

        return draft

    with replaced(Decoding, "draft", make):
        yield


class Lookup:
    """Watches transformers' prompt lookup in the one generate call made within `watch`.

    Its first pass reads the prompt, and drafts besides; what is told here is of the others.

    Attributes:
        seconds, tokens, drafted, passes: from the first pass's end to the call's end.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._begun: list[tuple[float, int, int]] = []  # when, tokens there, tokens drafted

    @contextmanager
    def watch(self) -> Iterator[None]:
        from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

        with replaced(PromptLookupCandidateGenerator, "get_candidates", self._around):
            yield
        synchronize(self.device)
        self._ended = time.perf_counter()

    def _around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def get_candidates(generator: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            synchronize(self.device)
            now = time.perf_counter()
            found = original(generator, input_ids, *args, **kwargs)
            there = input_ids.shape[1]
            self._begun.append((now, there, found[0].shape[1] - there))
            return found

        return get_candidates

    def settle(self, total: int) -> None:
        """Work out the figures; `total` tokens are there at the end, the prompt's too."""
        if len(self._begun) < 2:
            raise RuntimeError("prompt lookup took one pass for all tokens: nothing to time")
        start, before, _ = self._begun[1]
        self.seconds, self.tokens = self._ended - start, total - before
        self.passes = len(self._begun) - 1
        self.drafted = sum(drafted for _, _, drafted in self._begun[1:])


# Passes


@dataclass
class Profile:
    """What the profiler saw of a pass.

    Attributes:
        count: kernels; on the CPU calls of operators by Python, each with all that it calls.
        busy_ms: time in which they ran; None on the CPU, where they are the host's own time.
    """

    count: int
    busy_ms: float | None


def prepare_profiler(device: torch.device) -> None:
    """Start it once before any CUDA graph is captured, and keep it from unloading.

    torch does the second by itself only where Inductor captures the graphs: replaying a graph
    after CUPTI was unloaded and loaded again has crashed.
    """
    if device.type == "cuda":
        os.environ.setdefault("TEARDOWN_CUPTI", "0")
        profiled(lambda: torch.zeros(1, device=device), device)


def profiled(call: Callable[[], Any], device: torch.device) -> tuple[Any, Profile | None]:
    """What a call returned and what the profiler saw of it: None where it saw nothing."""
    from torch.profiler import ProfilerActivity, profile

    kind = device.type
    watch = ProfilerActivity.CUDA if kind == "cuda" else ProfilerActivity.CPU
    synchronize(device)
    with profile(activities=[watch]) as profiler:
        result = call()
        synchronize(device)
    return result, tally(profiler.events() or [], kind)


def tally(events: Iterable[Any], kind: str) -> Profile | None:
    """Count and add up a profiler's events; copies and fills take time but are no kernels."""
    if kind == "cuda":
        device = torch.autograd.DeviceType.CUDA
        ran = [e for e in events if e.device_type == device and not _is_note(e)]
        kernels = [e for e in ran if not e.name.lower().startswith(("memcpy", "memset"))]
        busy = sum(e.time_range.elapsed_us() for e in ran) / 1e3
        return Profile(len(kernels), busy) if kernels else None
    return Profile(sum(e.cpu_parent is None and "::" in e.name for e in events), None)


def _is_note(event: Any) -> bool:
    """Whether it only spans other events."""
    return bool(getattr(event, "is_user_annotation", False)) or event.name.startswith("Profiler")


@dataclass
class Passes:
    """Times the passes of the patched generate calls made within `watch`.

    Attributes:
        milliseconds: by pass: each "draft" step (a round's drafts over their number), each
            "verify" pass of full length, each "dense" one.
        profiles: by pass, of one of them, where asked for.
        keys_read: by a draft step, per KV head of the first layer that selects, without the tail.
    """

    device: torch.device
    draft_length: int
    profile: bool = False
    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    profiles: dict[str, Profile] = field(default_factory=dict)
    keys_read: float | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        from std_decode.passes.engine import Engine

        self._spans: list[tuple[str, int, Any, Any]] = []
        self._seen: dict[str, int] = {}
        with replaced(Engine, "draft", self._around_draft):
            with replaced(Engine, "verify", self._around_verify):
                yield
        synchronize(self.device)
        for name, count, start, end in self._spans:
            self.milliseconds.setdefault(name, []).append(_between(start, end) / count)

    def _around_draft(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def draft(engine: Any, *args: Any, **kwargs: Any) -> Any:
            if self.keys_read is None:
                self.keys_read = _keys_read(engine)
            # The pending token is among those that come back.
            return self._time("draft", lambda: original(engine, *args, **kwargs), 1)

        return draft

    def _around_verify(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def verify(engine: Any, *args: Any, **kwargs: Any) -> Any:
            name = "verify" if self.draft_length else "dense"
            return self._time(name, lambda: original(engine, *args, **kwargs), 0)

        return verify

    def _time(self, name: str, call: Callable[[], Any], extra: int) -> Any:
        """`call`, noted if what it returned, ``[B, T, ...]``, is of a round of full length."""
        seen = self._seen.get(name, 0)
        if self.profile and seen == PROFILED_PASS:
            result, profile = profiled(call, self.device)
        else:
            profile = None
            start = _now(self.device)
            result = call()
            end = _now(self.device)
        steps = result.shape[1] - extra
        if result.shape[1] != self.draft_length + 1 or not steps:
            return result  # of the last rounds, which draft less, or no draft at all
        self._seen[name] = seen + 1
        if profile is None:
            self._spans.append((name, steps if extra else 1, start, end))
        else:
            share = steps if extra else 1
            busy = None if profile.busy_ms is None else profile.busy_ms / share
            self.profiles[name] = Profile(round(profile.count / share), busy)
        return result


def _now(device: torch.device) -> Any:
    """A point in time, on a GPU of its own clock: nothing waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))  # not that of the current device
    return event


def _between(start: Any, end: Any) -> float:
    return 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def _keys_read(engine: Any) -> float | None:
    lists = [getattr(layer, "indices", None) for layer in engine.cache.layers]
    chosen = next((indices for indices in lists if indices is not None), None)
    return None if chosen is None else float((chosen >= 0).sum(dim=-1).float().mean())

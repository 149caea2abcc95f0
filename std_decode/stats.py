"""What a patched generate call did, in numbers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

STAGES = ("prefill", "select", "draft", "verify", "dense")


@dataclass
class DecodeStats:
    """One generate call of a patched model. ``str()`` is a table, ``dataclasses.asdict`` is JSON.

    Attributes:
        fallback: why the call ran as unpatched, or None. All counts are 0 then.
        mode: ``"ragged"``: each row advances by its own acceptance; ``"lockstep"``: the rows of a
            batch advance together, by the smallest.
        lockstep_because: what asks for lockstep, or None.
        promise: what holds of the tokens. "unpatched": they are the unpatched model's, bit for
            bit of each logit; "reproducible": drafts, their weights, and how long passes take
            change no bit; "rounded": they are the unpatched model's but where two tokens are so
            nearly equally likely that rounding decides.
        tokens_per_pass: fed in each decoding pass of a reproducible call, with padding; else 0.
        promise_because: why no more can be promised, or None where it is what was asked for.
        prompt_tokens: length of the padded prompt.
        reused_tokens: those of them that the caller's cache held already.
        selected_keys: width of the draft's index list per KV head: video keys and kept text.
        rounds: dense verification passes that followed a draft.
        drafted: draft tokens proposed, summed over the rows that were not finished.
        accepted: draft tokens that were emitted, summed over the same rows.
        lookup_rounds, lookup_drafted, lookup_accepted: rounds whose drafts were looked up in the
            text, and those of `drafted` and `accepted` that were.
        emitted: tokens emitted, summed over rows, each up to its own end.
        acceptance_rate: accepted / drafted, 0 where nothing was drafted.
        mean_accepted_length: tokens of a row per dense pass after prefill (1 to
            draft_length + 1), as the speculative decoding literature counts it.
        draft_lengths: gamma of each round.
        draft_weights: "int4": drafts read 4-bit twins; None: the model's own weights.
        draft_weights_because: why so, or why some layers keep their weights; None where it is
            what was asked for.
        draft_weight_bytes: memory that the twins take, beside the model's weights, and whatever
            else is kept for drafts of offloaded ones.
        twinned_layers, kept_layers: linear layers with a twin, and without.
        fused_layers: decoder layers whose decoding passes are one kernel between products.
        fused_layers_because: why no or not all layers are, or None.
        graph_captures, graph_replays: forward passes captured as CUDA graphs, and replayed.
        first_use_seconds: part of `seconds` that went into the first run (compilation included)
            and the capture of passes; a call whose shapes have been seen spends none.
        eager_because: why passes were not captured, or None.
        seconds: time per stage, of the device where that is a CUDA device, else of the host.
            "dense" are passes without a draft.
        calls: forward passes (for "select": selections) per stage.
        kv_cache_bytes: the call's K/V buffers, at their capacity (they grow by bucket). Where
            keys and values are offloaded, what the device keeps of them: of each layer the
            selected ones and those of generated tokens, and two layers' in whole;
        host_kv_bytes: then those of the prompt in the host's memory;
        fetched_kv_bytes, stored_kv_bytes: and what was copied from and to there.
        workspace_bytes: what else the call keeps: importance of the prompt's keys, float32
            ``[B, Hkv, S]`` a layer; index lists, int32 ``[B, Hkv, selected_keys]`` a layer; where
            verification renews the selection its scores, float32 ``[B, Hkv, capacity]`` a layer
            (at head dim 128 in 16 bits 1/128 of the KV cache); and when sampling a ring of random
            numbers, float32 ``[steps, B, V]`` with at most 32 steps or the longest draft and one.
        peak_memory_bytes: peak allocated on the CUDA device since the call began; on the CPU the
            peak resident size of the process so far (0 on Windows).
    """

    fallback: str | None = None
    mode: str | None = None
    lockstep_because: str | None = None
    promise: str | None = None
    promise_because: str | None = None
    tokens_per_pass: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    selected_keys: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    lookup_rounds: int = 0
    lookup_drafted: int = 0
    lookup_accepted: int = 0
    emitted: int = 0
    acceptance_rate: float = 0.0
    mean_accepted_length: float = 0.0
    draft_lengths: list[int] = field(default_factory=list)
    draft_weights: str | None = None
    draft_weights_because: str | None = None
    draft_weight_bytes: int = 0
    twinned_layers: int = 0
    kept_layers: int = 0
    fused_layers: int = 0
    fused_layers_because: str | None = None
    graph_captures: int = 0
    graph_replays: int = 0
    first_use_seconds: float = 0.0
    eager_because: str | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    kv_cache_bytes: int = 0
    host_kv_bytes: int = 0
    fetched_kv_bytes: int = 0
    stored_kv_bytes: int = 0
    workspace_bytes: int = 0
    peak_memory_bytes: int = 0

    def count(self, drafted: Iterable[int], accepted: Iterable[int], looked_up: bool) -> None:
        """Count a round's drafts, and those of them that were emitted, by row."""
        proposed, emitted = sum(drafted), sum(accepted)
        self.drafted += proposed
        self.accepted += emitted
        if looked_up:
            self.lookup_rounds += 1
            self.lookup_drafted += proposed
            self.lookup_accepted += emitted

    def settle(self, steps: int, passes: int) -> None:
        """Work out the ratios of a call that took `passes` dense passes for `steps` tokens."""
        self.acceptance_rate = self.accepted / max(1, self.drafted)
        self.mean_accepted_length = steps / passes if passes else 0.0

    def _promise(self) -> str:
        because = f": {self.promise_because}" if self.promise_because else ""
        return f"{self.promise}{because}"

    def _graphs(self) -> str:
        if self.eager_because is not None:
            return f"none: {self.eager_because}"
        counts = f"{self.graph_captures} captured, {self.graph_replays} replays"
        return f"{counts}, {self.first_use_seconds:.2f} s for first use"

    def _weights(self) -> str:
        because = f": {self.draft_weights_because}" if self.draft_weights_because else ""
        if self.draft_weights is None:
            return f"the model's own{because}"
        counts = f"{self.twinned_layers} layers, {self.kept_layers} kept"
        return f"{self.draft_weights}, {_mebibytes(self.draft_weight_bytes)}, {counts}{because}"

    def _fused(self) -> str:
        because = f": {self.fused_layers_because}" if self.fused_layers_because else ""
        return f"{self.fused_layers}{because}"

    def _host(self) -> str:
        fetched, stored = map(_mebibytes, (self.fetched_kv_bytes, self.stored_kv_bytes))
        return f"{_mebibytes(self.host_kv_bytes)}, {fetched} fetched, {stored} stored"

    def _looked_up(self) -> str:
        return f"{self.lookup_drafted} / {self.lookup_accepted} in {self.lookup_rounds} rounds"

    def __str__(self) -> str:
        if self.fallback is not None:
            return f"ran as unpatched: {self.fallback}"
        rows = [
            ("mode", self.mode),
            *([("lockstep because", self.lockstep_because)] if self.lockstep_because else []),
            ("promise", self._promise()),
            ("prompt tokens", self.prompt_tokens),
            *([("of these reused", self.reused_tokens)] if self.reused_tokens else []),
            ("keys a draft reads", self.selected_keys),
            ("draft weights", self._weights()),
            ("fused layers", self._fused()),
            ("tokens emitted", self.emitted),
            ("rounds", self.rounds),
            ("drafted / accepted", f"{self.drafted} / {self.accepted}"),
            *([("of these looked up", self._looked_up())] if self.lookup_rounds else []),
            ("acceptance rate", f"{self.acceptance_rate:.1%}"),
            ("tokens per dense pass", f"{self.mean_accepted_length:.2f}"),
            *((f"{s} (x{self.calls[s]})", f"{self.seconds[s]:.3f} s") for s in STAGES),
            ("CUDA graphs", self._graphs()),
            ("KV cache", _mebibytes(self.kv_cache_bytes)),
            *([("KV cache on the host", self._host())] if self.host_kv_bytes else []),
            ("workspace", _mebibytes(self.workspace_bytes)),
            ("peak memory", _mebibytes(self.peak_memory_bytes)),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


class Clock:
    """Times the stages of a call for its stats: by a CUDA device's own events, or on the host.

    The host runs ahead of a CUDA device, so its own time says nothing of a stage there.
    """

    def __init__(self, stats: DecodeStats, device: torch.device):
        self.stats, self.device = stats, device
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        self.stats.calls[stage] += 1
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(self.device)  # not that of the current device
            start.record(stream)
            yield
            end.record(stream)
            self.events.append((stage, start, end))
            return
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.stats.seconds[stage] += time.perf_counter() - begin

    def settle(self) -> None:
        """Count what was timed, once the host has waited for all of it."""
        for stage, start, end in self.events:
            end.synchronize()  # has come, or an error would say that it has not
            self.stats.seconds[stage] += start.elapsed_time(end) / 1e3
        self.events.clear()


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # the standard library has no such figure there
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

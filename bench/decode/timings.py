"""How long decoding a prompt takes, whole and by pass, and whether its tokens are the same."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

import std_decode
from bench import probes
from bench.decode.tables import Results
from bench.models.build import draft_weight_bytes, kv_bytes_of, weight_bytes
from bench.models.prompts import Prompt
from std_decode.passes import graphs

LONG = 8.0  # seconds: once three runs took that long together, they are enough
PROFILED = 8  # tokens of the calls whose kernels are counted


class TooNoisy(Exception):
    """A call with one token took longer than one with many: the machine is busy otherwise."""


class Timings:
    """One prompt, one batch size.

    Args:
        name: of the model's shape.
        options: of the command line.
        bandwidth: of a large copy on the device, GB/s.
        clock, deadline: nothing is begun once the clock shows the deadline.
    """

    def __init__(
        self,
        prompt: Prompt,
        name: str,
        options: argparse.Namespace,
        results: Results,
        device: torch.device,
        bandwidth: float,
        clock: Callable[[], float],
        deadline: float,
    ):
        self.prompt, self.model, self.options = prompt, prompt.model, options
        self.results, self.device, self.bandwidth = results, device, bandwidth
        self.clock, self.deadline = clock, deadline
        self.n = options.new_tokens
        self.batch = len(prompt.ids)
        dtype = str(self.model.dtype).removeprefix("torch.")
        grid: dict[str, Any] = {"batch": self.batch, "context": prompt.context}
        self.where = {"shape": name, "dtype": dtype, **grid}
        self.weights = weight_bytes(self.model)
        self.expected: Tensor | None = None  # transformers' tokens, and what it chose them by
        self.scores: list[Tensor] = []
        self.dense: Tensor | None = None  # those of our dense path
        self.base: float | None = None  # ms a token, transformers
        self.inputs: dict[str, Any] = {}  # of what of ours is being timed

    def record(self, kind: str, name: str, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"kind": kind, "what": name, **self.where, **inputs}

    def stats(self) -> std_decode.DecodeStats:
        stats = std_decode.last_stats(self.model)
        assert stats is not None
        return stats

    # Comparing

    def same(self, expected: Tensor | None, got: Tensor) -> str:
        """How many tokens are the same before each row's first difference, of how many."""
        if expected is None:
            return "-"
        count = int((expected == got).long().cumprod(dim=1).sum())
        return f"{count} of {got.numel()}"

    def behind(self, tokens: Tensor) -> float:
        """How far the first other token of a row was behind transformers' choice, at worst."""
        assert self.expected is not None
        agreed = (self.expected == tokens).long().cumprod(dim=1).sum(dim=1).tolist()
        parted = {row: step for row, step in enumerate(agreed) if step < self.n}
        if not parted:
            return 0.0
        lags = []
        for row, step in parted.items():
            value = self.scores[step][row].double().log_softmax(dim=-1)
            lags.append(float(value.max() - value[int(tokens[row, step])]))
        return max(lags)

    # Timing

    def first_use(self, call: Callable[[], Any]) -> tuple[float, Any]:
        kept = []
        return probes.seconds(lambda: kept.append(call()), self.device), kept[0]

    def measure(self, call: Callable[[int], Any]) -> dict[str, Any]:
        """Time per token of a row: that of whole calls, less what comes before decoding."""
        call(1)
        before = median(probes.seconds(lambda: call(1), self.device) for _ in range(3))
        return self.timed(lambda: probes.seconds(lambda: call(self.n), self.device) - before)

    def timed(self, span: Callable[[], float]) -> dict[str, Any]:
        """Of runs whose decoding, one token less than they tell, takes ``span()`` seconds."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        spans: list[float] = []
        while len(spans) < self.options.runs:
            late = spans and self.clock() >= self.deadline
            if late or (len(spans) >= 3 and sum(spans) > LONG):
                break
            spans.append(span())
        peak = None
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) - self.prompt.nbytes
        if median(spans) <= 0:
            raise TooNoisy
        return {
            **quantiles([1e3 * max(span, 1e-9) / (self.n - 1) for span in spans]),
            "runs": len(spans),
            "peak_bytes": peak,
        }

    def keep(
        self,
        name: str,
        record: dict[str, Any],
        first: float,
        tokens: Tensor,
        note: str = "",
    ) -> None:
        per_second = {
            ours: 1e3 * self.batch / record[theirs]
            for ours, theirs in (("median", "ms"), ("p20", "ms_p80"), ("p80", "ms_p20"))
        }
        inputs = self.inputs if name.startswith("ours") else {}
        if graphs.spoiled is not None and graphs.spoiled not in note:
            note = "; ".join(filter(None, (note, graphs.spoiled)))
        self.results.keep({
            **self.record("decode", name, inputs), "status": "ok", "new_tokens": self.n,
            **record, "tokens_per_s": per_second, "first_use_s": first,
            "attributes_right": self.prompt.right(tokens),
            "ratio": self.base / record["ms"] if self.base else None,
            "same_as_transformers": self.same(self.expected, tokens),
            "same_as_dense": self.same(self.dense, tokens), "behind": self.behind(tokens),
            "note": note,
        })  # fmt: skip

    def keep_loop(self, name: str, record: dict[str, Any], call: Callable[[int], Any]) -> None:
        """A step of transformers' own loop; its kernels are those of a longer call, less one's."""
        if self.clock() >= self.deadline:
            skipped = {**self.record("pass", name, {}), "pass": "step"}
            self.results.skip(skipped, "out of time")
            return
        many = min(PROFILED, self.n - 1)
        _, one = probes.profiled(lambda: call(1), self.device)
        _, more = probes.profiled(lambda: call(1 + many), self.device)
        profile = None
        if one is not None and more is not None:
            busy = None
            if one.busy_ms is not None and more.busy_ms is not None:
                busy = (more.busy_ms - one.busy_ms) / many
            profile = probes.Profile(round((more.count - one.count) / many), busy)
        times = {key: record[key] for key in ("ms", "ms_p20", "ms_p80")}
        keys = self.prompt.context + self.n / 2
        self.keep_pass(name, "step", times, profile, keys, self.weights)

    def keep_passes(self, name: str, gamma: int) -> None:
        if self.clock() >= self.deadline:
            skipped = {**self.record("pass", name, self.inputs), "pass": "all"}
            self.results.skip(skipped, "out of time")
            return
        times = probes.Passes(self.device, gamma)
        with times.watch():
            self.prompt.tokens(self.n)
        looks = probes.Passes(self.device, gamma, profile=True)
        with looks.watch():
            self.prompt.tokens(self.n)
        everything = self.prompt.context + self.n / 2
        for kind, spans in times.milliseconds.items():
            keys, weights = everything, self.weights
            if kind == "draft":
                weights = draft_weight_bytes(self.model)
            if kind == "draft" and times.keys_read is not None:
                keys = times.keys_read + self.n / 2
            profile = looks.profiles.get(kind)
            self.keep_pass(name, kind, quantiles(spans), profile, keys, weights)

    def keep_pass(
        self,
        name: str,
        kind: str,
        times: dict[str, float],
        profile: probes.Profile | None,
        keys: float,
        weights: int,
    ) -> None:
        moved = weights + self.batch * keys * kv_bytes_of(self.prompt.cache)
        busy = profile.busy_ms if profile is not None else None
        inputs = self.inputs if name.startswith("ours") else {}
        layers = self.model.get_decoder().config.num_hidden_layers
        self.results.keep({
            **self.record("pass", name, inputs), "pass": kind, "status": "ok", **times,
            "layers": layers, "kernels": profile.count if profile is not None else None,
            "busy_ms": busy,
            "idle_ms": None if busy is None else max(0.0, times["ms"] - busy),
            "bytes": round(moved),
            "of_copy": moved / 1e6 / self.bandwidth / times["ms"],
        })  # fmt: skip


def quantiles(values: list[float]) -> dict[str, float]:
    middle, low, high = np.percentile(values, [50, 20, 80]).tolist()
    return {"ms": middle, "ms_p20": low, "ms_p80": high}

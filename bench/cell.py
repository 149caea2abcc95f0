"""All ways of decoding one prompt at one batch size: first compared, then timed."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

import std_decode
from bench import probes
from bench.shapes import Prompt, draft_weight_bytes, kv_bytes_of, weight_bytes
from bench.tables import Results

NEAR_TIE = 1e-4  # of log-probability: in float32 rounding may decide below it, as in the tests
LONG = 8.0  # seconds: once three runs took that long together, they are enough
COMPILING = 90.0  # seconds that the first use of what is compiled may take
PROFILED = 8  # tokens of the calls whose kernels are counted
MOST_PLANS = 4


class Cell:
    """One prompt, one batch size.

    Args:
        options: of the command line.
        bandwidth: of a large copy on the device, GB/s.
        clock, deadline: nothing is begun once the clock shows the deadline.
    """

    def __init__(
        self,
        prompt: Prompt,
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
        self.where = {"batch": self.batch, "context": prompt.context}
        self.weights = weight_bytes(self.model)
        self.expected: Tensor | None = None  # transformers' tokens, and what it chose them by
        self.scores: list[Tensor] = []
        self.dense: Tensor | None = None  # those of our dense path
        self.base: float | None = None  # ms a token, transformers
        self.inputs: dict[str, Any] = {}  # of what of ours is being timed

    def run(self) -> None:
        self.guard("transformers generate", self.transformers)
        if self.expected is None:
            return  # nothing to compare with
        self.both("", {})
        if "static" in self.options.ways:
            self.guard("transformers generate, static cache", self.static)
        if self.device.type == "cuda" and "compiled" in self.options.ways:
            self.both(", compiled", {"compile": True})
        if self.device.type == "cuda" and "no-graphs" in self.options.ways:
            self.both(", no graphs", {"cuda_graphs": False})

    def both(self, suffix: str, patch: dict[str, Any]) -> None:
        """Ours without drafts, then with every number of them."""
        options = self.options
        if "dense" in options.ways:
            self.guard(f"ours, dense{suffix}", lambda name: self.ours(name, patch))
        if "forced" not in options.ways:
            return
        for weights, asked, gamma, keys in product(
            options.draft_weights, options.acceptance, options.draft_length, options.top_k_keys
        ):
            given = patch if weights == "own" else {**patch, "draft_weights": weights}
            drafts = "" if weights == "own" else f", {weights} drafts"
            part = partial(self.ours, patch=given, acceptance=asked, gamma=gamma, keys=keys)
            self.guard(f"ours, forced acceptance {asked:g}{drafts}{suffix}", part)

    def guard(self, name: str, part: Callable[[str], None]) -> None:
        """Whatever one part runs into must not cost the others."""
        if self.clock() >= self.deadline:
            self.results.skip(name, "out of time", **self.where)
            return
        try:
            part(name)
        except probes.OutOfTime:
            # It may come in the middle of a compilation.
            torch.compiler.reset()
            self.results.skip(name, "its first use did not end in time", **self.where)
        except Exception as error:
            # Rivals may fail; without the first of them there is nothing to compare with.
            bad = name.startswith("ours") or self.expected is None
            self.results.fail(name, error, bad, **self.where)
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    # The ways to decode

    def transformers(self, name: str) -> None:
        call = self.prompt.tokens
        first, _ = self.first_use(lambda: call(self.n))
        said = self.prompt.generate(self.n, return_dict_in_generate=True, output_scores=True)
        tokens = said.sequences[:, self.prompt.ids.shape[1] :]
        self.scores = [scores.cpu() for scores in said.scores]
        del said
        record = self.measure(call)
        self.expected, self.base = tokens, record["ms"]
        self.keep(name, record, first, tokens)
        self.keep_loop(name, record, call)

    def static(self, name: str) -> None:
        cache = self.prompt.static(self.n)

        def call(new_tokens: int) -> Tensor:
            return self.prompt.tokens(new_tokens, self.prompt.rewind(cache))

        try:
            with self.bounded():
                first, tokens = self.first_use(lambda: call(self.n))
            record = self.measure(call)
            compiled = "_compiled_call" in vars(self.model)
            note = "compiled" if compiled else "not compiled on the CPU"
            self.keep(name, record, first, tokens, note)
            self.keep_loop(name, record, call)
        finally:
            if vars(self.model).pop("_compiled_call", None) is not None:
                torch.compiler.reset()  # it holds graphs and their memory

    def ours(
        self,
        name: str,
        patch: dict[str, Any],
        acceptance: float | None = None,
        gamma: int = 0,
        keys: int = 1024,
    ) -> None:
        patch = {**patch, "draft_length": gamma, "top_k_keys": keys}
        inputs: dict[str, Any] = {}
        if acceptance is not None:
            inputs = {"acceptance": acceptance, "draft_length": gamma, "top_k_keys": keys}
        self.inputs = inputs
        started = time.perf_counter()
        with std_decode.patched(self.model, **patch):
            probes.synchronize(self.device)
            patching = time.perf_counter() - started
            with self.bounded() if patch.get("compile") else nullcontext():
                first, tokens = self.first_use(lambda: self.prompt.tokens(self.n))
                planned = None
                if acceptance is not None:
                    planned, tokens = self.calibrate(acceptance)
            fault = self.fault(tokens)
            if fault is not None:
                self.results.wrong(name, fault, **self.where, **inputs)
                return
            if acceptance is None and self.dense is None:
                self.dense = tokens
            with nullcontext() if planned is None else probes.forced_drafts(planned):
                self.prompt.tokens(self.n)  # warm
                record = self.measure(self.prompt.tokens)
                stats = self.stats()
                if acceptance is not None:
                    record["tokens_per_pass"] = stats.mean_accepted_length
                    record["tokens_per_pass_asked"] = sum(acceptance**i for i in range(gamma + 1))
                    record["accepted_of_drafted"] = stats.acceptance_rate
                record |= {"patch_s": patching, "draft_weight_bytes": stats.draft_weight_bytes}
                self.keep(name, record, first, tokens, note_of(stats, patching))
                self.keep_passes(name, gamma)
        if patch.get("compile"):
            torch.compiler.reset()  # the same code compiled too often is refused

    def fault(self, tokens: Tensor) -> str | None:
        """Why the newest call of ours is not to be timed, or None."""
        fallback = self.stats().fallback
        if fallback is not None:
            return f"ran as unpatched: {fallback}"
        behind = self.behind(tokens)
        if self.model.dtype != torch.float32 or behind < NEAR_TIE:
            return None
        same = self.same(self.expected, tokens)
        return f"wrong: {same} tokens are right, then one is behind by {behind:.2g}"

    def bounded(self) -> AbstractContextManager[None]:
        """For what compiles."""
        return probes.at_most(min(COMPILING, self.deadline - self.clock()))

    def stats(self) -> std_decode.DecodeStats:
        stats = std_decode.last_stats(self.model)
        assert stats is not None
        return stats

    def calibrate(self, acceptance: float) -> tuple[Tensor, Tensor]:
        """Drafts that agree as asked, and the tokens that come of them.

        They follow the dense path's text as long as verification does. Where rounding parts them
        the next plan follows what verification chose instead, until it is what it chooses.
        """
        text = self.expected if self.dense is None else self.dense
        assert text is not None
        vocabulary = self.prompt.vocabulary
        for _ in range(MOST_PLANS):
            planned = probes.plan(text, acceptance, vocabulary, self.options.seed)
            with probes.forced_drafts(planned):
                tokens = self.prompt.tokens(self.n)
            if torch.equal(tokens, text):
                break
            text = tokens
        return planned, tokens

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

    def first_use(self, call: Callable[[], Tensor]) -> tuple[float, Tensor]:
        kept = []
        return probes.seconds(lambda: kept.append(call()), self.device), kept[0]

    def measure(self, call: Callable[[int], Any]) -> dict[str, Any]:
        """Time per token of a row: that of whole calls, less what comes before decoding."""
        call(1)
        before = median(probes.seconds(lambda: call(1), self.device) for _ in range(3))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        spans: list[float] = []
        while len(spans) < self.options.runs:
            late = spans and self.clock() >= self.deadline
            if late or (len(spans) >= 3 and sum(spans) > LONG):
                break
            spans.append(probes.seconds(lambda: call(self.n), self.device) - before)
        peak = None
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) - self.prompt.nbytes
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
        self.results.keep({
            "kind": "decode", "what": name, "status": "ok", **self.where,
            **(self.inputs if name.startswith("ours") else {}), **record,
            "tokens_per_s": per_second, "first_use_s": first,
            "ratio": self.base / record["ms"] if self.base else None,
            "same_as_transformers": self.same(self.expected, tokens),
            "same_as_dense": self.same(self.dense, tokens), "behind": self.behind(tokens),
            "note": note,
        })  # fmt: skip

    def keep_loop(self, name: str, record: dict[str, Any], call: Callable[[int], Any]) -> None:
        """A step of transformers' own loop; its kernels are those of a longer call, less one's."""
        if self.clock() >= self.deadline:
            self.results.skip(name, "its profile: out of time", **self.where)
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
            self.results.skip(name, "its passes: out of time", **self.where, **self.inputs)
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
        self.results.keep({
            "kind": "pass", "what": name, "pass": kind, "status": "ok", **self.where,
            **(self.inputs if name.startswith("ours") else {}), **times,
            "kernels": profile.count if profile is not None else None,
            "busy_ms": busy,
            "idle_ms": None if busy is None else max(0.0, times["ms"] - busy),
            "bytes": round(moved),
            "of_copy": moved / 1e6 / self.bandwidth / times["ms"],
        })  # fmt: skip


def note_of(stats: std_decode.DecodeStats, patching: float) -> str:
    notes = [f"no graphs: {stats.eager_because}" if stats.eager_because else None]
    if stats.draft_weights is not None:
        size = stats.draft_weight_bytes / 1e9
        notes.append(f"{size:.2f} GB of {stats.draft_weights} copies, made in {patching:.1f} s")
    notes.append(stats.draft_weights_because)
    return "; ".join(filter(None, notes))


def quantiles(values: list[float]) -> dict[str, float]:
    middle, low, high = np.percentile(values, [50, 20, 80]).tolist()
    return {"ms": middle, "ms_p20": low, "ms_p80": high}

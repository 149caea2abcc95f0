"""All ways of decoding one prompt at one batch size: first compared, then timed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import std_decode
from bench import probes
from bench.decode.tables import STATIC, UNPATCHED
from bench.decode.timings import Timings, TooNoisy
from std_decode.passes import graphs

NEAR_TIE = 1e-4  # of log-probability: in float32 rounding may decide below it, as in the tests
# Seconds that the first use of what is compiled may take, and more for each layer: about twice
# what drafting and verifying passes took of one core: 10 s with 2 layers, 21 s with 8; of these,
# 8 s with 4 layers and 32 s with 28 before Inductor. A narrow Qwen2-VL, torch 2.13, for the CPU,
# without the C++ compiler; a GPU's kernels are few, and are compiled side by side.
COMPILING, COMPILING_A_LAYER = 30.0, 3.5
MOST_PLANS = 4
# Of every batch the first before the second of any: what is the question before what takes long.
STAGES = range(3)
LOOKED_UP = 10  # tokens that prompt lookup drafts at most, as transformers' documentation has it
LOOKUP = "transformers generate, prompt lookup"
Way = tuple[str, Callable[[str], None], dict[str, Any]]


class Cell(Timings):
    """Every way to decode one prompt at one batch size, once over."""

    hopeless = False  # transformers failed: there is nothing to compare with

    def run(self, stage: int) -> None:
        """The ways of one of the `STAGES`."""
        ways = [way for way in self.ways(stage) if not self.done(*way)]
        if self.hopeless or not ways and (self.expected is not None or self.done(UNPATCHED)):
            return
        if self.expected is None:
            # Anew though it may be done: there is nothing else to compare with.
            self.guard(UNPATCHED, self.transformers, {})
            self.hopeless = self.expected is None
        for way in () if self.hopeless else ways:
            self.guard(*way)

    def ways(self, stage: int) -> Iterator[Way]:
        """Name, what does it, and with which inputs; but for transformers' own."""
        asked, cuda = self.options.ways, self.device.type == "cuda"
        if stage == 0:
            yield from self.both("", {})
        elif stage == 1:
            if "static" in asked:
                yield STATIC, self.static, {}
            if "lookup" in asked and self.prompt.trained and self.batch == 1:
                yield LOOKUP, self.lookup, {}
        elif cuda and "compiled" in asked:
            yield from self.both(", compiled", {"compile": True})
        if stage == 2 and cuda and "no-graphs" in asked:
            yield from self.both(", no graphs", {"cuda_graphs": False})

    def both(self, suffix: str, patch: dict[str, Any]) -> Iterator[Way]:
        """Ours without drafts, then with every number of them."""
        options, trained = self.options, self.prompt.trained
        if "dense" in options.ways:
            yield f"ours, dense{suffix}", partial(self.ours, patch=patch), {}
        if "drafts" not in options.ways:
            return
        acceptance = [None] if trained else options.acceptance
        for weights, asked, gamma, keys in product(
            options.draft_weights, acceptance, options.draft_length, options.top_k_keys
        ):
            given = patch if weights == "own" else {**patch, "draft_weights": weights}
            drafts = "" if weights == "own" else f", {weights} drafts"
            part = partial(self.ours, patch=given, acceptance=asked, gamma=gamma, keys=keys)
            how = "measured acceptance" if asked is None else f"forced acceptance {asked:g}"
            yield f"ours, {how}{drafts}{suffix}", part, inputs_of(asked, gamma, keys)

    def done(self, name: str, _: Any = None, inputs: dict[str, Any] | None = None) -> bool:
        """Whether an earlier run has both its times and those of its passes."""
        made = self.record("decode", name, inputs or {})
        last = {UNPATCHED: "step", STATIC: "step", LOOKUP: None}.get(
            name, "verify" if inputs else "dense"
        )
        passes = {**made, "kind": "pass", "pass": last}
        return self.results.done(made) and (last is None or self.results.done(passes))

    def guard(self, name: str, part: Callable[[str], None], inputs: dict[str, Any]) -> None:
        """Whatever one part runs into must not cost the others."""
        record = self.record("decode", name, inputs)
        if self.clock() >= self.deadline:
            self.results.skip(record, "out of time")
            return
        try:
            part(name)
        except probes.OutOfTime:
            # It may come in the middle of a compilation.
            torch.compiler.reset()
            self.results.skip(record, self.late)
        except TooNoisy:
            self.results.skip(record, "the machine is too busy to time it")
        except Exception as error:
            # Rivals may fail; without the first of them there is nothing to compare with.
            bad = name.startswith("ours") or self.expected is None
            if graphs.spoiled is not None:
                record["note"] = graphs.spoiled
            self.results.fail(record, error, bad)
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    # The ways to decode

    def transformers(self, name: str) -> None:
        call, kept = self.prompt.tokens, dict(return_dict_in_generate=True, output_scores=True)
        first, said = self.first_use(lambda: self.prompt.generate(self.n, **kept))
        tokens = said.sequences[:, self.prompt.ids.shape[1] :]
        self.scores = [scores.cpu() for scores in said.scores]
        del said
        record = self.measure(call)
        self.expected, self.base = tokens, record["ms"]
        self.keep(name, record, first, tokens)
        if not self.results.done({**self.record("pass", name, {}), "pass": "step"}):
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

    def lookup(self, name: str) -> None:
        """transformers' own drafts: what followed the newest tokens where they stood before.

        It reads the prompt anew: given a cache it would read what is in there once more.
        """
        looks: list[probes.Lookup] = []

        def call() -> Tensor:
            looks.append(probes.Lookup(self.device))
            with looks[-1].watch():
                tokens = self.prompt.from_nothing(self.n, prompt_lookup_num_tokens=LOOKED_UP)
            looks[-1].settle(self.prompt.ids.shape[1] + tokens.shape[1])
            return tokens

        def span() -> float:
            call()
            return (self.n - 1) * looks[-1].seconds / looks[-1].tokens

        first, tokens = self.first_use(call)
        record, look = self.timed(span), looks[-1]
        record["peak_bytes"] = None  # of reading the prompt too
        record["tokens_per_pass"] = look.tokens / look.passes
        record["accepted_of_drafted"] = (look.tokens - look.passes) / max(1, look.drafted)
        record["acceptance_is"] = "measured"
        self.keep(name, record, first, tokens, f"{LOOKED_UP} tokens are looked up at most")

    def ours(
        self,
        name: str,
        patch: dict[str, Any],
        acceptance: float | None = None,
        gamma: int = 0,
        keys: int = 1024,
    ) -> None:
        patch = {**patch, "draft_length": gamma, "top_k_keys": keys}
        self.inputs = inputs = inputs_of(acceptance, gamma, keys) if gamma else {}
        started = time.perf_counter()
        with std_decode.patched(self.model, **patch), probes.unseen_cache():
            probes.synchronize(self.device)
            patching = time.perf_counter() - started
            with self.bounded() if patch.get("compile") else nullcontext():
                first, tokens = self.first_use(lambda: self.prompt.tokens(self.n))
                planned = None
                if acceptance is not None:
                    planned, tokens = self.calibrate(acceptance)
            fault = self.fault(tokens)
            if fault is not None:
                self.results.wrong(self.record("decode", name, inputs), fault)
                return
            if not gamma and self.dense is None:
                self.dense = tokens
            with nullcontext() if planned is None else probes.forced_drafts(planned):
                self.prompt.tokens(self.n)  # warm
                record = self.measure(self.prompt.tokens)
                stats = self.stats()
                if gamma:
                    record["tokens_per_pass"] = stats.mean_accepted_length
                    record["accepted_of_drafted"] = stats.acceptance_rate
                    record["acceptance_is"] = "measured"
                if acceptance is not None:
                    record["tokens_per_pass_asked"] = sum(acceptance**i for i in range(gamma + 1))
                    record["acceptance_is"] = "forced"
                share = {stage: 1e3 * s / (self.n - 1) for stage, s in stats.seconds.items()}
                record["stage_ms"] = share  # a token of a row
                record |= {"patch_s": patching, "draft_weight_bytes": stats.draft_weight_bytes}
                self.keep(name, record, first, tokens, note_of(stats, patching, self.device))
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
        left = self.deadline - self.clock()
        layers = self.model.get_decoder().config.num_hidden_layers
        most = COMPILING + COMPILING_A_LAYER * layers
        self.late = f"its first use took more than {most:.0f} s"
        if left < most:
            self.late = "out of time: its first use did not end"
        return probes.at_most(min(most, left))

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


def inputs_of(acceptance: float | None, gamma: int, keys: int) -> dict[str, Any]:
    """What a way to draft was asked for; `acceptance` is None where it is measured."""
    asked = {} if acceptance is None else {"acceptance": acceptance}
    return {**asked, "draft_length": gamma, "top_k_keys": keys}


def note_of(stats: std_decode.DecodeStats, patching: float, device: torch.device) -> str:
    eager = stats.eager_because if device.type == "cuda" else None
    notes = [f"no graphs: {eager}" if eager else None]
    if stats.draft_weights is not None:
        size = stats.draft_weight_bytes / 1e9
        notes.append(f"{size:.2f} GB of {stats.draft_weights} copies, made in {patching:.1f} s")
    notes.append(stats.draft_weights_because)
    return "; ".join(filter(None, notes))

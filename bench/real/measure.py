"""One text: how many drafts agree, what rounding changes, how fast each way is."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import std_decode
from bench.exactness.measure import Way, compare
from bench.real import texts
from bench.records import Record
from std_decode.model.cache import CACHE

GAMMA, EVERY = 4, 100_000
UNPATCHED = "unpatched"
LOOKED_UP = 10  # transformers' own default for `prompt_lookup_num_tokens` in its documentation
BELOW = (0.01, 0.1)  # margins, in log-probability
# What is timed: an answer that has little of its prompt's words in it, and one that copies.
TIMED = (("prose", "summary"), ("table", "question"))


@dataclass(frozen=True)
class Text:
    """A prompt ``[1, S]``, and a cache of it without its last tokens."""

    inputs: dict[str, Tensor]
    cache: DynamicCache


def choose(
    kinds: Iterable[str], tasks: Iterable[str], sizes: Iterable[int]
) -> Iterator[tuple[str, str, int]]:
    """Which texts: each kind with each task at the shortest size, with one task at the others."""
    kinds, tasks, sizes = tuple(kinds), tuple(tasks), sorted(sizes)
    yield from ((kind, task, sizes[0]) for kind, task in product(kinds, tasks))
    for turn, size in enumerate(sizes[1:], 1):
        for number, kind in enumerate(kinds):
            yield kind, tasks[(number + turn) % len(tasks)], size


def timed(kinds: Iterable[str], sizes: Iterable[int]) -> Iterator[tuple[str, str, int]]:
    """Which texts are timed."""
    yield from ((*which, size) for size in sorted(sizes) for which in TIMED if which[0] in kinds)


def text(tokenizer: Any, model: Any, kind: str, task: str, tokens: int, unread: int) -> Text:
    """A text, all but its `unread` last tokens read by the unpatched model."""
    number = 3 * texts.KINDS.index(kind) + texts.TASKS.index(task)
    inputs = texts.prompt(tokenizer, kind, task, tokens, number)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(inputs["input_ids"][:, :-unread], **{CACHE: cache}, logits_to_keep=1)
    return Text(inputs, cache)


def generate(model: Any, given: Text, new_tokens: int, **options: Any) -> Any:
    """What `generate` returns, greedy, of the text as it was read; the cache given stays."""
    return model.generate(
        **given.inputs, max_new_tokens=new_tokens, do_sample=False,
        **{CACHE: copy.deepcopy(given.cache), **options},
    )  # fmt: skip


def answer(model: Any, given: Text, new_tokens: int, **options: Any) -> Tensor:
    """Its answer's tokens ``[T]``."""
    told = generate(model, given, new_tokens, **options)
    return told[0, given.inputs["input_ids"].shape[1] :]


def patch_options(way: Record, copies: Path) -> Record:
    """Of `patch`; `copies` keeps 4-bit copies from one way to the next."""
    more = {"draft_weights_cache": copies} if way.get("draft_weights") else {}
    return {**way, **more}


# How many drafts agree


def drafting(keys: Iterable[int], gammas: Iterable[int], quick: bool = False) -> list[Record]:
    """The ways to draft that are tried: options of `patch`.

    Keys and draft lengths vary one at a time, around the middle of the keys and `GAMMA`.
    """
    keys, weights = sorted(keys), (None, "int4")
    middle = keys[len(keys) // 2]
    found = [(k, GAMMA, True, w) for k, w in product(keys, weights)]
    found += [(middle, gamma, True, None) for gamma in gammas if gamma != GAMMA]
    found += [(middle, GAMMA, False, None), (EVERY, GAMMA, True, "int4")]
    if quick:
        found = [(middle, GAMMA, True, None), found[-1]]
    names = ("top_k_keys", "draft_length", "reselect", "draft_weights")
    return [dict(zip(names, one)) for one in found]


def acceptance(
    model: Any, given: Text, ways: list[Record], new_tokens: int, copies: Path
) -> Iterator[Record]:
    """A record of each way, float32: its drafts, and whether the tokens are the unpatched ones."""
    expected = answer(model, given, new_tokens)
    for way in ways:
        with std_decode.patched(model, reproducible=False, **patch_options(way, copies)):
            told = answer(model, given, new_tokens)
            stats = std_decode.last_stats(model)
        assert stats is not None and stats.fallback is None, stats
        assert stats.draft_weights == way["draft_weights"], stats
        yield {
            **way,
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "steps": stats.emitted - 1,
            "passes": stats.calls["verify"] + stats.calls["dense"],
            "identical": torch.equal(told, expected),
        }


# What rounding changes


def rounding(model: Any, given: Text, new_tokens: int) -> Record:
    """Of a model in half precision: where drafts that promise no bits part from the unpatched."""
    output = generate(model, given, new_tokens, return_dict_in_generate=True, output_scores=True)
    expected = output.sequences[0, given.inputs["input_ids"].shape[1] :]
    scores = torch.stack(output.scores).float().log_softmax(-1)[:, 0]
    best = scores.topk(2, dim=-1).values
    margins = best[:, 0] - best[:, 1]
    record: Record = {
        "margins_below": {str(most): int((margins <= most).sum()) for most in BELOW},
        "steps": len(margins),
    }
    for name, promise in (("rounded", False), ("as promised", "auto")):
        with std_decode.patched(model, draft_length=GAMMA, reproducible=promise):
            told = answer(model, given, new_tokens)
            stats = std_decode.last_stats(model)
        assert stats is not None and stats.fallback is None, stats
        way = Way()
        compare(way, expected, told, scores)
        record[name] = {"promise": stats.promise, "same_up_to": way.tokens, "lags": way.lags}
    return record


# How fast


class _Arrivals:
    """A streamer that notes when the first token and the last came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """From the first token on; before it comes the prompt."""
        return self.times[-1] - self.times[1]


def timed_ways() -> dict[str, Record | None]:
    """By name, options of `patch`; None: unpatched."""
    return {
        UNPATCHED: None,
        texts.DENSE: dict(draft_length=0),
        "4 drafts": dict(draft_length=GAMMA),
        "4 drafts, int4": dict(draft_length=GAMMA, draft_weights="int4"),
        "look-ups": dict(draft_length=0, prompt_lookup=True),
        "look-ups or 4 drafts": dict(draft_length=GAMMA, prompt_lookup=True),
        texts.AUTO: dict(draft_length="auto"),
        texts.LOOKUP: None,
    }


def speed(
    model: Any, given: Text, new_tokens: int, names: Iterable[str], turns: int, copies: Path
) -> Record:
    """Tokens/s of each way after its first token; all take turns, forwards and backwards."""
    ways = {name: way for name, way in timed_ways().items() if name in (UNPATCHED, *names)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    told: dict[str, list[Tensor]] = {name: [] for name in ways}
    for turn in range(turns):
        for name, patch in list(ways.items())[:: -1 if turn % 2 else 1]:
            patch = patch and patch_options(patch, copies)
            rate, tokens = _timed(model, given, new_tokens, name, patch)
            rates[name].append(rate)
            told[name].append(tokens)
    right = told[UNPATCHED][0]
    return {
        "tokens_per_s": {name: median(found) for name, found in rates.items()},
        "over_unpatched": {
            name: median(a / b for a, b in zip(found, rates[UNPATCHED]))
            for name, found in rates.items()
        },
        "auto_over_dense": [
            auto / dense
            for dense, auto in zip(rates.get(texts.DENSE, []), rates.get(texts.AUTO, []))
        ],
        "identical": {
            name: all(torch.equal(tokens, right) for tokens in found)
            for name, found in told.items()
        },
        "emitted": len(right),
        "turns": turns,
    }


def _timed(
    model: Any, given: Text, new_tokens: int, name: str, patch: Record | None
) -> tuple[float, Tensor]:
    arrivals = _Arrivals()
    more: dict[str, Any] = {}
    if name == texts.LOOKUP:  # given a cache, it leaves out the first token
        more = {"prompt_lookup_num_tokens": LOOKED_UP, CACHE: None}
    attached: AbstractContextManager[Any] = nullcontext()
    if patch is not None:
        attached = std_decode.patched(model, **patch)
    with attached:
        tokens = answer(model, given, new_tokens, streamer=arrivals, **more)
        if patch is not None:
            stats = std_decode.last_stats(model)
            assert stats is not None and stats.fallback is None, stats
    return (len(tokens) - 1) / max(arrivals.seconds, 1e-9), tokens

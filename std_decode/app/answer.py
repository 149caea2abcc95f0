"""Answers to one question, timed, and the table that sets ways of answering side by side."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import TextStreamer

from std_decode.app.output import check_file
from std_decode.app.sparsity.measure import GREEDY
from std_decode.errors import BadInput
from std_decode.stats import DecodeStats

Show = Callable[[str], object]  # is given the text piece by piece


@dataclass
class Answer:
    """One generate call.

    Attributes:
        sequences: prompt and answer ``[1, S + T]``.
        tokens: of the answer, T.
        first_seconds: until the first token, the prompt's pass.
        total_seconds: of the whole call.
        tokens_per_second: of decoding, after the first token; 0 of a single token.
        peak_memory_bytes: allocated on the CUDA device; None elsewhere.
        stats: of a patched model's call.
    """

    sequences: Tensor
    text: str
    tokens: int
    first_seconds: float
    total_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int | None = None
    stats: DecodeStats | None = None


def _streamer(tokenizer: Any, show: Show | None) -> tuple[TextStreamer, list[float]]:
    """Shows the text as it comes (None: to nobody), and notes the time of each `put`.

    No subclass, since sampling with a streamer of unknown habits goes in lockstep.
    """
    streamer: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    put, times = streamer.put, [time.perf_counter()]

    def timed(value: Tensor) -> None:
        put(value)
        times.append(time.perf_counter())

    def shown(text: str, stream_end: bool = False) -> None:
        if show is not None:
            show(text + "\n" * stream_end)

    streamer.put, streamer.on_finalized_text = timed, shown
    return streamer, times


def answer(
    model: Any,
    inputs: dict[str, Tensor],
    tokenizer: Any,
    seed: int,
    show: Show | None = None,
    **options: Any,
) -> Answer:
    """Generate once from `seed`, with `options` of generate, and take the time."""
    torch.manual_seed(seed)
    on_cuda = model.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    streamer, times = _streamer(tokenizer, show)
    sequences = model.generate(**inputs, **options, streamer=streamer).cpu()
    end = time.perf_counter()
    told = sequences[0, inputs["input_ids"].shape[1] :]
    start, _, first, *_ = times  # the prompt is handed over in between
    last = times[-1]
    return Answer(
        sequences,
        tokenizer.decode(told, skip_special_tokens=True),
        len(told),
        first - start,
        end - start,
        (len(told) - 1) / (last - first) if len(told) > 1 else 0.0,
        torch.cuda.max_memory_allocated(model.device) if on_cuda else None,
    )


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Options of generate: greedy, or sampling as the model's own generation config has it."""
    given = {name: getattr(options, name) for name in ("temperature", "top_p")}
    given = {name: value for name, value in given.items() if value is not None}
    if options.sample:
        return dict(do_sample=True, num_beams=1, **given)
    for name in given:
        raise BadInput(f"--{name.replace('_', '-')} is of sampling; give --sample too")
    return GREEDY


def patch_options(options: argparse.Namespace) -> dict[str, Any]:
    """Options of `patch`."""
    if options.draft_weights_cache is not None and options.draft_weights is None:
        raise BadInput("--draft-weights-cache keeps 4-bit copies; give --draft-weights int4 too")
    cache = options.draft_weights_cache
    # One that is there may be where only root writes.
    if cache is not None and not cache.is_file():
        check_file("--draft-weights-cache", cache)
    names = ("top_k_keys", "draft_length", "prompt_lookup", "reselect", "draft_weights",
             "draft_weights_cache", "kv_cache", "compile", "reproducible")  # fmt: skip
    return {name: getattr(options, name) for name in names}


@contextmanager
def one_line() -> Iterator[None]:
    """Turns what a user can do something about into one line."""
    try:
        yield
    except (NotImplementedError, MemoryError, torch.OutOfMemoryError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, torch.OutOfMemoryError):
            line = f"out of memory; give fewer --frames or --dtype bfloat16 ({line})"
        raise BadInput(line) from error
    except (ValueError, RuntimeError) as error:
        line = str(error)
        if line.startswith("patch: "):
            raise BadInput(line) from error
        if line.startswith("probability tensor"):  # torch's, of a sample of no distribution
            raise BadInput(
                f"the logits give no probabilities ({line}); raise --temperature, or give "
                "--dtype float32"
            ) from error
        raise


def middle(runs: list[Answer], name: str) -> float:
    """Median over runs."""
    return median(getattr(run, name) for run in runs)


def ratio(told: dict[str, list[Answer]], rival: str, name: str) -> float | None:
    """How much better "patched" did than `rival`: the median of ratios, run by run.

    Args:
        name: of a speed, or of seconds, of which less is better.
    """
    pairs = [(getattr(x, name), getattr(y, name)) for x, y in zip(told["patched"], told[rival])]
    if name.endswith("seconds"):
        pairs = [(theirs, ours) for ours, theirs in pairs]
    ratios = [ours / theirs for ours, theirs in pairs if theirs]
    return median(ratios) if ratios else None


def side_by_side(title: str, told: dict[str, list[Answer]]) -> Table:
    """Rivals and "patched", a column each: medians, and how many times better "patched" is."""
    runs = len(told["patched"])
    of_runs = f", medians of {runs} runs" if runs > 1 else ""
    table = Table(title=f"{title}{of_runs}", title_style="bold")
    rivals = [way for way in told if way != "patched"]
    for name in ("", *rivals, "patched"):
        table.add_column(name, justify="left" if not name else "right")

    def row(title: str, name: str, digits: int, compared: bool = False) -> None:
        ways = (*rivals, "patched")
        table.add_row(title, *(f"{middle(told[way], name):.{digits}f}" for way in ways))
        if compared:
            ratios = (ratio(told, rival, name) for rival in rivals)
            table.add_row("  patched is", *(f"{r:.2f}x" if r else "" for r in ratios), "")

    row("first token, s", "first_seconds", 3)
    row("decoding, tokens/s", "tokens_per_second", 1, compared=True)
    row("in all, s", "total_seconds", 3, compared=True)
    row("tokens", "tokens", 0)
    return table


def add_drafting(table: Table, stats: DecodeStats) -> None:
    """Rows of what drafting came to, in the last column."""
    blank = [""] * (len(table.columns) - 2)
    lengths = Counter(stats.draft_lengths)
    lengths[0] = stats.calls["dense"]
    chosen = ", ".join(f"{g} ({lengths[g]}x)" for g in sorted(lengths) if lengths[g])
    table.add_row("drafts a round", *blank, chosen or "-")
    table.add_row("tokens per dense pass", *blank, f"{stats.mean_accepted_length:.2f}")
    rate = f"{stats.acceptance_rate:.1%}" if stats.drafted else "-"
    table.add_row("acceptance rate", *blank, rate)
    if stats.lookup_rounds:
        looked_up = f"{stats.lookup_accepted} of {stats.lookup_drafted}"
        table.add_row("looked up and kept", *blank, looked_up)

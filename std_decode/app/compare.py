"""``std-decode compare``: the same question unpatched and patched, on a model of the user's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

import std_decode
from std_decode.app.answer import (
    Answer,
    Show,
    add_drafting,
    answer,
    middle,
    one_line,
    patch_options,
    ratio,
    sampling,
    side_by_side,
)
from std_decode.app.difference import Difference, first_difference
from std_decode.app.output import check_file, replace_file
from std_decode.app.question import Question, ask, check_question
from std_decode.app.sparsity.findings import Findings, investigate
from std_decode.app.sparsity.measure import NotMeasurable

ADVISED_KEYS = (64, 256, 1024, 4096)
ADVISED_LENGTHS = (1, 2, 4, 8)
_PROMISED = {
    "unpatched": "the unpatched bits",
    "reproducible": "drafts change no bit",
    "rounded": "but for rounding",
}
_SPEEDS = ("first_seconds", "tokens_per_second", "total_seconds")


@dataclass
class Comparison:
    """All answers to one question.

    Attributes:
        told: by way, "unpatched" and "patched", in the order of the runs.
        first: the first answer after each `patch`, which pays for setting up.
        difference: where the first answer parts from the unpatched one that does.
        repeats_itself: whether all the unpatched answers have the same tokens.
        as_dense: whether the patched answer has the tokens of the same without drafts; None where
            that is not promised, or follows.
    """

    told: dict[str, list[Answer]]
    first: list[Answer] = field(default_factory=list)
    difference: Difference | None = None
    repeats_itself: bool = True
    as_dense: bool | None = None

    @property
    def identical(self) -> bool:
        return self.repeats_itself and self.difference is None

    @property
    def stats(self) -> std_decode.DecodeStats:
        """Of the first patched call that is compared."""
        stats = self.told["patched"][0].stats
        assert stats is not None
        return stats


def compare(options: argparse.Namespace) -> int:
    """Run ``std-decode compare``. Returns 0 if all tokens were identical, else 1."""
    check_question(options)
    patch, chosen = patch_options(options), sampling(options)
    if options.json is not None:
        check_file("--json", options.json)
    console = Console()
    disable_progress_bar()
    with one_line(), _copies_kept(patch) as patch:
        question = ask(options, console)
        console.print(f"[dim]{question.about}[/dim]", highlight=False)
        found = _answers(question, options, chosen, patch, console)
        advice = _advice(question, patch, console) if options.advice else None
    figures = _figures(question, options, found, advice)
    console.print(_table(found))
    _tell(question, found, advice, console)
    if options.json is not None:
        replace_file(options.json, (json.dumps(figures, indent=1) + "\n").encode())
    return 0 if found.identical else 1


@contextmanager
def _copies_kept(patch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Options of patch with a file for 4-bit copies, or each of many patches made them anew."""
    if patch["draft_weights"] is None or patch["draft_weights_cache"] is not None:
        yield patch
        return
    with TemporaryDirectory() as folder:
        yield {**patch, "draft_weights_cache": Path(folder) / "copies"}


def _answers(
    question: Question,
    options: argparse.Namespace,
    chosen: dict[str, Any],
    patch: dict[str, Any],
    console: Console,
) -> Comparison:
    """Answer in turns, the first time for all to see, and compare the tokens."""

    def tell(most: int = question.most_tokens, show: Show | None = None) -> Answer:
        how = dict(chosen, max_new_tokens=most)
        return answer(
            question.model, question.inputs, question.tokenizer, options.seed, show, **how
        )

    def show(text: str) -> None:
        console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    found = Comparison({"unpatched": [], "patched": []})
    for run in range(options.repeat):
        turn = f", {run + 1} of {options.repeat}" if options.repeat > 1 else ""
        with console.status(f"unpatched{turn}"):
            if run == 0:
                tell(1)  # whatever is loaded or allocated at the first pass of all
            found.told["unpatched"].append(tell())
        with std_decode.patched(question.model, **patch) as model:
            if run == 0:
                found.first.append(tell(show=show))
            else:
                with console.status(f"patched, setting up{turn}"):
                    found.first.append(tell())
            with console.status(f"patched{turn}"):
                told = tell()
            found.told["patched"].append(replace(told, stats=std_decode.last_stats(model)))
    plain, *others = found.told["unpatched"]
    found.repeats_itself = all(torch.equal(x.sequences, plain.sequences) for x in others)
    for told in (*found.first, *found.told["patched"]):
        if not torch.equal(told.sequences, plain.sequences):
            with console.status("the tokens differ: looking into it"):
                found.difference = first_difference(
                    question.model,
                    question.inputs,
                    options.seed,
                    plain.sequences,
                    told.sequences,
                    **chosen,
                )
            break
    if found.difference is not None:
        promise = found.stats.promise
        found.difference = replace(found.difference, promised=promise == "unpatched")
        if promise == "reproducible":
            passes = found.stats.tokens_per_pass
            alike = {"draft_length": 0, "prompt_lookup": False, "reproducible": passes}
            with std_decode.patched(question.model, **{**patch, **alike}):
                dense = tell()
            found.as_dense = torch.equal(dense.sequences, found.first[0].sequences)
    return found


def _advice(question: Question, patch: dict[str, Any], console: Console) -> Findings | str:
    """What `std-decode sparsity` measures, of fewer numbers of keys; or why there is none."""
    patch = dict(patch)
    del patch["prompt_lookup"]  # it is of sparse drafts
    keys = {patch.pop("top_k_keys"), *ADVISED_KEYS}
    length = patch.pop("draft_length")
    lengths = {*ADVISED_LENGTHS, *([length] if length in range(1, 64) else [])}
    with Progress(console=console, transient=True) as progress:
        try:
            return investigate(
                question.model,
                question.inputs,
                question.most_tokens,
                sorted(keys),
                sorted(lengths),
                progress,
                hindsight=False,
                **patch,
            )
        except NotMeasurable as error:
            return str(error)


def _figures(
    question: Question,
    options: argparse.Namespace,
    found: Comparison,
    advice: Findings | str | None,
) -> dict[str, Any]:
    """As they are written to the JSON file."""
    difference = None
    if found.difference is not None:
        difference = {
            **asdict(found.difference),
            "dtype": str(found.difference.dtype).removeprefix("torch."),
            "is_rounding": found.difference.is_rounding,
        }
    told = found.told
    return {
        "about": question.about,
        "decoding": f"{'sampled' if options.sample else 'greedy'}, batch 1, seed {options.seed}",
        **question.conditions(),
        "prompt_tokens": question.prompt_tokens,
        "answer_tokens": told["unpatched"][0].tokens,
        "answer": told["unpatched"][0].text,
        "runs": options.repeat,
        "identical": found.identical,
        "as_without_drafts": found.as_dense,
        "unpatched_repeats_itself": found.repeats_itself,
        "difference": difference,
        **{way: {name: middle(runs, name) for name in _SPEEDS} for way, runs in told.items()},
        "first_patched_call_seconds": middle(found.first, "total_seconds"),
        "speedup": {
            "decoding": ratio(told, "unpatched", "tokens_per_second"),
            "in_all": ratio(told, "unpatched", "total_seconds"),
        },
        "peak_memory_bytes": {way: runs[0].peak_memory_bytes for way, runs in told.items()},
        "stats": asdict(found.stats),
        "advice": None if advice is None else _advice_figures(advice),
    }


def _advice_figures(advice: Findings | str) -> dict[str, Any]:
    if isinstance(advice, str):
        return {"none_because": advice}
    return {
        **asdict(advice.suggestion),
        "agreement_by_keys": {point.top_k_keys: point.agreement for point in advice.keys},
        "rounds": [
            {**asdict(point), "tokens_per_second": point.tokens_per_second}
            for point in advice.rounds
        ],
    }


def _table(found: Comparison) -> Table:
    table = side_by_side("the same question, patched and not", found.told)
    table.add_row("first call, s", "", f"{middle(found.first, 'total_seconds'):.3f}")
    stats = found.stats
    add_drafting(table, stats)
    peaks = [runs[0].peak_memory_bytes for runs in found.told.values()]
    if None not in peaks:
        table.add_row("peak memory, MiB", *(f"{peak / 2**20:,.0f}" for peak in peaks if peak))
    else:
        table.add_row("KV cache, MiB", "", f"{stats.kv_cache_bytes / 2**20:,.1f}")
    if stats.host_kv_bytes:
        table.add_row("on the host, MiB", "", f"{stats.host_kv_bytes / 2**20:,.1f}")
    extra = stats.workspace_bytes + stats.draft_weight_bytes
    table.add_row("beside it, MiB", "", f"{extra / 2**20:,.1f}")
    table.add_row("promised", "", _PROMISED.get(stats.promise or "", "-"))
    table.add_row(
        "tokens identical", "", "[green]yes[/]" if found.identical else "[bold red]NO[/]"
    )
    return table


def _tell(
    question: Question, found: Comparison, advice: Findings | str | None, console: Console
) -> None:
    """What the table cannot say."""

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False)

    if found.stats.fallback is not None:
        say(f"ran as unpatched: {found.stats.fallback}", "yellow")
    if not found.repeats_itself:
        say("The unpatched model's answers differ among themselves, with the same seed.", "yellow")
    if found.stats.promise_because is not None:
        say(f"no stronger promise: {found.stats.promise_because}")
    if found.difference is not None:
        say(_parted(question, found.difference), "yellow")
    if found.as_dense:
        say("Without drafts, in passes of the same shape, the tokens are those with drafts.")
    elif found.as_dense is False:
        say("Without drafts the tokens are others, too: please report it as a bug.", "yellow")
    if isinstance(advice, str):
        say(f"no advice: {advice}")
    elif advice is not None:
        chosen = advice.suggestion
        keys = chosen.top_k_keys
        shown = [f"{p.top_k_keys:,} ({p.agreement:.0%})" for p in advice.keys]
        say(f"keys (next tokens agreeing): {', '.join(shown)}")
        say(f"advice: top_k_keys={keys}, draft_length={chosen.draft_length}", "bold")
        say(chosen.why)


def _parted(question: Question, difference: Difference) -> str:
    def shown(token: int | None) -> str:
        return "the end" if token is None else repr(question.tokenizer.decode([token]))

    return (
        f"The first difference is token {difference.step + 1} of the answer: "
        f"{shown(difference.unpatched)} unpatched, {shown(difference.patched)} patched. "
        f"{difference.explained()}"
    )

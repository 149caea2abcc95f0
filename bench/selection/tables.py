"""What `bench selection` measured, as tables, Markdown and a picture."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

from bench.roofline.tables import write
from bench.selection.rules import GROUPS, RULES, YARDSTICKS, in_words
from std_decode.app.output import new_figure, png

Found = list[dict[str, Any]]
Table = tuple[str, list[str], list[list[str]]]  # title, head, rows


def _of(found: Found, **wanted: Any) -> Found:
    return [one for one in found if all(one[name] == value for name, value in wanted.items())]


def _values(found: Found, name: str) -> list[Any]:
    return sorted({one[name] for one in found})


def _mean(found: Found, what: str, **cell: Any) -> float | None:
    return _mean_of([one[what] for one in _of(found, **cell)])


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _by_keys(options: argparse.Namespace, found: Found, tokens: int) -> Table:
    """Static, the library's rule and the yardstick, at each number of keys."""
    here = _of(found, video_tokens=tokens)
    keys = _values(here, "top_k_keys")
    rows: list[list[str]] = []
    means: dict[tuple[str, str], list[float | None]] = {}
    for rule in (rule for rule in YARDSTICKS if _of(here, rule=rule)):
        for what, form in (("tokens_per_pass", ".2f"), ("acceptance", ".1%")):
            cells = [_mean(here, what, rule=rule, top_k_keys=k) for k in keys]
            means[rule, what] = cells
            name = rule if what == "tokens_per_pass" else f"{rule}, accepted"
            rows.append([name, *(_number(cell, form) for cell in cells)])
    ours = means.get(("library", "tokens_per_pass"), [])
    for other in ("static", "exact"):
        theirs = means.get((other, "tokens_per_pass"), [])
        if ours and theirs:
            rows.append([f"library over {other}", *map(_over, ours, theirs)])
    clips = len(_values(here, "clip"))
    title = f"{tokens:,} video tokens, {clips} clips: tokens per dense pass, and drafts accepted"
    return title, ["keys", *map(str, keys)], rows


def _by_rule(options: argparse.Namespace, found: Found) -> Table:
    """Every rule, at the keys at which all were run."""
    columns = [
        (tokens, keys)
        for tokens in _values(found, "video_tokens")
        for keys in _values(_of(found, video_tokens=tokens), "top_k_keys")
        if len(_values(_of(found, video_tokens=tokens, top_k_keys=keys), "rule")) > len(YARDSTICKS)
    ]
    here = [one for one in found if (one["video_tokens"], one["top_k_keys"]) in columns]
    rows: list[list[str]] = []
    theirs: list[float | None] = []
    for rule in (rule for rule in RULES if rule in options.rules):
        cells = [
            _mean(here, "tokens_per_pass", rule=rule, video_tokens=tokens, top_k_keys=keys)
            for tokens, keys in columns
        ]
        if rule == "library":
            theirs = cells
        selected = _mean_of([_selecting(one) for one in _of(here, rule=rule)])
        rows.append([GROUPS[rule], rule, *map(_number, cells), _number(selected, ".0%"), ""])
        if theirs and rule != "library":
            rows[-1][-1] = _over(_mean_of(cells), _mean_of(theirs))
    head = ["what varies", "rule", *(f"{tokens:,} / {keys}" for tokens, keys in columns)]
    head += ["rounds that select", "over library"]
    return "Every rule: tokens per dense pass at video tokens / keys", head, rows


def _selecting(one: dict[str, Any]) -> float:
    """Share of a run's rounds after which it selected."""
    return (one["selections"] - 1) / max(1, one["rounds"])


def _over(ours: float | None, theirs: float | None) -> str:
    return f"{ours / theirs - 1:+.1%}" if ours and theirs else ""


def _mean_of(cells: list[float | None]) -> float | None:
    known = [cell for cell in cells if cell is not None]
    return mean(known) if known else None


def _cost(options: argparse.Namespace, found: Found) -> Table:
    head = ["video tokens", "keys", "rule"]
    head += ["draft ms", "verify ms", "select ms", "round ms", "tokens/s"]
    rows = []
    for tokens, keys, rule in product(
        _values(found, "video_tokens"), options.rules_at, ("static", "library")
    ):
        here = _of(found, video_tokens=tokens, top_k_keys=keys, rule=rule)
        if here:
            stages = ("draft_ms", "verify_ms", "select_ms")
            cells = [median(one[stage] for one in here) for stage in stages]
            cells.append(median(map(_round_ms, here)))
            rate = median(1e3 * one["tokens_per_pass"] / _round_ms(one) for one in here)
            rows.append([f"{tokens:,}", str(keys), rule, *map(_number, cells), f"{rate:.0f}"])
    return "Cost by the host's clock, other load included: medians over clips", head, rows


def _round_ms(one: dict[str, Any]) -> float:
    selecting = one["select_ms"] * _selecting(one)
    return one["draft_length"] * one["draft_ms"] + one["verify_ms"] + selecting


def tables(options: argparse.Namespace, found: Found) -> Iterator[Table]:
    for tokens in _values(found, "video_tokens"):
        if set(YARDSTICKS) & set(options.rules):
            yield _by_keys(options, found, tokens)
    if set(options.rules) - set(YARDSTICKS):
        yield _by_rule(options, found)
    if {"static", "library"} & set(options.rules):
        yield _cost(options, found)


def verdict(found: Found) -> list[str]:
    different = [one for one in found if not one["identical"]]
    lines = [
        f"{len(found) - len(different)} of {len(found)} runs gave the unpatched model's tokens"
    ]
    for one in different:
        lines.append("not identical: {video_tokens} video tokens, clip {clip}, {rule}, "
                     "{top_k_keys} keys".format(**one))  # fmt: skip
    right = ", ".join(
        f"{_mean(found, 'attributes_right', video_tokens=tokens):.1%} at {tokens:,}"
        for tokens in _values(found, "video_tokens")
    )
    return [*lines, f"attributes told right: {right} video tokens"]


def rich_tables(options: argparse.Namespace, found: Found) -> list[Any]:
    from rich.table import Table as RichTable

    shown: list[Any] = []
    for title, head, rows in tables(options, found):
        table = RichTable(title=title)
        for name in head:
            table.add_column(name, justify="left" if name in ("rule", "what varies") else "right")
        for row in rows:
            table.add_row(*row, style="bold" if "library" in row else None)
        shown.append(table)
    return [*shown, *verdict(found)]


def publish(
    options: argparse.Namespace, environment: dict[str, Any], found: Found, command: str
) -> Iterator[Path]:
    """Write what `command`, a line, says again."""
    path = options.out / "selection.md"
    write(path, markdown(options, environment, found, command).encode())
    yield path
    if set(YARDSTICKS) & set(options.rules) and len(options.top_k_keys) > 1:
        path = options.out / "selection.png"
        write(path, picture(options, found))
        yield path


def markdown(
    options: argparse.Namespace, environment: dict[str, Any], found: Found, command: str
) -> str:
    env = environment
    lines = [
        "# Which keys drafts read: rules of re-selection on the demo model",
        "",
        f"Written by `{command}`; what is run: `python -m bench selection --help`.",
        "",
        f"Draft length {env['draft_length']}, so at most {env['draft_length'] + 1} tokens per "
        f"dense pass; clips of {env['events']} events; float32, batch 1, {env['threads']} "
        f"thread(s) of {env['processor']}; torch {env['torch']}, transformers "
        f"{env['transformers']}, Python {env['python']}; checkpoint sha256 {env['checkpoint']}; "
        f"commit {env['commit']}, {env['date']}.",
        "",
        *(f"- {line}" for line in verdict(found)),
    ]
    if set(YARDSTICKS) & set(options.rules) and len(options.top_k_keys) > 1:
        lines += ["", "![tokens per dense pass against keys](selection.png)"]
    for title, head, rows in tables(options, found):
        lines += ["", f"## {title}", ""]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", "## The rules", "", "```", in_words(), "```"]) + "\n"


def picture(options: argparse.Namespace, found: Found) -> bytes:
    """PNG: tokens per dense pass against keys, a panel for each length."""
    lengths = _values(found, "video_tokens")
    figure = new_figure(3.4 * len(lengths) + 0.6, 3.2)
    for axes, tokens in zip(
        figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0], lengths
    ):
        here = _of(found, video_tokens=tokens)
        keys = _values(here, "top_k_keys")
        for rule, style in zip(YARDSTICKS, ("s-", "o-", "^--")):
            means = [_mean(here, "tokens_per_pass", rule=rule, top_k_keys=k) for k in keys]
            axes.plot(range(len(keys)), means, style, label=rule, markersize=4)
        axes.set_xticks(range(len(keys)), list(map(str, keys)), fontsize=8)
        axes.set_title(f"{tokens:,} video tokens, {len(_values(here, 'clip'))} clips", fontsize=10)
        axes.set_xlabel("keys a draft reads")
        axes.axhline(options.draft_length + 1, color="0.7", linewidth=0.8)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("tokens per dense pass")
    figure.axes[0].set_ylim(1)
    figure.axes[0].legend(fontsize=8, loc="lower right")
    return png(figure)

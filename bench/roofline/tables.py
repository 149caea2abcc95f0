"""What `bench roofline` predicts, as tables, Markdown and JSON lines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.roofline.devices import GPUS
from bench.roofline.measured import efficiency
from bench.roofline.predictions import MOST_BATCH, MOST_CONTEXT, USABLE
from bench.roofline.words import PREDICTED, WAYS, command, gpu_in_words, in_words, model_in_words
from std_decode.app.output import replace_file
from std_decode.costs import expected as costs

_HEAD = (
    "batch", "context", "GPUs", "what", "drafts", "ms/step", "tokens/step", "tokens/s", "speedup",
    "expected", "pays from context", "pays from batch", "note",
)  # fmt: skip
Records = list[dict[str, Any]]
NAME = "roofline.md"


def write(path: Path, content: bytes) -> None:
    """All of a file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content)


def _grouped(records: Records) -> dict[tuple[str, str], Records]:
    groups: dict[tuple[str, str], Records] = {}
    for record in records:
        groups.setdefault((record["model"], record["gpu"]), []).append(record)
    return groups


def _from(record: dict[str, Any], what: str, most: int) -> str:
    if record["what"] == "dense":
        return "-"
    value = record[f"pays_from_{what}"]
    if value is None:
        return f"not up to {most:,}"
    return "any" if value == 1 else f"{value:,}"


def _note(record: dict[str, Any]) -> str:
    notes = []
    if record["what"] != "dense" and record["draft_length"] == 0:
        best, drafts = record["drafting_speedup"], record["drafting_length"]
        notes.append(f"do not draft: {drafts} would be {best:.2f}x")
    if not record["fits"]:
        limit = USABLE * GPUS[record["gpu"]].memory * record["gpus"] / 1e9
        notes.append(f"does not fit: {record['needed_bytes'] / 1e9:.0f} GB into {limit:.0f} GB")
    return "; ".join(notes)


def _cells(record: dict[str, Any]) -> list[str]:
    return [
        str(record["batch"]),
        f"{record['context']:,}",
        str(record["gpus"]),
        record["what"],
        str(record["draft_length"]),
        f"{record['ms_per_step']:.3g}",
        f"{record['tokens_per_step']:.2f}",
        f"{record['tokens_per_s']:,.0f}",
        f"{record['speedup']:.2f}x",
        f"{record['expected_speedup']:.2f}x",
        _from(record, "context", MOST_CONTEXT),
        _from(record, "batch", MOST_BATCH),
        _note(record),
    ]


def _overview(records: Records, what: str = "speedup") -> tuple[list[str], list[list[str]]]:
    """A row for each model and GPU, a column for each cell: both speedups, or those expected."""
    places = list(dict.fromkeys((r["context"], r["batch"]) for r in records))
    rows = []
    for (model, gpu), group in _grouped(records).items():
        row = [model, gpu]
        for place in places:
            here = [r for r in group if (r["context"], r["batch"]) == place]
            speedups = {record["what"]: record for record in here}
            both = [speedups[way] for way in WAYS.values()]
            text = " / ".join(f"{r[what]:.2f}x" + "*" * (not r["fits"]) for r in both)
            row.append(text + (f", {both[0]['gpus']} GPUs" if both[0]["gpus"] > 1 else ""))
        rows.append(row)
    return ["model", "GPU", *(f"{batch} x {context:,}" for context, batch in places)], rows


EXPECTED = "what to expect"
_OVERVIEW = "batch x context: speedup over dense decoding with bf16 / 4-bit drafts"


def _stars(rows: list[list[str]]) -> str:
    return "; * does not fit" if any("*" in cell for row in rows for cell in row) else ""


def rich_tables(options: argparse.Namespace, records: Records) -> list[Any]:
    from rich.markup import escape
    from rich.table import Table

    shown: list[Any] = [escape(in_words(options))]
    shown += [escape(gpu_in_words(gpu)) for gpu in options.gpu]
    for (model, gpu), group in _grouped(records).items():
        shown.append(escape(model_in_words(model)))
        table = Table(title=f"{model} on {gpu} ({PREDICTED})")
        for name in _HEAD:
            words = name in ("what", "note")
            table.add_column(name, no_wrap=name == "what", justify="left" if words else "right")
        for record in group:
            gains = record["speedup"] > 1 and record["fits"]
            table.add_row(*map(escape, _cells(record)), style="bold" if gains else None)
        shown.append(table)
    if len(_grouped(records)) > 1:
        head, rows = _overview(records)
        table = Table(*head, title=f"{_OVERVIEW} ({PREDICTED}{_stars(rows)})")
        for row in rows:
            table.add_row(*row)
        shown.append(table)
        head, rows = _overview(records, "expected_speedup")
        table = Table(*head, title=f"the same, {EXPECTED} ({PREDICTED}{_stars(rows)})")
        for row in rows:
            table.add_row(*row)
        shown.append(table)
    return shown


def _paces(gpus: list[str]) -> str:
    measured = [gpu for gpu in gpus if efficiency(gpu) != costs.EXPECTED]
    if not measured:
        return "No pace has been measured: they are those of `std_decode/costs/expected.py`."
    return f"Paces of {', '.join(measured)} are measured as far as results files go."


def markdown_table(head: tuple[str, ...] | list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def markdown(options: argparse.Namespace, records: Records) -> str:
    head, rows = _overview(records)
    lines = [
        f"# Drafting on paper: {PREDICTED}",
        "",
        f"Written by `{command(options)}`.",
        "What is assumed, and what is left out, all of which makes real figures smaller:",
        "`python -m bench roofline --help`. A speedup here is a ceiling.",
        "",
        f"{in_words(options)}.",
        "",
        *(f"- {gpu_in_words(gpu)}" for gpu in options.gpu),
        *(f"- {model_in_words(model)}" for model in options.model),
        "",
        f"## Predicted speedups{_stars(rows)}",
        "",
        f"{_OVERVIEW}. 1.00x: better not to draft.",
        "",
        *markdown_table(head, rows),
        "",
        f"## {EXPECTED.capitalize()}{_stars(rows)}",
        "",
        "Predicted too, with launches, small kernels and the pace that kernels reach; passes are "
        f"captured and not compiled; over our own dense path. {_paces(options.gpu)}",
        "",
        *markdown_table(*_overview(records, "expected_speedup")),
    ]
    for (model, gpu), group in _grouped(records).items():
        lines += ["", f"## {model} on {gpu}, predicted", ""]
        lines += markdown_table(_HEAD, [_cells(record) for record in group])
    return "\n".join(lines) + "\n"

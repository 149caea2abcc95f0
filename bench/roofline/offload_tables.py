"""What `bench roofline` predicts of models behind a link, as tables and Markdown."""

from __future__ import annotations

import argparse
from typing import Any

from bench.roofline.devices import GPUS
from bench.roofline.offload import OTHER_ACCEPTANCES
from bench.roofline.predictions import USABLE
from bench.roofline.tables import Records, markdown_table
from bench.roofline.words import (
    PREDICTED,
    command,
    gpu_in_words,
    in_words,
    link_in_words,
    model_in_words,
)

NAME = "roofline-link.md"
WHICH = "Which set-up"
_HEAD = (
    "model", "GPU", "link", "batch", "context", "set-up", "drafts", "GB on the GPU", "on the host",
    "over the link", "ms/round", "tokens/round", "tokens/s", "speedup", "expected",
    "fastest dense", "its tokens/s",
)  # fmt: skip
_PLACES = {
    ("device", "device"): "all on the GPU",
    ("host", "device"): "weights on the host",
    ("device", "host"): "K/V on the host",
    ("host", "host"): "both on the host",
}
_LEGEND = (
    "Where weights and K/V are, the drafts of a round, what is expected over the fastest dense "
    "decoding that fits, tokens/s of all rows."
)


def _too_large(record: dict[str, Any]) -> str:
    limit = USABLE * GPUS[record["gpu"]].memory
    return f"does not fit: {record['device_bytes'] / 1e9:.0f} GB into {limit / 1e9:.0f} GB"


def _drafts(record: dict[str, Any]) -> str:
    if not record["draft_length"]:
        return "no drafts"
    drafts = "draft" if record["draft_length"] == 1 else "drafts"
    return f"{record['draft_length']} {'4-bit ' * record['four_bit']}{drafts}"


def _rate(tokens: float) -> str:
    return f"{tokens:.3g}" if tokens < 100 else f"{tokens:,.0f}"


def _cells(record: dict[str, Any]) -> list[str]:
    where = [*(record[name] for name in ("model", "gpu", "link")), str(record["batch"])]
    where.append(f"{record['context']:,}")
    if not record["fits"]:
        return [*where, _too_large(record), *[""] * (len(_HEAD) - len(where) - 1)]
    dense = record["dense"]
    return [
        *where,
        _PLACES[record["weights"], record["kv"]],
        _drafts(record),
        *(f"{record[f'{what}_bytes'] / 1e9:.1f}" for what in ("device", "host", "link")),
        f"{record['ms_per_step']:.3g}",
        f"{record['tokens_per_step']:.2f}",
        _rate(record["tokens_per_s"]),
        f"{record['speedup']:.2f}x",
        f"{record['expected_speedup']:.2f}x",
        _PLACES[dense["weights"], dense["kv"]],
        _rate(dense["tokens_per_s"]),
    ]


def _chosen(record: dict[str, Any]) -> str:
    if not record["fits"]:
        return _too_large(record)
    place, rate = _PLACES[record["weights"], record["kv"]], _rate(record["tokens_per_s"])
    return f"{place}, {_drafts(record)}: {record['expected_speedup']:.2f}x, {rate}/s"


def _by_acceptance(record: dict[str, Any]) -> str:
    if not record["fits"]:
        return "-"
    return " / ".join(f"{record['expected_at'][p]:.2f}x" for p in OTHER_ACCEPTANCES)


def _over_contexts(records: Records, cell: Any) -> tuple[list[str], list[list[str]]]:
    """A row for each model, GPU and link, a column for each context and batch."""
    places = list(dict.fromkeys((r["context"], r["batch"]) for r in records))
    rows: dict[tuple[str, str, str], list[str]] = {}
    for r in records:
        rows.setdefault((r["model"], r["gpu"], r["link"]), []).append(cell(r))
    head = ["model", "GPU", "link", *(f"{batch} x {context:,}" for context, batch in places)]
    return head, [[*where, *cells] for where, cells in rows.items()]


def rich_tables(options: argparse.Namespace, records: Records) -> list[Any]:
    from rich.markup import escape
    from rich.table import Table

    shown: list[Any] = [escape(f"{in_words(options)}; batch x context")]
    shown += [escape(gpu_in_words(gpu)) for gpu in options.gpu]
    shown += [escape(link_in_words(link)) for link in options.link]
    shown += [escape(model_in_words(model)) for model in options.model]
    table = Table(title=f"what does not fit ({PREDICTED})")
    for i, name in enumerate(_HEAD):
        table.add_column(name, justify="left" if i < 3 or "dense" in name else "right")
    for record in records:
        table.add_row(*map(escape, _cells(record)))
    return [*shown, table]


def markdown(options: argparse.Namespace, records: Records) -> str:
    lines = [
        f"# What does not fit, on paper: {PREDICTED}",
        "",
        f"Written by `{command(options)}`.",
        "What is assumed, and what is left out, all of which makes real figures smaller:",
        "`python -m bench roofline --help`.",
        "",
        f"{in_words(options)}.",
        "",
        *(f"- {gpu_in_words(gpu)}, PCIe {GPUS[gpu].pcie}" for gpu in options.gpu),
        *(f"- {link_in_words(link)}" for link in options.link),
        *(f"- {model_in_words(model)}" for model in options.model),
        "",
        f"## {WHICH}, predicted",
        "",
        _LEGEND,
        "",
        *markdown_table(*_over_contexts(records, _chosen)),
        "",
        f"## The same at acceptance {' / '.join(map(str, OTHER_ACCEPTANCES))}, predicted",
        "",
        "The set-up that is fastest there, and its best draft length"
        if options.draft_length is None
        else "The set-up that is fastest there",
        "",
        *markdown_table(*_over_contexts(records, _by_acceptance)),
        "",
        "## Each, predicted",
        "",
        *markdown_table(_HEAD, [_cells(record) for record in records]),
    ]
    return "\n".join(lines) + "\n"

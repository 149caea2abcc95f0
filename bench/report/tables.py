"""The tables of the documentation, each from its results files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.environment import in_words
from bench.records import Record, markdown_table, read
from bench.report import offload as offloaded
from bench.report import real as pretrained
from bench.roofline.devices import GPUS
from bench.roofline.offload_tables import NAME as LINKED
from bench.roofline.offload_tables import WHICH
from bench.roofline.tables import EXPECTED

# Of bench/results/roofline.md: rows, columns, and the GPU.
MODELS = {"qwen2-vl-7b": "Qwen2-VL-7B", "qwen3-vl-8b": "Qwen3-VL-8B", "qwen3.5-27b": "Qwen3.5-27B"}
CELLS, GPU = ("1 x 25,000", "8 x 25,000", "32 x 25,000", "8 x 100,000"), "h200"


_EXPECTED = f"## {EXPECTED.capitalize()}"


class Unclear(Exception):
    """What of a page or a results file cannot be understood."""


def files(results: Path, name: str) -> list[tuple[Record, list[Record]]]:
    """Environment and records of a command's files, one for each device."""
    found = []
    for path in sorted(results.glob(f"{name}-*.jsonl")):
        records = read(path)
        if not records or "date" not in records[0]:
            raise Unclear(f"{path} does not begin with the record of an environment")
        found.append((records[0], records[1:]))
    return found


def _each(results: Path, name: str, section: Callable[[Record, list[Record]], list[str]]) -> Any:
    lines: list[str] = []
    for about, records in files(results, name):
        part = section(about, records)
        lines += ["", *part] if lines and part else part
    return lines


# The demo


def demo(results: Path) -> list[str]:
    return _each(results, "demo", _demo)


def _demo(about: Record, records: list[Record]) -> list[str]:
    head = ("clip", "video tokens", "drafts a round", "unpatched, tokens/s",
            "dense path, tokens/s", "patched, tokens/s", "over unpatched", "over dense path",
            "acceptance", "tokens per dense pass", "attributes right")  # fmt: skip
    records = [record for record in records if record["status"] == "ok"]
    records.sort(key=lambda one: (one["draft_length"] != "auto", one["seconds"]))
    same = all(record["identical"] for record in records)
    repeats = sorted({record["repeat"] for record in records})
    return [
        *markdown_table(head, map(_demo_cells, records)),
        "",
        f"{in_words(about)}. Medians of {' or '.join(map(str, repeats))} runs; all tokens were "
        f"identical{'.' if same else ' BUT FOR SOME: A BUG.'}",
    ]


def _demo_cells(record: Record) -> list[str]:
    speeds = ("unpatched", "dense_path", "patched")
    ratios = [record[f"over_{rival}"] for rival in ("unpatched", "dense_path")]
    return [
        f"{record['seconds']:,} s",
        f"{record['video_tokens']:,}",
        str(record["draft_length"]),
        *(f"{record[f'{name}_tokens_per_second']:.0f}" for name in speeds),
        *("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
        "-" if record["acceptance_rate"] is None else f"{record['acceptance_rate']:.0%}",
        f"{record['mean_accepted_length']:.1f}",
        f"{record['attributes_right']:.0%}",
    ]


# The first token


def prefill(results: Path) -> list[str]:
    return _each(results, "prefill", _prefill)


def _prefill(about: Record, records: list[Record]) -> list[str]:
    head = ("prompt tokens", "unpatched, ms", "patched, ms", "more time", "p20 to p80")
    rows = [
        [f"{r['tokens']:,}", f"{r['unpatched_ms']:.0f}", f"{r['patched_ms']:.0f}",
         f"{r['ratio'] - 1:+.1%}",
         f"{r['ratio_p20'] - 1:+.1%} to {r['ratio_p80'] - 1:+.1%}"]
        for r in records if "ratio" in r
    ]  # fmt: skip
    where = f"{about['shape']}, {about['dtype']}, batch 1; {in_words(about)}."
    return [*markdown_table(head, rows), "", where] if rows else []


# What promises cost


def promises(results: Path) -> list[str]:
    return _each(results, "promises", _promises)


def _promises(about: Record, records: list[Record]) -> list[str]:
    timed = [record for record in records if "milliseconds" in record]
    widths = sorted({w for r in timed for way in r["milliseconds"].values() for w in way}, key=int)
    head = ("model", "type", "unpatched step", "promise",
            *("dense step" if w == "1" else f"{w} tokens" for w in widths))  # fmt: skip
    rows = []
    for record in timed:
        took = record["milliseconds"]
        for way in (way for way in took if way != "unpatched"):
            cells = [took[way].get(width) for width in widths]
            broken = "" if record["kept"].get(way, True) else " NOT KEPT: A BUG"
            rows.append((record["model"], record["dtype"], f"{took['unpatched']['1']:.1f}",
                         f"{way}{broken}",
                         *("-" if took is None else f"{took:.1f}" for took in cells)))  # fmt: skip
    where = f"Milliseconds a pass, batch 1, greedy; {in_words(about)}."
    return [*markdown_table(head, rows), "", where] if rows else []


# A pretrained model on real texts


def real(results: Path) -> list[str]:
    return _each(results, "real", pretrained.tables)


def real_short(results: Path) -> list[str]:
    return _each(results, "real", pretrained.short)


# Weights on a disk


def offload(results: Path) -> list[str]:
    return _each(results, "offload", offloaded.tables)


# Decoding


def decode(results: Path) -> list[str]:
    return _each(results, "decode", _decode)


def _decode(about: Record, records: list[Record]) -> list[str]:
    head = ("model", "batch x context", "transformers, tokens/s", "static cache",
            "prompt lookup", "our dense path", "drafting", "over transformers", "acceptance",
            "tokens per dense pass", "identical tokens", "how")  # fmt: skip
    cells: dict[tuple[str, int, int], list[Record]] = {}
    for record in records:
        if record["kind"] == "decode" and record["status"] == "ok":
            where = (record["shape"], record["context"], record["batch"])
            cells.setdefault(where, []).append(record)
    rows = [row for where, here in cells.items() if (row := _decode_cells(where, here))]
    kinds = {r.get("acceptance_is") for here in cells.values() for r in here if "acceptance" in r}
    forced = " Forced acceptance is an input, not a finding: the weights are random."
    if not rows:
        return []
    return [
        f"**Whole models' decoding, measured** on {in_words(about)} (`python -m bench decode`; "
        f"tokens/s of all rows of a batch).{forced if kinds else ''}",
        "",
        *markdown_table(head, rows),
    ]


def _decode_cells(where: tuple[str, int, int], here: list[Record]) -> list[str] | None:
    """One model at one context and batch; None if nothing drafted."""
    shape, context, batch = where

    def speed(ways: list[Record]) -> str:
        return f"{max(_speed(way) for way in ways):,.0f}" if ways else "-"

    def named(what: str) -> list[Record]:
        return [record for record in here if record["what"] == what]

    drafting = [record for record in here if record.get("draft_length")]
    if not drafting:
        return None
    best = max(drafting, key=_speed)
    accepted = f"{best['accepted_of_drafted']:.0%} {best['acceptance_is']}"
    how = f"{best['draft_length']} drafts, {best['top_k_keys']:,} keys"
    extra = best["what"].split(",")[2:]  # ours, acceptance, and what else
    return [
        shape,
        f"{batch} x {context:,}",
        speed(named("transformers generate")),
        speed(named("transformers generate, static cache")),
        speed(named("transformers generate, prompt lookup")),
        speed([record for record in here if record["what"].startswith("ours, dense")]),
        speed([best]),
        f"{best['ratio']:.2f}x",
        accepted,
        f"{best['tokens_per_pass']:.2f}",
        best["same_as_transformers"],
        ",".join([how, *extra]),
    ]


def _speed(record: Record) -> float:
    return record["tokens_per_s"]["median"]


# Kernels


def kernels(results: Path) -> list[str]:
    return _each(results, "kernels", _kernels)


def _kernels(about: Record, records: list[Record]) -> list[str]:
    """Of each op its smallest and its largest size; how many sizes are won is of all."""
    head = ("op", "model", "size", "ours, ms", "GB/s", "of a copy's", "best rival", "its ms",
            "ours takes")  # fmt: skip
    points: dict[tuple, dict[str, Record]] = {}
    for record in records:
        if record["status"] == "ok" and record["op"] != "copy":
            where = (record["op"], record.get("shape", ""), record["size"])
            points.setdefault(where, {})[record["what"]] = record
    pairs: dict[str, list[tuple[Record, Record]]] = {}
    for (op, *_), point in points.items():
        rivals = [record for what, record in point.items() if what != "ours"]
        if "ours" in point and rivals:
            best = min(rivals, key=lambda one: one["cold_ms"])
            pairs.setdefault(op, []).append((point["ours"], best))
    rows = []
    for mine in pairs.values():
        mine.sort(key=lambda pair: pair[0]["cold_ms"] * pair[0]["gb_per_s"])  # bytes
        ends = [mine[0], mine[-1]] if len(mine) > 1 else mine
        rows += [_kernel_cells(*pair) for pair in ends]
    every = [pair for mine in pairs.values() for pair in mine]
    won = sum(ours["cold_ms"] <= rival["cold_ms"] for ours, rival in every)
    if not rows:
        return []
    return [
        f"**The ops, measured** on {in_words(about)} (`python -m bench kernels`). Ours is the "
        f"fastest at {won} of {len(every)} sizes; here are the smallest and the largest of each "
        "op, beside the best rival of that size.",
        "",
        *markdown_table(head, rows),
    ]


def _kernel_cells(ours: Record, rival: Record) -> list[str]:
    return [
        f"`{ours['op']}`",
        ours.get("shape", "-"),
        ours["size"],
        f"{ours['cold_ms']:.3g}",
        f"{ours['gb_per_s']:.3g}",
        f"{ours['of_copy']:.0%}",
        rival["what"],
        f"{rival['cold_ms']:.3g}",
        f"{ours['cold_ms'] / rival['cold_ms']:.2f}x",
    ]


# The predicted ceiling


def ceiling(results: Path) -> list[str]:
    found, text = _ceilings(results)
    expected, _ = _ceilings(results, _EXPECTED)
    shown = []
    for model, name in MODELS.items():
        size = re.search(rf"^- {model}: .*; (\S+ KiB) of KV cache a token$", text, re.MULTILINE)
        of_cache = f"{size[1]} of KV cache a token" if size else "?"
        shown.append([f"{name} ({of_cache})", "ceiling", *found[model].values()])
        shown.append(["", "expected", *expected[model].values()])
    head = ["predicted, bfloat16 / 4-bit drafts", "", f"{CELLS[0]} tokens", *CELLS[1:]]
    return markdown_table(head, shown)


# What a GPU has no room for


def cards(results: Path) -> list[str]:
    """Of `bench roofline --link` the set-up of each model and GPU, over the GPU's own PCIe."""
    path = results / LINKED
    text = path.read_text(encoding="utf-8")
    head, *rows = _rows(text.partition(f"## {WHICH}")[2].partition("\n## ")[0])
    if head[:3] != ["model", "GPU", "link"]:
        raise Unclear(f"{path} has no table of models, GPUs and links, {WHICH}")
    shown = [
        [model, f"{gpu}, {GPUS[gpu].memory >> 30} GB, {link}", *cells]
        for model, gpu, link, *cells in rows
        if link == f"pcie{GPUS[gpu].pcie}"
    ]
    terms = re.search("^PREDICTED.*: (.*)$", text, re.MULTILINE)
    links = re.findall(r"^- (pcie\d: \d+ GB/s) \(", text, re.MULTILINE)
    if terms is None or not links:
        raise Unclear(f"{path} does not say what it takes for granted")
    said = f"Predicted, not measured: bfloat16, {terms[1].removesuffix('.')}; {', '.join(links)}."
    return [*markdown_table(["predicted", "GPU", *head[3:]], shown), "", said]


def _rows(section: str) -> list[list[str]]:
    """Cells of a Markdown table's rows."""
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines]


def _ceilings(
    results: Path, heading: str = "## Predicted speedups"
) -> tuple[dict[str, dict[str, str]], str]:
    """Predicted speedups of `MODELS` at `CELLS` under a heading, and the page that has them."""
    path = results / "roofline.md"
    text = path.read_text(encoding="utf-8")
    section = text.partition(f"{heading}")[2].partition("\n## ")[0]
    rows = _rows(section)
    columns = next((row for row in rows if row[:2] == ["model", "GPU"]), None)
    found = {row[0]: row for row in rows if row[1] == GPU}
    if columns is None or {*MODELS} - {*found} or {*CELLS} - {*columns}:
        raise Unclear(
            f"{path} has no table of models on {GPU} with the columns {CELLS}, {heading}"
        )
    return {m: {cell: found[m][columns.index(cell)] for cell in CELLS} for m in MODELS}, text


# For whom it pays


def pays(results: Path) -> list[str]:
    """The shortest and the longest clip of the demo, and a model on a GPU alone and in a batch."""
    rows = []
    for about, records in files(results, "demo"):
        auto = [r for r in records if r["status"] == "ok" and r["draft_length"] == "auto"]
        auto.sort(key=lambda one: one["seconds"])
        rows += [_pays_cells(about, record) for record in (auto[0], auto[-1])] if auto else []
    first, *_, last = MODELS
    found, _ = _ceilings(results)
    expected, _ = _ceilings(results, _EXPECTED)
    for model, cell in ((first, CELLS[0]), (first, CELLS[2]), (last, CELLS[0])):
        gain, most = (max(x[model][cell].split(" / "), key=_times) for x in (expected, found))
        where = f"{MODELS[model]}, {cell} video tokens, one {GPU.upper()}"
        told = f"{gain} over our dense path, by drafts; ceiling {most}"
        rows.append([where, told, "predicted"])
    measured = [
        f"{in_words(about)}, float32, batch 1, {about['top_k_keys']} keys a draft, medians of "
        f"{about['repeat']} runs"
        for about, _ in files(results, "demo")
    ]
    where = f"Measured: {'; '.join(measured)}. " if measured else ""
    where += "Predicted: bfloat16, acceptance 0.9, 1,024 keys a draft, the best draft length, own "
    where += "or 4-bit draft weights, whichever gain more."
    return [*markdown_table(["you have", "speed", "known how"], rows), "", where]


def _times(speedup: str) -> float:
    """Of "2.11x*, 2 GPUs"."""
    return float(speedup.partition("x")[0])


def _pays_cells(about: Record, record: Record) -> list[str]:
    drafts = record["over_dense_path"]
    share = "" if drafts is None else f", of which {drafts:.2f}x by drafts"
    return [
        f"the demo model (2.9M), one clip of {record['video_tokens']:,} video tokens, "
        f"{about['device']}, {about['threads']} threads",
        f"{record['over_unpatched']:.2f}x over unpatched{share}",
        "measured",
    ]


TABLES: dict[str, Callable[[Path], list[str]]] = {
    "demo": demo,
    "decode": decode,
    "kernels": kernels,
    "prefill": prefill,
    "promises": promises,
    "real": real,
    "real-short": real_short,
    "offload": offload,
    "ceiling": ceiling,
    "cards": cards,
    "pays": pays,
}

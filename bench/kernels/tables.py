"""What `bench kernels` found, as a table, Markdown and a picture."""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path
from typing import Any

from bench.kernels.results import Results
from bench.records import Record
from std_decode.app.output import replace_file

HEADER = ("model", "op", "size", "what", "cold us", "p20", "p80", "graph us", "GB/s", "of copy",
          "ours takes", "note")  # fmt: skip
# Of a figure's curves: the sizes that are nearest to these.
TOKENS, KEYS = 4, 1024


def show(results: Results, path: Path | None) -> None:
    """Prints the table; writes it and the picture beside the records at `path`."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(escape(headline(results.about)))
    console.print(table(results))
    if path is None:
        return
    replace_file(path.with_suffix(".md"), markdown(results).encode())
    written = [path, path.with_suffix(".md")]
    picture = draw(results)
    if picture is not None:
        replace_file(path.with_suffix(".png"), picture)
        written.append(path.with_suffix(".png"))
    console.print(f"written to {', '.join(map(str, written))}", soft_wrap=True)


def headline(about: Record) -> str:
    """Where and with what, in a sentence."""
    if "gpu" in about:
        where = f"{about['gpu']}, driver {about['driver']}, CUDA {about['cuda']}"
    else:
        threads = f"{about['threads']} thread{'s' * (about['threads'] > 1)}"
        where = f"{about['cpu']}, {threads}, {about['instructions']}"
    absent = f"; not installed: {', '.join(about['absent'])}" if about["absent"] else ""
    return (
        f"{where}; {about['dtype']}; torch {about['torch']}, triton {about['triton']}, Python "
        f"{about['python']}; commit {(about['commit'] or 'unknown')[:12]}, {about['date']}{absent}"
    )


def cells(record: Record) -> list[str]:
    head = [record["shape"] or "-", record["op"], record["size"], record["what"]]
    if record["status"] != "ok":
        return [*head, *["-"] * (len(HEADER) - 5), record["status"]]
    names = ("cold_ms", "cold_p20_ms", "cold_p80_ms", "graph_ms")
    micro = [record.get(name, math.nan) * 1e3 for name in names]
    times = ["-" if math.isnan(us) else f"{us:.1f}" for us in micro]
    ours = f"{record['ours_takes']:.2f}x" if "ours_takes" in record else "-"
    share = f"{record['of_copy']:.0%}"
    return [*head, *times, f"{record['gb_per_s']:.1f}", share, ours, record["note"]]


def table(results: Results) -> Any:
    from rich.markup import escape
    from rich.table import Table

    shown = Table()
    for name in HEADER:
        shown.add_column(name, no_wrap=name in ("op", "what"))
    for record in results.rows:
        style = {"ours": "bold"}.get(record["what"])
        style = "red" if record["status"].startswith(("wrong", "failed")) else style
        shown.add_row(*map(escape, cells(record)), style=style)
    return shown


def markdown(results: Results) -> str:
    lines = [
        "# Kernels beside their rivals",
        "",
        f"{headline(results.about)}.",
        "",
        "What is timed, and how: `python -m bench kernels --help`. Above 1x in the column \"ours "
        "takes\" the rival is faster.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
    ]  # fmt: skip
    for record in results.rows:
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells(record)) + " |")
    return "\n".join(lines) + "\n"


def draw(results: Results) -> bytes | None:
    """Time against N as a PNG, an op a row, a batch a column; None where it cannot be drawn.

    Of the first model, with as many query tokens and selected keys as are nearest to 4 and 1024.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    known = [r for r in results.rows if r["status"] == "ok" and r["context"]]
    if not known:
        return None
    model = known[0]["shape"]
    known = _nearest([record for record in known if record["shape"] == model])
    copy = next(r["gb_per_s"] for r in results.rows if r["op"] == "copy")
    batches = sorted({record["batch"] for record in known})
    wanted = list(dict.fromkeys((record["op"], batch) for record in known for batch in batches))
    columns = len(batches) if len(batches) > 1 else min(3, len(wanted))
    lines = -(-len(wanted) // columns)
    figure = Figure(figsize=(1.5 + 4.2 * columns, 0.9 + 2.7 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    names = list(dict.fromkeys(record["what"] for record in known))
    colours = {name: f"C{index % 10}" for index, name in enumerate(names)}
    for (op, batch), panel in zip(wanted, panels):  # wanted first: it ends before panels do
        here = [r for r in known if (r["op"], r["batch"]) == (op, batch)]
        _panel(panel, here, copy, colours)
        panel.set_title(_title(op, batch, here), fontsize=9)
        panel.set(xlabel="N, keys in the cache", ylabel="ms")
    for panel in panels:  # the rest of the last line
        panel.remove()
    about = results.about
    figure.suptitle(f"{model} on {about.get('gpu') or about.get('cpu')}, {about['dtype']}; "
                    "dotted: the bytes at a copy's bandwidth", fontsize=10)  # fmt: skip
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def _nearest(records: list[Record]) -> list[Record]:
    """Of each op one number of query tokens and one of selected keys."""
    kept = []
    for op in dict.fromkeys(record["op"] for record in records):
        here = [record for record in records if record["op"] == op]
        for name, wanted in (("tokens", TOKENS), ("keys", KEYS)):
            best = min({r[name] for r in here}, key=lambda value: abs(value - wanted))
            here = [record for record in here if record[name] == best]
        kept += here
    return kept


def _title(op: str, batch: int, records: list[Record]) -> str:
    parts = [f"B {batch}"]
    for name, field in (("T", "tokens"), ("K", "keys")):
        parts += [f"{name} {r[field]}" for r in records[:1] if r[field]]
    return f"{op}, {', '.join(parts)}"


def _panel(panel: Any, records: list[Record], copy: float, colours: dict[str, str]) -> None:
    for name in dict.fromkeys(record["what"] for record in records):
        curve = sorted((r["context"], r["cold_ms"]) for r in records if r["what"] == name)
        panel.plot(*zip(*curve), marker="o", markersize=3, label=name, color=colours[name],
                   linewidth=2.2 if name == "ours" else 1.1)  # fmt: skip
    least = sorted({(r["context"], r["bytes"] / copy / 1e6) for r in records})
    if least:
        panel.plot(*zip(*least), color="0.4", linestyle=":", linewidth=1)
        ticks = sorted({record["context"] for record in records})
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(ticks, [_short(tick) for tick in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)


def _short(number: int) -> str:
    return f"{number // 1024}k" if number % 1024 == 0 else str(number)

"""One page of plots for each results file of `bench decode` and `bench kernels`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.environment import in_words
from bench.records import Record, read
from std_decode.app.output import new_figure, png, replace_file

_WIDTH, _HEIGHT = 4.4, 3.4
Panel = Callable[[Any], None]


def write(path: Path) -> Path | None:
    """Draw a file's page beside it; None if matplotlib is missing or there is nothing to draw."""
    figure = page(path) if find_spec("matplotlib") is not None else None
    if figure is None:
        return None
    # `bench kernels` draws a page of its own.
    name = f"{path.stem}-roofline.png" if _is_of_kernels(path) else f"{path.stem}.png"
    replace_file(path.with_name(name), png(figure))
    return path.with_name(name)


def page(path: Path) -> Any:
    """A file's figure; None if nothing was timed."""
    about, *records = read(path)
    timed = [record for record in records if record.get("status") == "ok"]
    draw = kernel_panels if _is_of_kernels(path) else decode_panels
    rows = [row for row in draw(timed, about) if row]
    if not rows:
        return None
    columns = max(map(len, rows))
    figure = new_figure(_WIDTH * columns, _HEIGHT * len(rows) + 0.4, dpi=90)
    for number, row in enumerate(rows):
        for column, panel in enumerate(row):
            panel(figure.add_subplot(len(rows), columns, number * columns + column + 1))
    figure.suptitle(in_words(about), fontsize=8)
    return figure


def _is_of_kernels(path: Path) -> bool:
    return path.name.startswith("kernels-")


def grouped(records: Iterable[Record], *names: str) -> dict[tuple, list[Record]]:
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record.get(name) for name in names), []).append(record)
    return groups


# Decoding


def decode_panels(records: list[Record], about: Record) -> list[list[Panel]]:
    """A row for each model: time against N, roofline, speedups, acceptance against K."""
    rows: list[list[Panel]] = []
    for (shape,), mine in grouped(records, "shape").items():
        decoded = [record for record in mine if record["kind"] == "decode"]
        drafting = [record for record in decoded if record.get("draft_length")]
        measured = [record for record in drafting if record["acceptance_is"] == "measured"]
        passes = [{**r, "moved": r["bytes"]} for r in mine if r["kind"] == "pass"]
        drawn: list[tuple[Callable[..., None], Any]] = [
            (_against_context, decoded),
            (partial(_roofline, about=about), grouped(passes, "pass")),
            (_speedups, drafting),
            (_acceptance, measured),
        ]
        rows.append([partial(draw, title=shape, records=x) for draw, x in drawn if x])
    return rows


def _against_context(axes: Any, title: str, records: list[Record]) -> None:
    """The largest batch; of several ways to draft the fastest at each context."""
    batch = max(record["batch"] for record in records)
    mine = [record for record in records if record["batch"] == batch]
    for (what,), of_way in grouped(mine, "what").items():
        best: dict[int, Record] = {}
        for record in of_way:
            here = best.setdefault(record["context"], record)
            best[record["context"]] = min(here, record, key=lambda one: one["ms"])
        points = [best[context] for context in sorted(best)]
        times = [[p[name] for p in points] for name in ("ms", "ms_p20", "ms_p80")]
        contexts = [p["context"] for p in points]
        style = "-" if what.startswith("ours") else "--"
        axes.plot(contexts, times[0], style, marker=".", label=what)
        axes.fill_between(contexts, times[1], times[2], alpha=0.15)
    _scale(axes, f"{title}, batch {batch}", "tokens in the cache, N", "ms a token (p20-p80)")
    axes.legend(fontsize=6)


def _speedups(axes: Any, title: str, records: list[Record]) -> None:
    """Over transformers generate, of the fastest way to draft in each cell."""
    import numpy as np
    from matplotlib.colors import TwoSlopeNorm

    contexts = sorted({record["context"] for record in records})
    batches = sorted({record["batch"] for record in records})
    grid = np.full((len(batches), len(contexts)), np.nan)
    for (context, batch), here in grouped(records, "context", "batch").items():
        best = max(here, key=lambda one: one["ratio"] or 0)
        row, column = batches.index(batch), contexts.index(context)
        grid[row, column] = best["ratio"]
        length = f"\n{best['draft_length']} drafts, {best['accepted_of_drafted']:.0%}"
        axes.text(column, row, f"{best['ratio']:.2f}x{length}", ha="center", va="center",
                  fontsize=7)  # fmt: skip
    norm = TwoSlopeNorm(0, -2, 2)  # white where drafting changes nothing
    axes.imshow(np.log2(grid), norm=norm, cmap="RdBu", origin="lower", aspect="auto", alpha=0.7)
    axes.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts], fontsize=7)
    axes.set_yticks(range(len(batches)), batches, fontsize=7)
    kinds = " and ".join(sorted({record["acceptance_is"] for record in records}))
    axes.set_title(
        f"{title}: drafting over transformers generate,\nacceptance {kinds}", fontsize=8
    )
    axes.set_xlabel("tokens in the cache, N", fontsize=7)
    axes.set_ylabel("batch", fontsize=7)


def _acceptance(axes: Any, title: str, records: list[Record]) -> None:
    """At batch 1, or the smallest there is."""
    batch = min(record["batch"] for record in records)
    mine = [r for r in records if r["batch"] == batch]
    mine = [r for r in mine if "int4" not in r["what"]]
    for (context, length), line in grouped(mine, "context", "draft_length").items():
        line = sorted(line, key=lambda one: one["top_k_keys"])
        keys, shares = ([one[n] for one in line] for n in ("top_k_keys", "accepted_of_drafted"))
        axes.plot(keys, shares, marker="o", label=f"N {context:,}, {length} drafts a round")
    _scale(axes, f"{title}, batch {batch}", "keys a draft reads, K", "drafts accepted, measured",
           linear=True)  # fmt: skip
    axes.set_ylim(0, 1.03)
    axes.legend(fontsize=6)


def _roofline(axes: Any, title: str, records: dict[tuple, list[Record]], about: Record) -> None:
    """Times over bytes that must be moved; a copy of as many takes what the line says."""
    for (name,), points in records.items():
        xs, ys = [r["moved"] / 1e9 for r in points], [r["ms"] for r in points]
        axes.plot(xs, ys, "o", ms=3, label=name)
    moved = [r["moved"] / 1e9 for points in records.values() for r in points]
    if about.get("copy_gb_per_s"):
        ends = [min(moved), max(moved)]
        axes.plot(ends, [1e3 * x / about["copy_gb_per_s"] for x in ends], "k-", lw=1,
                  label="a large copy's bandwidth")  # fmt: skip
    _scale(axes, f"{title}: roofline", "GB to be moved", "ms")
    axes.legend(fontsize=6)


def _scale(axes: Any, title: str, x: str, y: str, linear: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis,) if linear else (axes.xaxis, axes.yaxis):
        (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_title(title, fontsize=8)
    axes.set_xlabel(x, fontsize=7)
    axes.set_ylabel(y, fontsize=7)
    axes.tick_params(labelsize=6)
    axes.grid(alpha=0.3)


def kernel_panels(records: list[Record], about: Record) -> list[list[Panel]]:
    """All ops of ours on the roofline."""
    ours = [r for r in records if r["what"] == "ours" and r.get("gb_per_s")]
    moved = [{**r, "ms": r["cold_ms"], "moved": 1e6 * r["gb_per_s"] * r["cold_ms"]} for r in ours]
    points = grouped(moved, "op")
    copies = [r["gb_per_s"] for r in records if r["what"] == "copy"]
    known = {"copy_gb_per_s": copies[0] if copies else None, **about}
    return [[partial(_roofline, title="ours", records=points, about=known)]] if points else []

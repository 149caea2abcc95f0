"""The map of speedups that `bench roofline --sweep` draws, and its numbers."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.roofline.cells import make_cell
from bench.roofline.devices import GIB, GPUS
from bench.roofline.predictions import USABLE
from bench.roofline.tables import write
from bench.roofline.words import WAYS, assumptions, in_words
from std_decode.app.output import new_figure, png

_CONTOURS: dict[float, Any] = {1.0: "solid", 1.5: "dashed", 2.0: "dotted"}
_LEAST, _MOST = 0.5, 8.0  # where the colours end


def draw(options: argparse.Namespace, model: str, gpu: str) -> Iterator[str]:
    """Writes the picture and its numbers; yields what to tell."""
    found = numbers(options, model, gpu)
    path = options.out / f"roofline-{model}-{gpu}.png"
    write(path, picture(options, found))
    yield f"{in_words(options)}; {model} on {found['gpus']} x {gpu}"
    for way in WAYS.values():
        panel = found[way]
        fits = [one for row in panel["fits"] for one in row]
        gains = [one for row in panel["speedup"] for one in row]
        yield (
            f"{way}: {min(gains):.2f}x to {max(gains):.2f}x; "
            f"{fits.count(False)} of {len(fits)} cells do not fit into memory (hatched)"
        )
    yield f"written to {path}"
    path = path.with_suffix(".json")
    write(path, _compact(found).encode())
    yield f"written to {path}"


def numbers(options: argparse.Namespace, model: str, gpu: str) -> dict[str, Any]:
    """Lists of rows, one for each batch, of a number for each context.

    The speedup is that of drafting, under 1 where not drafting is better.
    """
    first = make_cell(options, model, gpu, options.batch[0], options.context[0])
    found: dict[str, Any] = {**assumptions(options), "model": model, "gpu": gpu}
    found |= {"gpus": first.gpus, "batch": options.batch, "context": options.context}
    for four_bit, way in WAYS.items():
        panel: dict[str, Any] = {"speedup": [], "draft_length": [], "fits": []}
        for batch in options.batch:
            cells = [replace(first, batch=batch, context=context) for context in options.context]
            best = [
                cell.drafting(four_bit, options.acceptance, options.draft_length) for cell in cells
            ]
            panel["speedup"].append([round(one.speedup, 4) for one in best])
            panel["draft_length"].append([one.drafts for one in best])
            panel["fits"].append([cell.fits(GPUS[gpu], four_bit) for cell in cells])
        found[way] = panel
    return found


def _compact(found: dict[str, Any]) -> str:
    """JSON with one line for each row of numbers."""
    innermost = re.compile(r"\[[^][{}]*\]")
    text = json.dumps(found, indent=1)
    return innermost.sub(lambda row: json.dumps(json.loads(row[0])), text) + "\n"


def picture(options: argparse.Namespace, found: dict[str, Any]) -> bytes:
    """PNG."""
    import numpy as np
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    batches, contexts = found["batch"], found["context"]
    width = max(4.8, 0.5 * len(contexts) + 1)
    figure = new_figure(2 * width + 1, max(3.6, 0.36 * len(batches) + 1.9), dpi=90)
    panels = figure.subplots(1, 2, sharey=True)
    norm = TwoSlopeNorm(0, *np.log2([_LEAST, _MOST]))  # white where drafting changes nothing
    for axes, way in zip(panels, WAYS.values()):
        speedup = np.array(found[way]["speedup"])
        image = axes.imshow(
            np.log2(speedup), norm=norm, cmap="RdBu", origin="lower", aspect="auto"
        )
        for level, style in _CONTOURS.items():
            if speedup.min() < level < speedup.max():
                axes.contour(speedup, [level], colors="black", linestyles=style, linewidths=1.5)
        for row, column in np.ndindex(*speedup.shape):
            value = speedup[row, column]
            dark = not 0.7 < value < 3
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7,
                      color="white" if dark else "black")  # fmt: skip
            if not found[way]["fits"][row][column]:
                corner = (column - 0.5, row - 0.5)
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="///", ec="0.6", lw=0))
        axes.set_title(way, fontsize=10)
        axes.set_xticks(range(len(contexts)), [_short(value) for value in contexts], fontsize=8)
        axes.set_yticks(range(len(batches)), [str(value) for value in batches], fontsize=8)
        axes.set_xlabel("context, cached tokens a row")
    panels[0].set_ylabel("batch, rows")
    bar = figure.colorbar(image, ax=panels, ticks=[-1, 0, 1, 2, 3], extend="both")
    bar.ax.set_yticklabels(["0.5x", "1x", "2x", "4x", "8x"])
    lines = [Line2D([], [], color="black", linestyle=style) for style in _CONTOURS.values()]
    names = [f"{level:g}x" for level in _CONTOURS]
    figure.legend(lines, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    memory = found["gpus"] * GPUS[found["gpu"]].memory / GIB
    figure.suptitle(
        f"{in_words(options)}\nspeedup over dense decoding, {found['model']} on {found['gpus']} x "
        f"{found['gpu']}; hatched: does not fit into {USABLE:.0%} of {memory:g} GiB",
        fontsize=9,
    )
    return png(figure)


def _short(tokens: int) -> str:
    return f"{tokens // 1000}k" if tokens % 1000 == 0 else str(tokens)

"""One page of plots from the figures that `run.py` writes."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np

from std_decode.app.output import new_figure
from std_decode.app.sparsity.measure import SWEEP_DRAFT_LENGTH
from std_decode.costs.workload import expected_tokens

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
_Z = 1.96  # of a 95% interval


def draw(found: dict[str, Any]) -> Any:
    """A matplotlib figure of 2 x 3 panels.

    Args:
        found: as in the JSON file.
    """
    figure = new_figure(13.5, 8.2)
    (mass, heat, agreement), (tokens, speed, words) = figure.subplots(2, 3)
    _mass(mass, found)
    figure.colorbar(_heat(heat, found), ax=heat, label="share of attention kept")
    _agreement(agreement, found)
    _tokens(tokens, found)
    _speed(speed, found)
    _words(words, found)
    figure.suptitle(
        f"How sparse is its attention, and does drafting by it pay?  {found['about']}\n"
        f"{found['prompt_tokens']:,} prompt tokens, of which {found['candidates']:,} compete; "
        f"{found['answer_tokens']} answer tokens; {found['decoding']}, {found['dtype']}, "
        f"{found['hardware']}",
        fontsize=11,
    )
    return figure


def _sweep(found: dict[str, Any]) -> list[int]:
    return [point["top_k_keys"] for point in found["keys"]]


def _by_head(kept: dict) -> np.ndarray:
    """A value for each layer's every KV head, ``[layers * Hkv]``."""
    return np.concatenate([np.asarray(values) for values in kept.values()])


def _keys_axis(axes: Any, found: dict[str, Any]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(_sweep(found), [f"{keys:,}" for keys in _sweep(found)], rotation=45)
    axes.minorticks_off()
    axes.set_xlabel("K, keys a draft selects per layer and KV head")
    axes.axvline(found["suggestion"]["top_k_keys"], color=GREEN, linewidth=1, linestyle="dashed")
    axes.grid(alpha=0.3)


def _mass(axes: Any, found: dict[str, Any]) -> None:
    sweep = _sweep(found)
    kept = np.stack([_by_head(point["attention_kept"]) for point in found["keys"]])
    best = np.stack([_by_head(point["attention_kept_by_best"]) for point in found["keys"]])
    text = _by_head(found["attention_kept_by_text"]).mean()
    axes.plot(sweep, best.mean(1), color=ORANGE, marker="s", ms=4, linestyle="dashed",
              label="the K best in hindsight, mean")  # fmt: skip
    axes.plot(sweep, kept.mean(1), color=BLUE, marker="o", ms=4, label="the K selected, mean")
    axes.fill_between(sweep, kept.min(1), kept.max(1), color=BLUE, alpha=0.15, linewidth=0,
                      label="the K selected, all heads")  # fmt: skip
    axes.axhline(text, color=GREY, linestyle="dotted", label="text alone, mean")
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("share of attention kept, text included")
    axes.set_title("attention that a draft's keys keep", fontsize=10)
    _keys_axis(axes, found)
    axes.legend(fontsize=8, loc="lower right")


def _heat(axes: Any, found: dict[str, Any]) -> Any:
    layers = found["keys"][0]["attention_kept"]
    heads = len(next(iter(layers.values())))
    values = np.stack([_by_head(point["attention_kept"]) for point in found["keys"]], axis=1)
    image = axes.imshow(values, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    if values.size <= 120:
        for row, column in np.ndindex(*values.shape):
            value = values[row, column]
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7,
                      color="black" if value > 0.6 else "white")  # fmt: skip
    sweep = _sweep(found)
    axes.set_xticks(range(len(sweep)), [f"{keys:,}" for keys in sweep], rotation=45)
    names = [f"{layer}.{head}" if heads > 1 else f"{layer}" for layer in layers
             for head in range(heads)]  # fmt: skip
    step = -(-len(names) // 28)
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=7)
    axes.set_xlabel("K, keys a draft selects per layer and KV head")
    axes.set_ylabel("layer.KV head" if heads > 1 else "layer")
    axes.set_title("the same by layer and KV head", fontsize=10)
    return image


def _interval(share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95% interval of a share seen in `count` trials."""
    centre = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    spread = _Z * np.sqrt(share * (1 - share) / count + (_Z / (2 * count)) ** 2)
    spread = spread / (1 + _Z**2 / count)
    return centre - spread, centre + spread


def _agreement(axes: Any, found: dict[str, Any]) -> None:
    sweep = _sweep(found)
    share = np.array([point["agreement"] for point in found["keys"]])
    count = np.array([point["drafted"] for point in found["keys"]])
    axes.fill_between(sweep, *_interval(share, count), color=BLUE, alpha=0.15, linewidth=0,
                      label="95% interval (Wilson)")  # fmt: skip
    axes.plot(sweep, share, color=BLUE, marker="o", ms=4, label="measured")
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("share of next tokens")
    axes.set_title("sparse model's next token = dense model's", fontsize=10)
    _keys_axis(axes, found)
    axes.text(
        0.98, 0.03, f"{count[0]} tokens of the dense answer,\n"
        f"drafted {SWEEP_DRAFT_LENGTH} a round after the right ones",
        transform=axes.transAxes, fontsize=8, color=GREY, ha="right",
    )  # fmt: skip
    axes.legend(fontsize=8, loc="center right")


def _drafts_axis(axes: Any, found: dict[str, Any]) -> None:
    lengths = [point["draft_length"] for point in found["draft_lengths"]]
    axes.set_xticks(lengths)
    axes.set_xlabel(r"draft length $\gamma$, tokens drafted a round")
    suggested = found["suggestion"]["draft_length"]
    axes.axvline(suggested, color=GREEN, linewidth=1, linestyle="dashed")
    axes.grid(alpha=0.3)


def _tokens(axes: Any, found: dict[str, Any]) -> None:
    points = found["draft_lengths"]
    lengths = np.array([point["draft_length"] for point in points])
    measured = [point["tokens_per_pass"] for point in points]
    keys = found["suggestion"]["top_k_keys"]
    agreement = next(p["agreement"] for p in found["keys"] if p["top_k_keys"] == keys)
    every = range(lengths[-1] + 1)
    axes.plot(lengths, lengths + 1, color=GREY, linestyle="dotted", label="all accepted")
    axes.plot(every, [expected_tokens(agreement, g) for g in every], color=ORANGE,
              linestyle="dashed", label=f"expected at {agreement:.1%} agreement")  # fmt: skip
    axes.plot(lengths, measured, color=BLUE, marker="o", linestyle="none", label="measured")
    for point in points[1:]:
        axes.annotate(
            f"{point['acceptance'] or 0:.0%}", (point["draft_length"], point["tokens_per_pass"]),
            xytext=(4, -11), textcoords="offset points", fontsize=8, color=BLUE,
        )  # fmt: skip
    axes.set_ylim(0, 1.08 * (lengths[-1] + 1))
    axes.set_xlim(right=1.08 * lengths[-1])
    axes.set_ylabel("tokens per dense pass")
    axes.set_title(f"acceptance (blue) and tokens per dense pass, K = {keys:,}", fontsize=10)
    _drafts_axis(axes, found)
    axes.legend(fontsize=8, loc="upper left")


def _speed(axes: Any, found: dict[str, Any]) -> None:
    points = found["draft_lengths"]
    dense = points[0]["tokens_per_second"]
    gains = found["speedup_by_draft_length"]
    axes.axhline(1, color=GREY, linestyle="dotted", label=f"dense, {dense:,.1f} tokens/s")
    axes.plot([int(g) for g in gains], list(gains.values()), color=ORANGE, linestyle="dashed",
              label="expected tokens / round time")  # fmt: skip
    axes.plot(
        [point["draft_length"] for point in points],
        [point["tokens_per_second"] / dense for point in points],
        color=BLUE, marker="o", linestyle="none", label="measured",
    )  # fmt: skip
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.set_ylabel("decoding speed, x dense")
    axes.set_title("what drafting gains on this machine", fontsize=10)
    _drafts_axis(axes, found)
    axes.legend(fontsize=8, loc="lower left")


def _words(axes: Any, found: dict[str, Any]) -> None:
    suggestion = found["suggestion"]
    axes.axis("off")
    head = (
        f"suggested\n  top_k_keys = {suggestion['top_k_keys']}\n"
        f"  draft_length = {suggestion['draft_length']}"
    )
    axes.text(0, 1, head, va="top", fontsize=12, color=GREEN, transform=axes.transAxes,
              family="monospace", weight="bold")  # fmt: skip
    answer = " ".join(found["answer"].split())
    said = textwrap.shorten(answer, 150, placeholder=" ...")
    text = [suggestion["why"], "Dashed green lines mark the suggestion.", f'Answer: "{said}"']
    wrapped = "\n\n".join(textwrap.fill(one, 52) for one in text)
    axes.text(0, 0.72, wrapped, va="top", fontsize=9, transform=axes.transAxes,
              parse_math=False)  # fmt: skip

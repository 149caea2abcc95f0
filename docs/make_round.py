"""Draw docs/round.png, one round of the method: ``python docs/make_round.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from std_decode.app.output import new_figure, png

PAGE = Path(__file__).parent / "round.png"
TEXT, VIDEO, KEYS = 6, 38, 50  # of the text before the video, of the video, of the whole cache
CHOSEN = (9, 17, 18, 27, 33, 40)
DRAFTED, DENSE, AGREED = ("the", "red", "car", "stops"), ("the", "red", "car", "turns", "…"), 3
READ, UNREAD, KEPT, DROPPED = "#2f6fd0", "#e3e6ea", "#2e9e5b", "#b9bfc7"


def keys(axes: Any, y: float, count: int, read: Any) -> None:
    for key in range(count):
        colour = READ if read(key) else UNREAD
        axes.add_patch(_box(key, y, 0.8, 0.72, colour))


def words(axes: Any, y: float, said: tuple[str, ...], colours: list[str], ink: str) -> None:
    for place, (word, colour) in enumerate(zip(said, colours)):
        axes.add_patch(_box(7 * place, y, 6.4, 0.95, colour))
        axes.text(7 * place + 3.2, y + 0.45, word, ha="center", va="center", color=ink)


def _box(x: float, y: float, width: float, height: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=colour, edgecolor="none")


def draw() -> bytes:
    figure = new_figure(9, 4.2, dpi=120)
    axes = figure.add_subplot()
    axes.set(xlim=(-11, 69), ylim=(13.2, -1.6))
    axes.axis("off")
    for x, label in ((0, "text"), (TEXT + 14, "video"), (TEXT + VIDEO, "question, answer")):
        axes.text(x, -0.7, label, color="#555555", fontsize=9)

    def few(key: int) -> bool:
        return key < TEXT or key >= TEXT + VIDEO or key in CHOSEN

    drafts = len(DRAFTED)
    for draft in range(drafts):
        axes.text(-1, draft + 0.4, f"draft {draft + 1}", ha="right", va="center")
        keys(axes, draft, KEYS + draft, few)
    axes.text(56, 1.8, "a few keys each", va="center")
    axes.text(-1, 4.9, "verify", ha="right", va="center")
    keys(axes, 4.5, KEYS + drafts, lambda key: True)
    axes.text(56, 4.9, "every key, once", va="center")
    axes.text(-1, 7.4, "drafted", ha="right", va="center")
    words(axes, 7, DRAFTED, [DROPPED] * drafts, "black")
    axes.text(-1, 8.8, "dense says", ha="right", va="center")
    kept = [KEPT] * (AGREED + 1) + [DROPPED] * (drafts - AGREED)
    words(axes, 8.4, DENSE, kept, "white")
    axes.text(
        0,
        11.1,
        f"Kept: the {AGREED} drafts that agree and the dense choice after them, {AGREED + 1} "
        "tokens for one dense pass.\nThat pass has scored every key on its way: "
        "the next drafts read those that matter now.",
        va="center",
    )
    return png(figure)


if __name__ == "__main__":
    PAGE.write_bytes(draw())
    print(f"written {PAGE}")

"""What a pretend GPU was asked for, and from where."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

HERE = str(Path(__file__).parent)
ROOT = str(Path(__file__).parents[2])


class Ledger:
    """Counts since the last `clear`.

    Attributes:
        syncs: times that the host waited for the device, by what and from where.
        copies: copies between host and device, "h2d" and "d2h", likewise.
        launches: operators of aten that launch something, and Triton kernels, by name.
        kernels: launches of Triton kernels, by name.
        compilations: variants of Triton kernels that were compiled, name and key.
        captures, replays: of passes; `captured` has the launches in each captured pass.
    """

    def __init__(self) -> None:
        self.installed = False
        self.capturing: Counter | None = None
        self.waited = 0.0  # when the host last waited for all that it had asked for
        self.clear()

    def clear(self) -> None:
        self.syncs: Counter = Counter()
        self.copies: Counter = Counter()
        self.launches: Counter = Counter()
        self.kernels: Counter = Counter()
        self.compilations: list[tuple[str, str]] = []
        self.captured: list[Counter] = []
        self.captures = self.replays = 0

    def sync(self, what: str) -> None:
        self.syncs[what, where()] += 1
        self.waited = time.perf_counter()
        if self.capturing is not None:
            raise RuntimeError(
                f"CUDA error: operation not permitted when stream is capturing ({what})"
            )

    def copy(self, direction: str, what: str) -> None:
        self.copies[direction, what, where()] += 1
        if direction == "d2h":
            self.sync(f"copy to the host: {what}")
        elif self.capturing is not None:
            raise RuntimeError(
                "CUDA error: operation not permitted when stream is capturing (pageable copy)"
            )

    def launch(self, name: str) -> None:
        self.launches[name] += 1
        if self.capturing is not None:
            self.capturing[name] += 1


def where() -> str:
    """The innermost line of this repository's, but for the pretend GPU's own."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and not name.startswith(HERE):
            return f"{name[len(ROOT) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


ledger = Ledger()

"""Where the long runs write their figures."""

from __future__ import annotations

from pathlib import Path

from bench.exactness import HEAD
from bench.sections import write_section


def write(out: Path | None, title: str, text: str) -> None:
    if out is not None:
        write_section(out / "reliability.md", HEAD, title, text)

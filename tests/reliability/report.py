"""Where the long runs write their figures."""

from __future__ import annotations

from pathlib import Path

from bench.sections import RELIABILITY, write_section


def write(out: Path | None, title: str, text: str) -> None:
    if out is not None:
        write_section(out / "reliability.md", RELIABILITY, title, text)

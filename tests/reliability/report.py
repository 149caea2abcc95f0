"""Where the long runs write their figures."""

from __future__ import annotations

from pathlib import Path

from bench.sections import write_section

HEAD = """\
# Reliability

What the long runs found. Each section names its command, and is written by it."""


def write(out: Path | None, title: str, text: str) -> None:
    if out is not None:
        write_section(out / "reliability.md", HEAD, title, text)

"""A results file whose sections are written by several commands, each its own."""

from __future__ import annotations

from pathlib import Path

from std_decode.app.output import replace_file

RELIABILITY = """\
# Reliability

What the long runs found. Each section names its command, and is written by it."""


def write_section(path: Path, head: str, title: str, text: str) -> None:
    """Replace the section under ``## title``, or add it at the end, in one step.

    Args:
        path: a Markdown file, made with `head` before all sections where there is none yet.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_text(encoding="utf-8") if path.exists() else head
    first, *sections = ("\n" + old.strip()).split("\n## ")
    kept = {section.partition("\n")[0]: section.partition("\n")[2] for section in sections}
    kept[title] = f"\n{text.strip()}\n"
    parts = [first.strip(), *(f"## {name}\n\n{body.strip()}" for name, body in kept.items())]
    replace_file(path, ("\n\n".join(parts) + "\n").encode())


def about(device: str = "cpu") -> str:
    """Device, versions, commit and date, for the first line of a section."""
    import torch

    from bench.environment import environment, in_words

    return in_words(environment(torch.device(device)))

"""A results file whose sections are written by several commands, each its own."""

from __future__ import annotations

from pathlib import Path

from std_decode.output import replace_file


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


def about() -> str:
    """Versions, commit and date, for the first line of a section."""
    import datetime
    import subprocess

    import torch
    import transformers

    command = ["git", "describe", "--always", "--dirty"]
    try:
        here = Path(__file__).parent
        commit = subprocess.run(command, capture_output=True, text=True, cwd=here).stdout.strip()
    except OSError:
        commit = ""
    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"commit {commit or 'unknown'}, {datetime.date.today()}"
    )

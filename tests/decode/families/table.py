"""The table of tested models in docs/models.md, made from the list that the tests go through."""

from __future__ import annotations

from tests.decode.families.base import FAMILIES

BEGIN, END = "<!-- models -->", "<!-- end -->"
SEES = {
    "video": "video",
    "frames": "video as images, one a frame",
    "images": "images",
    "text": "text alone",
}


def table() -> str:
    """Markdown, a line for each family: those that see videos first."""
    lines = ["| family | shown | beyond plain attention | transformers |", "|---|---|---|---|"]
    for kind, shown in SEES.items():
        for family in FAMILIES.values():
            if family.sees == kind:
                lines.append(f"| {family.name} | {shown} | {family.special} | {family.since} |")
    return "\n".join(lines)


def in_text(text: str) -> str:
    """The table that stands between the markers in `text`."""
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def written(text: str) -> str:
    """`text` with the present table between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(
            f"docs/models.md has no lines {BEGIN} and {END}; put them where it belongs"
        )
    return f"{before}{begin}\n{table()}\n{end}{after}"

"""The table of tested versions in docs/models.md: a row for each run of tests that has passed.

pytest tests/kernels/test_interpreter.py --tested "kernels, interpreted"   # writes its row
python -m tests.versions "kernels, interpreted"                            # fails without it
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.version import Version

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- versions -->", "<!-- end -->"
PACKAGES = ("torch", "torchvision", "transformers", "triton")
HEAD = "| what ran | Python | torch | torchvision | transformers | Triton |\n|" + 6 * "---|"

Row = tuple[str, ...]  # what ran, Python, PACKAGES; "" where there was none


def here(what: str) -> Row:
    """The row of this environment."""
    return (what, ".".join(map(str, sys.version_info[:2])), *map(_release, PACKAGES))


def _release(package: str) -> str:
    """Without the label of a build: tests that pass beside one are taken to pass beside all."""
    try:
        return Version(version(package)).public
    except PackageNotFoundError:
        return ""


def rows(text: str) -> list[Row]:
    """Those of the page."""
    lines = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()[2:]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


def written(text: str, found: list[Row]) -> str:
    """The page with these rows, sorted, and with what they amount to."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has no lines {BEGIN} and {END}; put them where it belongs")
    table = "\n".join((HEAD, *(f"| {' | '.join(row)} |" for row in sorted(found))))
    page = f"{before}{begin}\n{table}\n{end}{after}"
    return re.sub(r"(\| tested versions \| ).*?( \|)", rf"\g<1>{summary(found)}\g<2>", page)


def summary(found: list[Row]) -> str:
    """The range of each package, as the pages say it."""
    ranges = []
    for name, column in (("torch", 2), ("transformers", 4), ("Triton", 5), ("Python", 1)):
        least, *_, most = sorted(minors(found, column)) * 2
        ranges.append(f"{name} {least[0]}.{least[1]} to {most[0]}.{most[1]}")
    return ", ".join(ranges)


def minors(found: list[Row], column: int) -> set[tuple[int, ...]]:
    """Such as (2, 13): what a bound is about."""
    return {Version(row[column]).release[:2] for row in found if row[column]}


def note(what: str) -> None:
    """Write the row of this environment into the page."""
    text, mine = PAGE.read_text(encoding="utf-8"), here(what)
    # A newer transformers takes the place of the one before.
    others = [row for row in rows(text) if (*row[:4], row[5]) != (*mine[:4], mine[5])]
    PAGE.write_text(written(text, [*others, mine]), encoding="utf-8")


def main() -> int:
    (what,) = sys.argv[1:]
    mine = here(what)
    for row in rows(PAGE.read_text(encoding="utf-8")):
        # What of transformers came out since is in the range, and tested here.
        if row[:4] == mine[:4] and row[5] == mine[5] and Version(row[4]) <= Version(mine[4]):
            print(f"tested: {mine}; the table has {row}")
            return 0
    print(f"{PAGE.name} has no row {mine}; write it: pytest ... --tested {what!r}")
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""Results files: what they were made on, then a record a line, on disk as soon as it is known."""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from std_decode.app.output import replace_file

Record = dict[str, Any]
# Of an environment: what differs from run to run.
_PASSING = ("date", "copy_gb_per_s", "command", "absent")


def file_of(out: Path, command: str, device: str) -> Path:
    """Where a command's results on a device are: one file each."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return out / f"{command}-{name}.jsonl"


def read(path: Path) -> list[Record]:
    """The records of a file; a line that was cut off is none."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


class Journal:
    """A results file that grows record by record.

    Args:
        path: None: keep the records in memory only.
        about: the environment, which comes first.
        complete: with it, what an earlier run of the same environment has written is kept where
            `complete` says so of a record; without it, the file begins anew.

    Attributes:
        resumed: how many records are from the earlier run.
    """

    def __init__(
        self, path: Path | None, about: Record, complete: Callable[[Record], bool] | None = None
    ):
        self.path, self.about = path, about
        earlier: list[Record] = []
        if complete is not None and path is not None and path.exists():
            found = read(path)
            changed = _differences(found[0], about) if found else []
            if changed:
                was = ", ".join(f"{name} {found[0].get(name)}" for name in changed)
                print(f"bench: {path} was made with {was}; beginning anew", file=sys.stderr)
            elif found:
                self.about = found[0]
                earlier = [record for record in found[1:] if complete(record)]
        self.resumed = len(earlier)
        self.records: list[Record] = [self.about, *earlier]
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, "".join(map(line_of, self.records)).encode())

    def keep(self, record: Record) -> None:
        self.records.append(record)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line_of(record))


def line_of(record: Record) -> str:
    return json.dumps(record) + "\n"


def failure(error: BaseException) -> str:
    """An exception in one line, as the status of a record; where it came from goes to stderr."""
    traceback.print_exception(error, limit=-12, file=sys.stderr)
    said = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # Triton's compiler begins with a place in the kernel, "at 7:12:", and ends with what is wrong.
    what = said[-1] if re.fullmatch(r"at \d+:\d+:", said[0]) else said[0]
    return f"failed: {type(error).__name__}: {what}"[:300]


def _differences(one: Record, other: Record) -> list[str]:
    """In what two environments differ for good."""
    names = dict.fromkeys((*one, *other))
    return [n for n in names if n not in _PASSING and one.get(n) != other.get(n)]


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(x.replace("|", "/") for x in row) + " |" for row in rows]

"""What `bench kernels` found, on disk as soon as it is known."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.kernels_points import Point
from std_decode.output import replace_file

Record = dict[str, Any]
SKIPPED = "skipped: "
# Records that were made with another one of these are not gone on from.
SAME = ("gpu", "cpu", "threads", "driver", "torch", "triton", "commit", "dtype")


def load(path: Path) -> list[Record]:
    """The records of a file, whose last line may have been cut off."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def differences(one: Record, other: Record) -> list[str]:
    """In what two settings differ."""
    return [name for name in SAME if one.get(name) != other.get(name)]


class Results:
    """Records in the order in which they came; the first says where and with what."""

    def __init__(
        self,
        path: Path | None,
        environment: Record,
        resume: bool = False,
        kept: Callable[[Record], bool] = lambda record: record["status"] == "ok",
    ):
        """`kept`: what is gone on from; the rest, failures for instance, gets another chance."""
        self.path = path
        self.records = [environment]
        self.resumed = 0
        found = load(path) if path is not None and resume else []
        changed = differences(found[0], environment) if found else []
        if changed:
            was = ", ".join(f"{name} {found[0].get(name)}" for name in changed)
            print(f"bench: {path} was made with {was}; beginning anew", file=sys.stderr)
        elif found:
            self.records = [found[0], *filter(kept, found[1:])]
            self.resumed = len(self.records) - 1
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(record) + "\n" for record in self.records)
            replace_file(path, text.encode())

    def keep(self, record: Record) -> None:
        self.records.append(record)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def timed(self, point: Point) -> set[str]:
        """What of a point has been timed."""
        return {r["what"] for r in self.of(point) if r["status"] == "ok"}

    def of(self, point: Point) -> list[Record]:
        fields = point._asdict().items()
        return [r for r in self.rows if all(r.get(name) == value for name, value in fields)]

    @property
    def environment(self) -> Record:
        return self.records[0]

    @property
    def rows(self) -> list[Record]:
        return self.records[1:]

    @property
    def wrong(self) -> list[Record]:
        """Of ours: what failed or is not right."""
        return [
            record
            for record in self.rows
            if record["what"] == "ours"
            and not record["status"].startswith(("ok", SKIPPED.strip()))
        ]


def failure(error: BaseException) -> str:
    """An exception in one line."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"failed: {type(error).__name__}: {first}"[:300]

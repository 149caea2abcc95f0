"""What `bench kernels` and `bench tune` found, on disk as soon as it is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.kernels.points import Point
from bench.records import Journal, Record

SKIPPED = "skipped: "


class Results(Journal):
    """Records in the order in which they came; the first says where and with what."""

    def __init__(
        self,
        path: Path | None,
        environment: Record,
        resume: bool = False,
        kept: Callable[[Record], bool] = lambda record: record["status"] == "ok",
    ):
        """`kept`: what is gone on from; the rest, failures for instance, gets another chance."""
        super().__init__(path, environment, kept if resume else None)

    def timed(self, point: Point) -> set[str]:
        """What of a point has been timed."""
        return {r["what"] for r in self.of(point) if r["status"] == "ok"}

    def of(self, point: Point) -> list[Record]:
        fields = point._asdict().items()
        return [r for r in self.rows if all(r.get(name) == value for name, value in fields)]

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

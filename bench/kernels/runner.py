"""Point after point: does it fit, is it right, how long does it take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.kernels.ops import MOST_EXCESS, Case, Inputs, copy_case
from bench.kernels.points import Job, Point, reason_to_skip
from bench.kernels.results import SKIPPED, Results
from bench.kernels.timing import measure, measure_all
from bench.records import Record, failure


class Runner:
    """Runs jobs and keeps what they find."""

    def __init__(
        self,
        inputs: Inputs,
        results: Results,
        limit: float,
        clock: Callable[[], float],
        deadline: float | None,
    ):
        self.inputs, self.results, self.limit = inputs, results, limit
        self.clock, self.deadline = clock, deadline
        self.device = inputs.device
        self.copy = 0.0  # GB/s

    def run(self, jobs: Sequence[Job], wanted: Sequence[str] | None) -> None:
        """Of the rivals that a job has, those that are `wanted`; all if that is None."""
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

        self._copy()
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("timing", total=len(jobs))
            for done, job in enumerate(jobs):
                if self.deadline is not None and self.clock() >= self.deadline:
                    self._out_of_time(len(jobs) - done)
                    break
                title = f"{job.point.shape} {job.point.op} {job.point.size}"
                progress.update(task, completed=done, description=title)
                self._job(job, wanted)
            else:
                progress.update(task, completed=len(jobs))

    def _copy(self) -> None:
        copy = copy_case(self.device, 1 << (24 if self.device.type == "cpu" else 29))
        measured = measure(copy.run, self.device)
        self.copy = copy.bytes / measured["cold"][0] / 1e6
        point = Point("copy", "", 0)
        size = f"{copy.bytes / 2e9:.1f} GB"
        self.results.keep({**_where(point), "size": size, **self._figures(copy, "copy", measured)})

    def _out_of_time(self, left: int) -> None:
        self.results.keep({
            **_where(Point("the rest", "", 0)), "size": f"{left} sizes", "what": "ours",
            "status": SKIPPED + "out of time",
        })  # fmt: skip

    def _job(self, job: Job, wanted: Sequence[str] | None) -> None:
        point = job.point

        def say(what: str, status: str, **more: Any) -> None:
            self.results.keep({**_where(point), "what": what, "status": status, **more})

        reason = reason_to_skip(point, self.inputs.dtype.itemsize, self.limit)
        if reason is not None:
            say("ours", SKIPPED + reason)
            return
        try:
            case = self.inputs.case(point)
            chosen = {
                name: rival
                for name, rival in case.rivals.items()
                if (job.rivals is None or name in job.rivals)
                and (wanted is None or name in wanted)
            }
            done = self.results.timed(point)
            if done >= {"ours", *chosen}:
                return
            found = case.check()
        except Exception as error:  # whatever one size runs into must not cost the others
            say("ours", failure(error))
            self._recover()
            return
        if not found <= 1:
            say("ours", f"wrong: error {found:.3g} times what is allowed")
            return
        calls, refused = {"ours": case.run}, {}
        for name, rival in chosen.items():
            if name not in done:
                status, call = self._ready(point, case, rival)
                if call is None:
                    refused[name] = status
                else:
                    calls[name] = call
        self._time(point, case, calls, done)
        for name, status in refused.items():
            say(name, status)

    def _ready(self, point: Point, case: Case, rival: Any) -> tuple[str, Any]:
        """The call of a rival that is as right as can be said, else why there is none."""
        from bench.kernels.points import needed_bytes

        needed = needed_bytes(point, self.inputs.dtype.itemsize) + rival.extra
        if needed > self.limit:
            sizes = f"{needed / 1e9:.1f} GB of {self.limit / 1e9:.1f} GB"
            return f"{SKIPPED}does not fit: needs about {sizes}", None
        try:
            call = rival.prepare()
            result = call()
            if rival.compared and case.check_rival is not None:
                found = case.check_rival(rival, result)
                if not found <= MOST_EXCESS:
                    return f"differs: error {found:.3g} times what ours is allowed", None
        except Exception as error:
            self._recover()
            return failure(error), None
        return "ok", call

    def _time(self, point: Point, case: Case, calls: dict[str, Any], done: set[str]) -> None:
        measured = measure_all(calls, self.device)
        ours = measured["ours"]
        for name, found in measured.items():
            if name == "ours" and name in done and not isinstance(found, Exception):
                continue  # timed once more for the rivals that are new
            record: Record = {**_where(point), "what": name}
            if isinstance(found, Exception):
                record["status"] = failure(found)
                self._recover()
            else:
                record |= self._figures(case, name, found)
                if name != "ours" and not isinstance(ours, Exception):
                    record["ours_takes"] = ours["cold"][0] / found["cold"][0]
            self.results.keep(record)

    def _figures(self, case: Case, what: str, measured: dict[str, Any]) -> Record:
        relaunched = measured.pop("relaunched", None)
        bandwidth = case.bytes / measured["cold"][0] / 1e6
        record: Record = {"what": what, "status": "ok", "bytes": case.bytes}
        for kind, (median, low, high) in measured.items():
            record |= {f"{kind}_ms": median, f"{kind}_p20_ms": low, f"{kind}_p80_ms": high}
        record |= {"gb_per_s": bandwidth, "of_copy": bandwidth / self.copy}
        notes = [case.note if what == "ours" else ""]
        if relaunched is not None:
            notes.append(f"no graph, launched from Python: {relaunched}")
        return record | {"note": "; ".join(filter(None, notes))}

    def _recover(self) -> None:
        """After running out of memory: what is kept for the next point may be too much."""
        self.inputs.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        sys.stderr.flush()


def _where(point: Point) -> Record:
    record: Record = {"kind": "kernel", **point._asdict(), "size": point.size}
    if point.shape:
        model = point.model
        heads = dict(heads=model.heads, kv_heads=model.kv_heads, head_dim=model.head_dim)
        record |= heads
    return record

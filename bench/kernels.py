"""Each op of std_kernels beside its rivals, at the sizes that decide."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.timing import measure


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("kernels", help="time each op beside its rivals")
    add = parser.add_argument
    add("--preset", choices=["round"], default="round", help="which sizes")
    add("--seconds", type=float, default=105.0, metavar="T", help="time box (default 105)")
    add("--out", type=Path, required=True, metavar="DIR", help="where to write")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        print("bench kernels: torch finds no GPU on this machine", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    return 0 if time_ops(options.out, torch.device("cuda"), deadline) else 1


def time_ops(out: Path, device: Any, deadline: float, small: bool = False) -> bool:
    """Times what fits before `deadline` (of time.monotonic); False if anything was wrong."""
    from rich.console import Console

    from bench import ops

    records: list[dict[str, Any]] = []

    def keep(record: dict[str, Any]) -> None:
        records.append(record)
        with open(out / "kernels.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        (out / "kernels.md").write_text(markdown(records), encoding="utf-8")

    (out / "kernels.jsonl").unlink(missing_ok=True)
    copy = ops.copy_case(device, 1 << (16 if small else 29))
    measured = measure(copy.run, device)
    ceiling = copy.bytes / measured["cold"][0] / 1e6
    keep(_record(copy, "copy", measured, ceiling))
    for make in ops.cases(device, small):
        if time.monotonic() > deadline:
            keep({"op": "the rest", "size": "", "what": "ours", "status": _SKIPPED})
            break
        for record in _time_case(make, device, ceiling):
            keep(record)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table(records))
    bad = [r for r in records if r["what"] == "ours" and r["status"] not in ("ok", _SKIPPED)]
    return not bad


_SKIPPED = "skipped: out of time"


def _time_case(make: Callable[[], Any], device: Any, ceiling: float) -> list[dict[str, Any]]:
    try:
        case = make()
        excess = case.check()
    except Exception as error:  # whatever one case runs into must not cost the others
        return [{"op": "?", "size": "?", "what": "ours", "status": f"failed: {error!r}"[:500]}]
    if not excess <= 1:
        status = f"wrong: error {excess:.3g} times what is allowed"
        return [{"op": case.op, "size": case.size, "what": "ours", "status": status}]
    records = []
    for what, call in {"ours": case.run, **case.rivals}.items():
        try:
            records.append(_record(case, what, measure(call, device), ceiling))
        except Exception as error:
            status = f"failed: {str(error).strip().splitlines()[0] if str(error) else error!r}"
            records.append({"op": case.op, "size": case.size, "what": what, "status": status})
    return records


def _record(
    case: Any, what: str, measured: dict[str, list[float]], ceiling: float
) -> dict[str, Any]:
    bandwidth = case.bytes / measured["cold"][0] / 1e6
    record = {"op": case.op, "size": case.size, "what": what, "status": "ok", "bytes": case.bytes}
    for kind, (median, low, high) in measured.items():
        record |= {f"{kind}_ms": median, f"{kind}_p20_ms": low, f"{kind}_p80_ms": high}
    return {**record, "gb_per_s": bandwidth, "of_copy": bandwidth / ceiling, "note": case.note}


_HEADER = ("op", "size", "what", "cold us", "p20", "p80", "graph us", "GB/s", "of copy", "note")


def _cells(record: dict[str, Any]) -> list[str]:
    head = [record["op"], record["size"], record["what"]]
    if record["status"] != "ok":
        return [*head, *["-"] * 6, record["status"][:60]]
    micro = [record.get(name, math.nan) * 1e3 for name in ("cold_ms", "cold_p20_ms",
                                                           "cold_p80_ms", "graph_ms")]  # fmt: skip
    numbers = ["-" if math.isnan(us) else f"{us:.1f}" for us in micro]
    share = f"{record['of_copy']:.0%}"
    return [*head, *numbers, f"{record['gb_per_s']:.0f}", share, record["note"]]


def table(records: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    shown = Table(*_HEADER)
    for record in records:
        shown.add_row(*_cells(record), style="bold" if record["what"] == "ours" else None)
    return shown


def markdown(records: list[dict[str, Any]]) -> str:
    rows = ["| " + " | ".join(_cells(record)) + " |" for record in records]
    head = ["| " + " | ".join(_HEADER) + " |", "|" + "---|" * len(_HEADER)]
    return "\n".join(["# The ops on this GPU", "", *head, *rows]) + "\n"

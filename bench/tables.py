"""What `bench decode` found, on disk as soon as it is known, and as tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from std_decode.output import replace_file

SKIPPED = "skipped: "
FORCED = "Forced acceptance: the share of drafts that agree is an input, not a finding."
_DECODE = (
    "batch", "context", "what", "drafts", "keys", "ms/token", "p20-p80", "tokens/s",
    "vs transformers", "tokens/pass", "asked", "accepted", "peak GB", "first use s", "note",
)  # fmt: skip
_TOKENS = ("batch", "context", "what", "drafts", "keys", "same as transformers",
           "same as ours, dense", "behind")  # fmt: skip
_PASS = (
    "batch", "context", "of", "drafts", "keys", "pass", "ms", "p20-p80", "kernel ms", "idle ms",
    "kernels", "per layer", "GB", "of copy",
)  # fmt: skip


class Results:
    """Records in the order in which they came, also as files of `out` unless that is None."""

    def __init__(self, out: Path | None, layers: int):
        self.records: list[dict[str, Any]] = []
        self.out, self.layers, self.bad = out, layers, False
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / "decode.jsonl").unlink(missing_ok=True)

    def keep(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.out is None:
            return
        with open(self.out / "decode.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        replace_file(self.out / "decode.md", markdown(self).encode())

    def skip(self, what: str, why: str, **where: Any) -> None:
        self.keep({"kind": "decode", "what": what, "status": SKIPPED + why, **where})

    def wrong(self, what: str, status: str, **where: Any) -> None:
        self.bad = True
        self.keep({"kind": "decode", "what": what, "status": status, **where})

    def fail(self, what: str, error: BaseException, bad: bool, **where: Any) -> None:
        """`bad`: whether it was ours to succeed."""
        first = next(iter(str(error).strip().splitlines()), "")
        status = f"failed: {type(error).__name__}: {first}"[:300]
        self.bad |= bad
        self.keep({"kind": "decode", "what": what, "status": status, **where})

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]


def _number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


def _gigabytes(count: float | None) -> str:
    return _number(None if count is None else count / 1e9, ".2f")


def _where(record: dict[str, Any]) -> list[str]:
    names = ("batch", "context", "what", "draft_length", "top_k_keys")
    return [str(record.get(name, "-")) for name in names]


def _spread(record: dict[str, Any]) -> str:
    return f"{record['ms_p20']:.3g}-{record['ms_p80']:.3g}"


def _decode_cells(record: dict[str, Any]) -> list[str]:
    if record["status"] != "ok":
        return [*_where(record), *["-"] * (len(_DECODE) - 6), record["status"]]
    runs = record["runs"]
    return [
        *_where(record),
        _number(record["ms"]),
        _spread(record),
        _number(record["tokens_per_s"]["median"], ".1f"),
        "-" if record["ratio"] is None else f"{record['ratio']:.2f}x",
        _number(record.get("tokens_per_pass"), ".2f"),
        _number(record.get("tokens_per_pass_asked"), ".2f"),
        _number(record.get("accepted_of_drafted"), ".0%"),
        _gigabytes(record["peak_bytes"]),
        _number(record["first_use_s"], ".1f"),
        "; ".join(filter(None, (record["note"], f"only {runs} runs" if runs < 3 else ""))),
    ]


def _token_cells(record: dict[str, Any]) -> list[str]:
    same = [record["same_as_transformers"], record["same_as_dense"]]
    return [*_where(record), *same, _number(record["behind"], ".2g")]


def _pass_cells(record: dict[str, Any], layers: int) -> list[str]:
    kernels = record["kernels"]
    return [
        *_where(record),
        record["pass"],
        _number(record["ms"]),
        _spread(record),
        _number(record["busy_ms"]),
        _number(record["idle_ms"]),
        _number(kernels, "d"),
        _number(None if kernels is None else kernels / layers, ".1f"),
        _gigabytes(record["bytes"]),
        _number(record["of_copy"], ".0%"),
    ]


def _headline(results: Results) -> str:
    about = next(iter(results.of("environment")), None)
    if about is None:
        return FORCED
    threads = f", {about['threads']} threads" if about["threads"] else ""
    counted = " On the CPU kernels are calls of operators; no idle time." if threads else ""
    return (
        f"{about['shape']}, random weights, {about['dtype']}, on {about['device']}{threads}; "
        f"{about['new_tokens']} new tokens a run; a large copy moves {about['copy_gb_per_s']:.0f} "
        f"GB/s; torch {about['torch']}, transformers {about['transformers']}, commit "
        f"{about['commit']}, {about['date']}. {FORCED}{counted}"
    )


def _tables(results: Results) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    records = results.of("decode")
    known = [record for record in records if record["status"] == "ok"]
    return [
        ("Decoding", _DECODE, [_decode_cells(record) for record in records]),
        ("Its tokens", _TOKENS, [_token_cells(record) for record in known]),
        ("Its passes", _PASS, [_pass_cells(r, results.layers) for r in results.of("pass")]),
    ]


def markdown(results: Results) -> str:
    lines = ["# Decoding with random weights and forced acceptance", "", _headline(results)]
    for title, head, rows in _tables(results):
        lines += ["", f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def rich_tables(results: Results) -> list[Any]:
    from rich.markup import escape
    from rich.table import Table

    shown: list[Any] = [escape(_headline(results))]
    for title, head, rows in _tables(results):
        table = Table(title=f"{title} (forced acceptance)")
        for name in head:
            table.add_column(name, no_wrap=name in ("what", "of"))
        for row in rows:
            style = "bold" if row[2].startswith("ours") else None
            table.add_row(*map(escape, row), style=style)
        shown.append(table)
    return shown

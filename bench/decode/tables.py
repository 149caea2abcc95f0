"""What `bench decode` found, on disk as soon as it is known, and as tables."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from bench.environment import in_words
from bench.records import Journal, failure, file_of, markdown_table
from std_decode.app.output import replace_file

UNPATCHED, STATIC = "transformers generate", "transformers generate, static cache"
DENSE, DRAFTS = "ours, dense", "ours, drafting"
SKIPPED = "skipped: "
FORCED = (
    "Random weights: acceptance is forced, so the share of drafts that agree is an input, not a "
    "finding."
)
MEASURED = "Trained weights (the demo model): acceptance is measured."
_KEY = ("kind", "what", "pass", "shape", "dtype", "batch", "context", "acceptance",
        "draft_length", "top_k_keys")  # fmt: skip
_WHERE = ("model", "batch", "context", "what", "drafts", "keys")
_DECODE = (
    *_WHERE, "ms/token", "p20-p80", "tokens/s", "vs transformers", "first token s", "peak GB",
    "first use s", "note",
)  # fmt: skip
_TOKENS = (
    *_WHERE, "same as transformers", "same as ours, dense", "behind", "accepted", "which is",
    "tokens/pass", "asked", "draft + verify + select ms",
)  # fmt: skip
_PASS = (
    *_WHERE, "pass", "ms", "p20-p80", "kernel ms", "idle ms", "kernels", "per layer", "GB",
    "of copy",
)  # fmt: skip
_FIRST = ("model", "context", "what", "s", "runs", "note")


class Results:
    """Records in the order in which they came, also as files of `out` unless that is None.

    Args:
        about: the environment.
        resume: go on where an earlier run left off; what is `done` then is not kept twice.
        again: shape, context and batch of what this run goes through. What an earlier one has
            of others stays, whatever came of it.
    """

    def __init__(
        self,
        out: Path | None,
        about: dict[str, Any],
        resume: bool = False,
        again: Collection[tuple] = (),
    ):
        self.path = None if out is None else file_of(out, "decode", about["device"])

        def complete(record: dict[str, Any]) -> bool:
            place = tuple(record.get(name) for name in ("shape", "context", "batch"))
            return record["status"] == "ok" or (bool(again) and place not in again)

        self.journal = Journal(self.path, about, complete if resume else None)
        self.bad = False
        self._done = {_key(record) for record in self.records[1:]}

    @property
    def records(self) -> list[dict[str, Any]]:
        return self.journal.records

    def done(self, record: dict[str, Any]) -> bool:
        """Whether an earlier run has this result."""
        return _key(record) in self._done

    def keep(self, record: dict[str, Any]) -> None:
        if self.done(record):
            return
        self.journal.keep(record)
        if self.path is not None:
            replace_file(self.path.with_suffix(".md"), (markdown(self)).encode())

    def skip(self, record: dict[str, Any], why: str) -> None:
        self.keep({**record, "status": SKIPPED + why})

    def wrong(self, record: dict[str, Any], status: str) -> None:
        self.bad = True
        self.keep({**record, "status": status})

    def fail(self, record: dict[str, Any], error: BaseException, bad: bool) -> None:
        """`bad`: whether it was ours to succeed."""
        self.bad |= bad
        self.keep({**record, "status": failure(error)})

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The records of a kind; those of a batch and context, which came in stages, together."""
        found = [record for record in self.records[1:] if record["kind"] == kind]
        cells = [tuple(r.get(name) for name in ("shape", "context", "batch")) for r in found]
        place = {cell: number for number, cell in enumerate(dict.fromkeys(cells))}
        return [r for _, r in sorted(zip(cells, found), key=lambda pair: place[pair[0]])]


def kind_of(way: str) -> str:
    """Whose time to the first token a way to decode has: drafts differ in what they select."""
    if way in (UNPATCHED, STATIC):
        return way
    if not way.startswith("ours"):
        return UNPATCHED
    return DENSE if way.startswith(DENSE) else DRAFTS


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in _KEY)


def _number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


def _gigabytes(count: float | None) -> str:
    return _number(None if count is None else count / 1e9, ".2f")


def _where(record: dict[str, Any]) -> list[str]:
    names = ("shape", "batch", "context", "what", "draft_length", "top_k_keys")
    return [str(record.get(name, "-")) for name in names]


def _spread(record: dict[str, Any]) -> str:
    return f"{record['ms_p20']:.3g}-{record['ms_p80']:.3g}"


def _decode_cells(record: dict[str, Any], first: dict[tuple, float]) -> list[str]:
    if record["status"] != "ok":
        said = "; ".join(filter(None, (record["status"], record.get("note"))))
        return [*_where(record), *["-"] * (len(_DECODE) - 7), said]
    runs = record["runs"]
    return [
        *_where(record),
        _number(record["ms"]),
        _spread(record),
        _number(record["tokens_per_s"]["median"], ".1f"),
        "-" if record["ratio"] is None else f"{record['ratio']:.2f}x",
        _number(first.get((record["shape"], record["context"], kind_of(record["what"])))),
        _gigabytes(record["peak_bytes"]),
        _number(record["first_use_s"], ".1f"),
        "; ".join(filter(None, (record["note"], f"only {runs} runs" if runs < 3 else ""))),
    ]


def _token_cells(record: dict[str, Any]) -> list[str]:
    stages = record.get("stage_ms") if record.get("draft_length") else None
    parts = [f"{stages[name]:.3g}" for name in ("draft", "verify", "select")] if stages else ["-"]
    return [
        *_where(record),
        record["same_as_transformers"],
        record["same_as_dense"],
        _number(record["behind"], ".2g"),
        _number(record.get("accepted_of_drafted"), ".0%"),
        record.get("acceptance_is", "-"),
        _number(record.get("tokens_per_pass"), ".2f"),
        _number(record.get("tokens_per_pass_asked"), ".2f"),
        " + ".join(parts),
    ]


def _pass_cells(record: dict[str, Any]) -> list[str]:
    if record["status"] != "ok":
        return [*_where(record), record["pass"], record["status"], *["-"] * (len(_PASS) - 8)]
    kernels = record["kernels"]
    return [
        *_where(record),
        record["pass"],
        _number(record["ms"]),
        _spread(record),
        _number(record["busy_ms"]),
        _number(record["idle_ms"]),
        _number(kernels, "d"),
        _number(None if kernels is None else kernels / record["layers"], ".1f"),
        _gigabytes(record["bytes"]),
        _number(record["of_copy"], ".0%"),
    ]


def _first_cells(record: dict[str, Any]) -> list[str]:
    where = [record["shape"], str(record["context"]), record["what"]]
    if record["status"] != "ok":
        return [*where, "-", "-", record["status"]]
    return [*where, f"{record['first_token_s']:.3g}", str(record["runs"]), ""]


def _headline(results: Results) -> str:
    about, records = results.journal.about, results.of("decode")
    shapes = dict.fromkeys(f"{r['shape']} ({r['dtype']})" for r in records)
    is_demo = [record["shape"] == "demo" for record in records]
    words = [f"{', '.join(shapes)} on {in_words(about)}; a large copy moves "
             f"{about['copy_gb_per_s']:.0f} GB/s."]  # fmt: skip
    words += [FORCED] if not all(is_demo) else []
    words += [MEASURED] if any(is_demo) else []
    if about.get("threads"):
        words.append("On the CPU kernels are calls of operators; no idle time, no peak memory.")
    return " ".join(words)


def _tables(results: Results) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    records = results.of("decode")
    known = [record for record in records if record["status"] == "ok"]
    firsts = results.of("first")
    first = {(r["shape"], r["context"], r["what"]): r["first_token_s"]
             for r in firsts if r["status"] == "ok"}  # fmt: skip
    return [
        ("Decoding", _DECODE, [_decode_cells(record, first) for record in records]),
        ("Its tokens and drafts", _TOKENS, [_token_cells(record) for record in known]),
        ("Its passes", _PASS, [_pass_cells(record) for record in results.of("pass")]),
        ("The first token, one row", _FIRST, [_first_cells(record) for record in firsts]),
    ]


def markdown(results: Results) -> str:
    lines = ["# Decoding", "", _headline(results),
             "What the columns say: `python -m bench decode --help`."]  # fmt: skip
    for title, head, rows in _tables(results):
        lines += ["", f"## {title}", "", *markdown_table(head, rows)]
    return "\n".join(lines) + "\n"


def rich_tables(results: Results) -> list[Any]:
    from rich.markup import escape
    from rich.table import Table

    shown: list[Any] = [escape(_headline(results))]
    for title, head, rows in _tables(results):
        table = Table(title=title)
        for name in head:
            table.add_column(name, no_wrap=name == "what")
        for row in rows:
            style = "bold" if row[head.index("what")].startswith("ours") else None
            table.add_row(*map(escape, row), style=style)
        shown.append(table)
    return shown

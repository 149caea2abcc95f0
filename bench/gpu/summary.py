"""What the parts of a round found, in few lines: enough to know without the files."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from bench.gpu.passed import tests_of
from bench.roofline.devices import named

WIDTH = 150  # characters of a line
MOST_FAILURES = 8
# Characters, about.
MOST = {"identity": 600, "tests": 2200, "one": 2000, "many": 2900, "decode": 5400,
        "kernels": 3000, "prefill": 400, "promises": 350, "memcheck": 250}  # fmt: skip
_Records = list[dict[str, Any]]


def lines(part: str, records: _Records) -> list[str]:
    """Of a part's results file; those of all parts are under 12,000 characters."""
    found = {"identity": _tests, "tests": _tests, "memcheck": _tests, "one": _decode,
             "many": _decode, "decode": _decode, "kernels": _kernels, "prefill": _prefill,
             "promises": _promises}  # fmt: skip
    speeds = [r["gb_per_s"] for r in records if r.get("op") == "copy"]
    speeds += [records[0]["copy_gb_per_s"]] if "copy_gb_per_s" in records[0] else []
    copies = [_copy(records[0], speed) for speed in speeds]
    told, kept = [line[:WIDTH] for line in (*copies, *found[part](of(part, records[1:])))], 0
    for number, line in enumerate(told):
        kept += len(line) + 3
        if kept > MOST[part]:
            return [*told[:number], f"and {len(told) - number} lines more"]
    return told


def of(part: str, records: _Records) -> _Records:
    """A part's own of a file that it shares with another."""

    def is_of_one(record: dict[str, Any]) -> bool:
        # The demo model is timed with many; its first token is of one row all the same.
        demos = record["kind"] == "first" and record["shape"] == "demo"
        return record.get("batch", 1) == 1 and not demos

    if part == "memcheck":
        return [r for r in records if "memcheck" in r.get("test", "")]
    if part in ("one", "many"):
        return [r for r in records if is_of_one(r) == (part == "one")]
    return records


def _copy(about: dict[str, Any], gb_per_s: float) -> str:
    sheet = named(about["device"])
    share = f", {1e9 * gb_per_s / sheet.device.bandwidth:.0%} of the data sheet's" if sheet else ""
    return f"a large copy moves {gb_per_s:,.0f} GB/s{share}"


def is_late(record: dict[str, Any]) -> bool:
    """Whether more time would give a result that is not there."""
    return "out of time" in record.get("status", "") or "out of time" in record.get("note", "")


def tail(log: Path, begun: int, most: int = 2000) -> str:
    """The end of what a part said, from the byte on at which it began."""
    with open(log, "rb") as file:
        file.seek(begun)
        text = file.read().decode(errors="replace").strip()
    return "  its last words:\n" + text[-most:]


def _tests(records: _Records) -> list[str]:
    tests = tests_of(records)
    states = [record["status"] for record in tests.values()]
    counts = {state: states.count(state) for state in ("passed", "failed", "skipped")}
    told = [", ".join(f"{count} {state}" for state, count in counts.items())]
    for name, record in tests.items():
        told += [
            f"{name.rpartition('/')[2]}: {value}" for value in [_of(record["properties"])] if value
        ]
    bad = [(name, record) for name, record in tests.items() if record["status"] == "failed"]
    for name, record in bad[:MOST_FAILURES]:
        # pytest marks the lines that say what was wrong with an E.
        said = [line for line in record["text"].splitlines() if line.startswith("E  ")]
        said = said or record["text"].strip().splitlines()[-1:]
        told += [f"FAILED {name.rpartition('/')[2]}", *(f"  {line}" for line in said[:2])]
    told += [f"and {len(bad) - MOST_FAILURES} more failed"] if len(bad) > MOST_FAILURES else []
    # pytest's ('FILE', LINE, 'Skipped: REASON')
    why = [
        r["text"].rpartition("Skipped: ")[2] for r in tests.values() if r["status"] == "skipped"
    ]
    told += [
        f"skipped, {why.count(one)}: {one.strip(chr(39) + ')')}" for one in dict.fromkeys(why)
    ]
    return told


def _of(properties: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in properties.items())


def _decode(records: _Records) -> list[str]:
    told = []
    for cell in dict.fromkeys(_cell(r) for r in records if r["kind"] == "decode"):
        here = [r for r in records if r["kind"] == "decode" and _cell(r) == cell]
        shape, batch, context = cell
        told.append(f"{shape}, {batch} x {context:,} (ms a token; tokens/s of all rows)")
        for state in dict.fromkeys(r["status"] for r in here if is_late(r)):
            names = [_short(r["what"]) for r in here if r["status"] == state]
            told.append(f"  {state}: {'; '.join(names)}")
        told += [f"  {r['what']}: {r['status']}" for r in here if _is_bad(r)]
        told += [f"  {_way(r)}" for r in _best([r for r in here if r["status"] == "ok"])]
        passes = [r for r in records if r["kind"] == "pass" and _cell(r) == cell]
        spans = {
            f"{_short(r['what'])} {r['pass']}": f"{r['ms']:.3g} ms ({r['of_copy']:.0%})"
            for r in passes if r["status"] == "ok" and shape != "demo"
            and not r["what"].endswith(("compiled", "no graphs"))
        }  # fmt: skip
        parts = "; ".join(f"{name} {span}" for name, span in spans.items())
        told += [f"  passes, of copy: {parts}"] if parts else []
    return told


def _cell(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["shape"], record.get("batch"), record["context"]


def _is_bad(record: dict[str, Any]) -> bool:
    return record["status"] != "ok" and not is_late(record)


def _best(records: _Records) -> _Records:
    """Of our ways that differ in compiling or graphs only, the fastest of each."""
    kinds: dict[str, dict[str, Any]] = {}
    for record in records:
        name = record["what"].removesuffix(", compiled").removesuffix(", no graphs")
        kind = f"{name} {record.get('draft_length')} {record.get('top_k_keys')}"
        kinds[kind] = min(kinds.get(kind, record), record, key=lambda r: r["ms"])
    return [*kinds.values()]


def _way(record: dict[str, Any]) -> str:
    figures = [f"{record['ms']:.3g} ms", f"{record['tokens_per_s']['median']:,.0f}/s"]
    figures += [f"{record['ratio']:.2f}x"] if record["ratio"] else []
    if "tokens_per_pass" in record:
        figures.append(f"{record['tokens_per_pass']:.2f} a pass")
    figures += [f"same {record['same_as_transformers']}", f"first {record['first_use_s']:.0f} s"]
    return f"{record['what']}: {', '.join(figures)}"


def _short(name: str) -> str:
    return name.removeprefix("ours, ").replace("transformers generate", "transformers")


def _kernels(records: _Records) -> list[str]:
    told = []
    for where in dict.fromkeys((r["op"], r["size"]) for r in records if r["op"] != "copy"):
        here = {r["what"]: r for r in records if (r["op"], r["size"]) == where}
        ours = here.pop("ours", None)
        if ours is None or ours["status"] != "ok":
            told.append(f"{' '.join(where)}: {ours['status'] if ours else 'not timed'}")
            continue
        timed = [r for r in here.values() if r["status"] == "ok" and "ours_takes" in r]
        best = min(timed, key=lambda r: r["cold_ms"], default=None)
        rival = (
            f"; best rival {best['what']}, ours takes {best['ours_takes']:.2f}x" if best else ""
        )
        bad = [name for name, r in here.items() if r["status"] != "ok"]
        failing = f"; not timed: {', '.join(bad)}" if bad else ""
        told.append(f"{' '.join(where)}: {1e3 * ours['cold_ms']:.1f} us, {ours['of_copy']:.0%} of "
                    f"copy{rival}{failing}")  # fmt: skip
    worse = [r["ours_takes"] for r in records if "ours_takes" in r]
    told += [f"median of {len(worse)} rivals: ours takes {median(worse):.2f}x"] if worse else []
    return told


def _prefill(records: _Records) -> list[str]:
    return [
        f"{r['tokens']} tokens: unpatched {r['unpatched_ms']:.0f} ms, patched {r['ratio']:.3f}x "
        f"({r['ratio_p20']:.3f}-{r['ratio_p80']:.3f}), {'same' if r['same'] else 'ANOTHER'} token"
        if "ratio" in r else f"{r['tokens']} tokens: {r['note']}"
        for r in records
    ]  # fmt: skip


def _promises(records: _Records) -> list[str]:
    told = []
    for record in records:
        if "milliseconds" not in record:
            told.append(f"{record['model']}: {record['note']}")
            continue
        broken = [way for way, same in record["kept"].items() if not same]
        told.append(f"{record['model']}, {record['dtype']}: kept {not broken} {broken or ''}")
        for way, widths in record["milliseconds"].items():
            steps = ", ".join(f"{width}: {took:.2f} ms" for width, took in widths.items())
            told.append(f"{way}, by tokens of a pass: {steps}")
    return told

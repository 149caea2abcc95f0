"""The tables of a pretrained model on real texts, from `bench real`."""

from __future__ import annotations

from collections.abc import Collection
from statistics import mean, median

from bench.environment import in_words
from bench.records import Record, markdown_table

_WAY = ("draft_weights", "top_k_keys", "draft_length", "reselect")
_EVERY = 100_000  # keys from which on a draft reads all that there are


def tables(about: Record, records: list[Record]) -> list[str]:
    """All that the records have, a paragraph and a table each."""
    lines: list[str] = []
    for part, table in (("acceptance", _acceptance), ("rounding", _rounding), ("speed", _speed)):
        here = [r for r in records if r["part"] == part and r["status"] == "ok"]
        if here:
            lines += [*table(here), ""]
    return [*lines, _conditions(about)] if lines else []


def _conditions(about: Record) -> str:
    asked = f"{about['model']}, greedy, at most {about['new_tokens']} tokens an answer"
    return f"{asked}; {in_words(about)}."


def short(about: Record, records: list[Record]) -> list[str]:
    """The gist: what of the drafts agrees, and the speed of what a user would choose."""
    drafting = [r for r in records if r["part"] == "acceptance" and r["status"] == "ok"]
    timed = [r for r in records if r["part"] == "speed" and r["status"] == "ok"]
    if drafting:
        sizes = sorted({record["tokens"] for record in drafting})
        # All keys of a short text are few: what drafts leave out shows on the longest alone.
        longest = [record for record in drafting if record["tokens"] == sizes[-1]]
        texts = {(r["kind"], r["task"]) for r in longest}
        lines = [
            f"Of the drafts for {len(texts)} answers about {sizes[-1]:,} tokens, 4 a round, the "
            f"dense model accepts {_shares(longest)}. "
            f"{sum(r['identical'] for r in drafting):,} of {len(drafting):,} drafted answers "
            f"about {' and '.join(f'{size:,}' for size in sizes)} tokens were the unpatched "
            "model's."
        ]
    elif timed:
        lines = _speed(timed, ("dense path", "look-ups", "auto", "prompt lookup"))
    else:
        return []
    return [*lines, "", _conditions(about)]


def _shares(records: list[Record]) -> str:
    """Of drafts by each number of keys, and of 4-bit ones that read all."""
    here = [r for r in records if r["draft_length"] == 4 and r["reselect"]]
    own = [r for r in here if not r["draft_weights"]]
    told = [
        f"{_rate([r for r in own if r['top_k_keys'] == keys])} (reading {keys:,} keys)"
        for keys in sorted({record["top_k_keys"] for record in own})
    ]
    four_bit = [r for r in here if r["draft_weights"] and r["top_k_keys"] >= _EVERY]
    told += [f"{_rate(four_bit)} (every key, 4-bit weights)"] if four_bit else []
    return ", ".join(told)


def _acceptance(records: list[Record]) -> list[str]:
    kinds = list(dict.fromkeys(record["kind"] for record in records))
    sizes = sorted({record["tokens"] for record in records})
    head = ("drafts read", "drafts a round", "re-selection", *kinds,
            *(f"{size:,} tokens" for size in sizes), "all", "mean of texts",
            "tokens per dense pass",
            "identical texts")  # fmt: skip
    ways: dict[tuple, list[Record]] = {}
    for record in records:
        ways.setdefault(tuple(record[name] for name in _WAY), []).append(record)
    rows = []
    for way in sorted(ways, key=lambda way: (way[2] != 4, not way[3], way[0] or "", way[1:])):
        weights, keys, gamma, reselect = way
        here = ways[way]
        read = "every key" if keys >= _EVERY else f"{keys:,} keys"
        same = sum(record["identical"] for record in here)
        steps, passes = _sum(here, "steps"), _sum(here, "passes")
        rows.append([
            f"{read}, 4-bit weights" if weights else read,
            str(gamma),
            "yes" if reselect else "no",
            *(_rate([r for r in here if r["kind"] == kind]) for kind in kinds),
            *(_rate([r for r in here if r["tokens"] == size]) for size in sizes),
            _rate(here),
            f"{mean(r['accepted'] / max(1, r['drafted']) for r in here):.0%}",
            f"{steps / max(1, passes):.2f}",
            f"{same} of {len(here)}{'' if same == len(here) else ': A BUG'}",
        ])  # fmt: skip
    return ["Share of drafts that agree, float32:", "", *markdown_table(head, rows)]


def _sum(records: list[Record], name: str) -> int:
    return sum(record[name] for record in records)


def _rate(records: list[Record]) -> str:
    drafted = _sum(records, "drafted")
    return f"{_sum(records, 'accepted') / drafted:.0%}" if drafted else "-"


def _rounding(records: list[Record]) -> list[str]:
    head = ("bfloat16 drafts", "promise", "texts that differ", "tokens up to there",
            "lag of the first other token, largest", "steps with the best two within 0.01",
            "within 0.1")  # fmt: skip
    steps = _sum(records, "steps")
    near = [sum(r["margins_below"][most] for r in records) / steps for most in ("0.01", "0.1")]
    rows = []
    for name, asked in (("rounded", "reproducible=False"), ("as promised", "the default")):
        lags = [lag for record in records for lag in record[name]["lags"]]
        promises = sorted({record[name]["promise"] for record in records})
        rows.append([
            asked,
            ", ".join(promises),
            f"{len(lags)} of {len(records)}",
            f"{sum(record[name]['same_up_to'] for record in records):,}",
            f"{max(lags):.2g}" if lags else "-",
            *(f"{share:.1%}" for share in near),
        ])  # fmt: skip
    return ["What rounding changes, in bfloat16:", "", *markdown_table(head, rows)]


def _speed(records: list[Record], only: Collection[str] = ()) -> list[str]:
    first, *rest = records[0]["tokens_per_s"]
    rest = [way for way in rest if not only or way in only]
    head = ("text", "tokens", f"{first}, tokens/s", *(f"{way}, x" for way in rest))
    compared = not only and all(record.get("auto_over_dense") for record in records)
    if compared:
        head += ("auto over dense path, x",)

    def cells(record: Record) -> list[str]:
        over, same = record["over_unpatched"], record["identical"]
        ratios = [f"{over[way]:.2f}{'' if same[way] else ' (differs)'}" for way in rest]
        if compared:
            turns = sorted(record["auto_over_dense"])
            ratios.append(f"{median(turns):.2f} ({turns[0]:.2f} to {turns[-1]:.2f})")
        rate = record["tokens_per_s"][first]
        return [f"{record['kind']}, {record['task']}", f"{record['tokens']:,}", f"{rate:.1f}",
                *ratios]  # fmt: skip

    records = sorted(records, key=lambda record: record["tokens"])
    turns = max(record["turns"] for record in records)
    title = f"Speed after the first token, float32, over the unpatched model, {turns} turns:"
    return [title, "", *markdown_table(head, map(cells, records))]

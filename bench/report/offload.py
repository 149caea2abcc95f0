"""The table of a model whose weights are on a disk, from `bench offload`."""

from __future__ import annotations

from statistics import median
from typing import Any

from bench.environment import in_words
from bench.records import Record, markdown_table

_HEAD = ("link", "tokens chosen", "turns", "unpatched, tokens/s", "patched, tokens/s", "speedup",
         "least-most", "tokens per dense pass", "GB read a token, unpatched", "patched",
         "same tokens")  # fmt: skip


def tables(about: Record, records: list[Record]) -> list[str]:
    speeds = [record for record in records if record["part"] == "speed"]
    if not speeds:
        return []
    patch = next(record for record in records if record["part"] == "patch")
    return [
        *markdown_table(_HEAD, map(_cells, speeds)),
        "",
        f'{about["model"]}, float32, device_map={{"": "disk"}}, {about["new_tokens"]} tokens '
        f"about a text of {about['prompt']:,}, the prompt's pass included; a link of so many GB/s "
        "is a stand-in that sleeps. "
        f"A dense pass reads {patch['gb_dense_pass']:.2f} GB; drafts read {patch['gb_kept']:.2f} "
        f"GB that are kept, made by patch in {patch['seconds']:.0f} s and of "
        f"{patch['gb_read']:.1f} GB read. {in_words(about)}.",
    ]


def _cells(record: Record) -> list[str]:
    link = record["link"]
    named = {"cached": "page cache", "disk": "disk, page cache dropped"}
    names = [named.get(link, f"{link} GB/s, a stand-in"),
             "sampled" if record["sampled"] else "greedy"]  # fmt: skip
    if record["status"] != "ok":
        return [*names, record["status"], *["-"] * (len(_HEAD) - 3)]
    turns = record["turns"]
    return [
        *names,
        str(len(turns)),
        *(f"{median(_speeds(turns, side)):.2f}" for side in ("unpatched", "patched")),
        f"{record['speedup']:.2f}x",
        f"{min(record['ratios']):.2f}-{max(record['ratios']):.2f}",
        f"{median(one['tokens_per_dense_pass'] for one in turns):.2f}",
        *(f"{median(one['gb_read'][side] / one['tokens'] for one in turns):.2f}"
          for side in ("unpatched", "patched")),
        "yes" if record["same"] else "NO: A BUG",
    ]  # fmt: skip


def _speeds(turns: list[dict[str, Any]], side: str) -> list[float]:
    return [one["tokens"] / one["seconds"][side] for one in turns]

"""What a GPU showed of Qwen2-VL-7B, beside what had been predicted for it before any GPU ran."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import NamedTuple

from bench.environment import in_words
from bench.models.dimensions import SHAPES
from bench.records import Record, markdown_table, read
from bench.roofline import expected
from bench.roofline.devices import GPUS
from bench.roofline.predictions import Cell
from std_decode.costs.expected import EXPECTED

NAME = "gpu-notes.md"
SHAPE, CONTEXT = "qwen2-vl-7b", 25000
KNOWN = ("H200", "H100")  # that there are predictions for, in this order
ROWS, DRAFTS, KEYS, ACCEPTANCE = (1, 8, 32), 4, 1024, 0.9  # as `bench gpu` asks for
INT4 = f"ours, forced acceptance {ACCEPTANCE}, int4 drafts"


class Step(NamedTuple):
    """A pass at 1 x 25,000: milliseconds on each of `KNOWN`, and launches a layer."""

    what: str
    name: str
    milliseconds: tuple[float, ...]
    launches: int


# By bytes, the bandwidth that published kernels of 7B to 70B models reach, and a fixed time for
# each launch and small kernel; machine code compiled for sm_90 told how much is in flight. Against
# ten published figures of decoding on A100 and H100 the same sum was within 12%.
STEPS = (
    Step("ours, dense", "dense", (4.80, 6.58), EXPECTED.dense_launches),
    Step(INT4, "verify", (4.9,), EXPECTED.verify_launches),
    Step(INT4, "draft", (2.14, 2.22), EXPECTED.four_bit_launches),
    Step("ours, dense, compiled", "dense", (5.36, 7.14), 20),
    Step(f"{INT4}, compiled", "verify", (5.7,), 25),
    Step(f"{INT4}, compiled", "draft", (4.18, 4.19), 21),
)


def page(results: Path) -> str | None:
    """The page of all GPUs that have results; None where none has."""
    parts = []
    for path in sorted(results.glob("decode-*.jsonl")):
        about, *records = read(path)
        mine = [r for r in records if r.get("shape") == SHAPE and r.get("context") == CONTEXT]
        if "driver" in about and mine:
            parts.append(_part(about, [r for r in mine if r["status"] == "ok"]))
    if not parts:
        return None
    head = (
        "# What a GPU showed, and what was predicted\n\nWritten by `python -m bench report` from "
        f"the results of `bench decode`. {SHAPE}, random weights, forced acceptance {ACCEPTANCE}, "
        f"{DRAFTS} drafts. Milliseconds were predicted kernel by kernel; gains by the shorter sum "
        "of `bench roofline` (expected), which is within 3% of that.\n"
    )
    return "\n".join([head, *parts])


def _part(about: Record, records: list[Record]) -> str:
    place = next((n for n, gpu in enumerate(KNOWN) if gpu in about["device"]), None)
    lines = [f"## {in_words(about)}", ""]
    head = ("pass at 1 x 25,000", "predicted, ms", "measured, ms", "measured over predicted",
            "launches a layer, counted before", "measured")  # fmt: skip
    lines += [*markdown_table(head, [_step(step, place, records) for step in STEPS]), ""]
    head = ("rows x 25,000", "way", "predicted gain over dense", "measured", "predicted, tokens/s",
            "measured")  # fmt: skip
    ways = product(ROWS, ("", ", compiled"))
    gains = [_gain(rows, how, place, records) for rows, how in ways]
    lines += [*markdown_table(head, gains), ""]
    return "\n".join(lines)


def _step(step: Step, place: int | None, records: list[Record]) -> list[str]:
    predicted = None if place is None else dict(enumerate(step.milliseconds)).get(place)
    found = next(
        (r for r in records if r["kind"] == "pass" and r["batch"] == 1
         and (r["what"], r["pass"]) == (step.what, step.name)), None,
    )  # fmt: skip
    took = None if found is None else found["ms"]
    launches = found and found.get("kernels") and f"{found['kernels'] / found['layers']:.1f}"
    return [
        f"{step.what}: {step.name}",
        _number(predicted),
        _number(took),
        _number(took / predicted if took and predicted else None),
        str(step.launches),
        launches or "-",
    ]


def _gain(rows: int, how: str, place: int | None, records: list[Record]) -> list[str]:
    """With 4-bit drafts over our dense path; tokens/s of all rows."""
    here = {r["what"]: r for r in records if r["kind"] == "decode" and r["batch"] == rows}
    speeds = [
        here[what + how]["tokens_per_s"]["median"]
        for what in (INT4, "ours, dense")
        if what + how in here
    ]
    predicted = None
    if place is not None and not how:  # of compiled passes there is no sum
        device = GPUS[KNOWN[place].lower()].device
        cell = Cell(SHAPES[SHAPE], device, 1, rows, CONTEXT, KEYS)
        predicted = expected.drafting(cell, True, ACCEPTANCE, DRAFTS)
    told = predicted and f"{rows * predicted.tokens / predicted.seconds:,.0f}"
    return [
        f"{rows} x {CONTEXT:,}",
        INT4 + how,
        f"{predicted.speedup:.2f}x" if predicted else "-",
        f"{speeds[0] / speeds[1]:.2f}x" if len(speeds) == 2 else "-",
        told or "-",
        f"{here[INT4 + how]['tokens_per_s']['median']:,.0f}" if INT4 + how in here else "-",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"

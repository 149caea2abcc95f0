"""What a GPU showed of Qwen2-VL-7B, beside what had been predicted for it before any GPU ran."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from bench.environment import in_words
from bench.records import Record, markdown_table, read

NAME = "gpu-notes.md"
SHAPE, CONTEXT = "qwen2-vl-7b", 25000
GPUS = ("H200", "H100")  # that there are predictions for, in this order
INT4 = "ours, forced acceptance 0.9, int4 drafts"


class Step(NamedTuple):
    """A pass at 1 x 25,000: milliseconds on each of `GPUS`, and launches a layer."""

    what: str
    name: str
    milliseconds: tuple[float, ...]
    launches: int


class Gain(NamedTuple):
    """Of `rows` rows with 4-bit drafts over our dense path; tokens/s of all rows. On an H200."""

    rows: int
    what: str
    speedup: float
    tokens: int


# By bytes, the bandwidth that published kernels of 7B to 70B models reach, and a fixed time for
# each launch and small kernel; machine code compiled for sm_90 told how much is in flight. Against
# ten published figures of decoding on A100 and H100 the same sum was within 12%.
STEPS = (
    Step("ours, dense", "dense", (6.65, 8.43), 41),
    Step(INT4, "verify", (7.2,), 49),
    Step(INT4, "draft", (5.64, 5.66), 45),
    Step("ours, dense, compiled", "dense", (5.36, 7.14), 20),
    Step(f"{INT4}, compiled", "verify", (5.7,), 25),
    Step(f"{INT4}, compiled", "draft", (4.18, 4.19), 21),
)
GAINS = (
    Gain(1, INT4, 1.00, 149), Gain(8, INT4, 1.12, 946), Gain(32, INT4, 1.20, 2067),
    Gain(1, f"{INT4}, compiled", 1.02, 189), Gain(8, f"{INT4}, compiled", 1.22, 1208),
    Gain(32, f"{INT4}, compiled", 1.30, 2422),
)  # fmt: skip


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
        f"the results of `bench decode`. {SHAPE}, random weights, forced acceptance 0.9.\n"
    )
    return "\n".join([head, *parts])


def _part(about: Record, records: list[Record]) -> str:
    place = next((n for n, gpu in enumerate(GPUS) if gpu in about["device"]), None)
    lines = [f"## {in_words(about)}", ""]
    head = ("pass at 1 x 25,000", "predicted, ms", "measured, ms", "measured over predicted",
            "launches a layer, counted before", "measured")  # fmt: skip
    lines += [*markdown_table(head, [_step(step, place, records) for step in STEPS]), ""]
    head = ("rows x 25,000", "way", "predicted gain over dense", "measured", "predicted, tokens/s",
            "measured")  # fmt: skip
    lines += [*markdown_table(head, [_gain(gain, place, records) for gain in GAINS]), ""]
    return "\n".join(lines)


def _step(step: Step, place: int | None, records: list[Record]) -> list[str]:
    told = place is not None and place < len(step.milliseconds)
    predicted = step.milliseconds[place] if told and place is not None else None
    found = next(
        (r for r in records if r["kind"] == "pass" and r["batch"] == 1
         and (r["what"], r["pass"]) == (step.what, step.name)), None,
    )  # fmt: skip
    took = None if found is None else found["ms"]
    launches = found and found.get("kernels") and f"{found['kernels'] / found['layers']:.1f}"
    both = predicted is not None and took is not None
    return [
        f"{step.what}: {step.name}",
        _number(predicted),
        _number(took),
        f"{took / predicted:.2f}" if both and predicted and took else "-",
        str(step.launches),
        launches or "-",
    ]


def _gain(gain: Gain, place: int | None, records: list[Record]) -> list[str]:
    here = {r["what"]: r for r in records if r["kind"] == "decode" and r["batch"] == gain.rows}
    dense = gain.what.replace(INT4, "ours, dense")
    speeds = [here[what]["tokens_per_s"]["median"] for what in (gain.what, dense) if what in here]
    told = place == 0
    return [
        f"{gain.rows} x {CONTEXT:,}",
        gain.what,
        f"{gain.speedup:.2f}x" if told else "-",
        f"{speeds[0] / speeds[1]:.2f}x" if len(speeds) == 2 else "-",
        f"{gain.tokens:,}" if told else "-",
        f"{here[gain.what]['tokens_per_s']['median']:,.0f}" if gain.what in here else "-",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"

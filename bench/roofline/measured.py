"""The efficiencies of a GPU that results files know, in place of the predicted ones."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from bench.models.dimensions import SHAPES
from bench.records import Record, read
from bench.roofline.devices import GPUS, named
from std_decode.costs.expected import EXPECTED, FOUR_BIT_BYTES, Efficiency
from std_decode.costs.workload import Device

RESULTS = Path(__file__).parents[1] / "results"
# Of `bench decode`: what was run, which pass of it, and whose launches those are.
_PASSES = {
    ("ours, dense", "dense"): "dense_launches",
    ("ours, forced acceptance 0.9, int4 drafts", "verify"): "verify_launches",
    ("ours, forced acceptance 0.9, int4 drafts", "draft"): "four_bit_launches",
    ("ours, forced acceptance 0.9", "draft"): "draft_launches",
}


@lru_cache(maxsize=64)
def efficiency(gpu: str, results: Path = RESULTS) -> Efficiency:
    """`EXPECTED`, and of each part what `bench kernels` and `bench decode` measured on `gpu`."""
    known: dict[str, float] = {}
    for path in sorted(results.glob("*.jsonl")):
        about, *records = read(path)
        if "driver" in about and named(about["device"]) == GPUS[gpu]:
            good = [one for one in records if one["status"] == "ok"]
            if about.get("dtype") == "bfloat16":
                known.update(
                    _kernels([r for r in good if r["kind"] == "kernel"], GPUS[gpu].device)
                )
            known.update(_launches([r for r in good if r["kind"] == "pass"]))
    return replace(EXPECTED, **known)  # type: ignore[arg-type]


def _launches(passes: list[Record]) -> Iterator[tuple[str, float]]:
    for one in passes:
        name = _PASSES.get((one["what"], one["pass"]))
        if name and one.get("kernels"):
            yield name, one["kernels"] / one["layers"]


def _largest(records: list[Record], op: str, what: str = "ours", **given: int) -> Record | None:
    """The one that moves the most bytes: launches count the least in it."""
    found = [
        r for r in records
        if (r["op"], r["what"]) == (op, what) and all(r[k] == v for k, v in given.items())
    ]  # fmt: skip
    return max(found, key=lambda one: one["bytes"], default=None)


def _kernels(records: list[Record], peak: Device) -> Iterator[tuple[str, float]]:
    copy = _largest(records, "copy", "copy")
    if copy is None:
        return
    bandwidth = 1e9 * copy["gb_per_s"]
    yield "copy", bandwidth / peak.bandwidth
    for name, op in (("attention", "verify_attention"), ("gather", "sparse_attention")):
        if best := _largest(records, op):
            yield name, best["of_copy"]
    if whole := _largest(records, "int4_linear", "dense-weights", batch=1):
        yield "product", 2 * _weights(whole) / _seconds(whole) / bandwidth
    if one := _largest(records, "int4_linear", batch=1):
        each = _seconds(one) / _weights(one)
        yield "four_bit", max(EXPECTED.four_bit, FOUR_BIT_BYTES / each / bandwidth)
        yield "weight", each * peak.cycles
    if many := _largest(records, "int4_linear", batch=EXPECTED.tile_rows):
        yield "weight_tile", _seconds(many) / _weights(many) * peak.cycles
    if chosen := _largest(records, "select_topk"):
        shape = SHAPES[chosen["shape"]]
        keys = shape.layers * shape.kv_heads * chosen["batch"] * chosen["context"]
        yield "select_key", _seconds(chosen, EXPECTED.select_launches) * peak.cycles / keys
        yield "select_row", 0.0


def _seconds(record: Record, launches: int = 1) -> float:
    """What it takes besides its launches, which are counted apart."""
    took = 1e-3 * record["cold_ms"]
    return max(took / 2, took - launches * EXPECTED.launch)


def _weights(record: Record) -> int:
    """Of a size ``32 x [18944, 3584]``."""
    return math.prod(map(int, re.findall(r"\d+", record["size"].partition("[")[2])))

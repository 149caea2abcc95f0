"""What a GPU has no room for: weights, keys and values on the host, fetched over a link."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from bench.models.dimensions import FOUR_BIT_BYTES, SHAPES
from bench.roofline import expected
from bench.roofline.devices import GPUS, LINKS, linked
from bench.roofline.measured import efficiency
from bench.roofline.predictions import USABLE, Cell, Prediction
from std_decode.costs.expected import BFLOAT16_BYTES, Efficiency
from std_decode.costs.workload import Workload

PLACES = ("device", "host")
OTHER_ACCEPTANCES = (0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Placed(Cell):
    """A cell on one GPU, with what lies where.

    A dense pass fetches once what lies on the host, two layers ahead of what is computed. A draft
    fetches weights only, and none where it has 4-bit copies of them: the keys that it reads lie on
    the GPU.

    Attributes:
        memory: bytes of the GPU for all of it.
        weights: "device", or "host": what finds no room beside the rest is on the host.
        kv: "device", or "host": but for the selected keys all are on the host.
        copies: whether drafts have 4-bit copies of the weights, on the GPU.
        disk: bytes/s at which weights are read; those of the host's memory: inf.
    """

    memory: float
    weights: str
    kv: str
    copies: bool
    disk: float = math.inf

    @property
    def pass_bytes(self) -> float:
        """Of the matrices, which a pass goes over; of experts all, as layers are fetched whole."""
        counts = self.shape.counts
        return BFLOAT16_BYTES * (counts.matrices + self.shape.experts * counts.expert)

    @property
    def cache_bytes(self) -> float:
        return self.batch * self.context * self.kv_bytes

    def needed(self, four_bit: bool) -> float:
        """Bytes without which the GPU cannot do: of weights on the host the staging."""
        counts, shape = self.shape.counts, self.shape
        states = self.batch * shape.state_bytes
        cached = self.cache_bytes
        if self.kv == "host":
            selected = self.batch * min(self.keys, self.context) * self.kv_bytes
            cached = selected + 2 * self.cache_bytes / shape.attending
        if self.weights == "device":
            return shape.stored_bytes(four_bit) + cached + states
        head = BFLOAT16_BYTES * counts.embedding  # as large
        staged = 2 * max(head, (self.pass_bytes - head) / shape.layers)
        copies = FOUR_BIT_BYTES / BFLOAT16_BYTES * self.pass_bytes if four_bit else 0.0
        return BFLOAT16_BYTES * counts.rest + staged + copies + cached + states

    @property
    def fitting(self) -> bool:
        return self.needed(self.copies) <= self.memory

    @property
    def fetched_weights(self) -> float:
        """Bytes of weights that a pass fetches: those that the GPU has no room for."""
        if self.weights == "device":
            return 0.0
        return max(0.0, self.pass_bytes - max(0.0, self.memory - self.needed(self.copies)))

    @property
    def fetched_keys(self) -> float:
        return self.cache_bytes if self.kv == "host" else 0.0

    @property
    def device_bytes(self) -> float:
        """With those of the weights that find room there."""
        staged_through = self.pass_bytes if self.weights == "host" else 0.0
        return self.needed(self.copies) + staged_through - self.fetched_weights

    @property
    def host_bytes(self) -> float:
        """Of the host's memory, or its disk: the embedding table is there with the weights."""
        table = BFLOAT16_BYTES * self.shape.counts.embedding if self.weights == "host" else 0
        return self.fetched_weights + table + self.fetched_keys

    def workload(self, attended: int, tokens: int = 1, four_bit: bool = False) -> Workload:
        found = super().workload(attended, tokens, four_bit)
        # While a slower disk is read the link could carry more: as good as so many bytes.
        weights = self.fetched_weights * max(1.0, self.device.link / self.disk)
        return replace(
            found,
            link_bytes=max(weights, self.fetched_weights + self.fetched_keys),
            draft_link_bytes=0.0 if four_bit else weights,
        )


Placement = tuple[str, str, bool]  # of weights and of keys and values; whether there are copies


def placements(options: argparse.Namespace) -> list[Placement]:
    """Those that were asked for."""
    asked = (PLACES if place == "best" else (place,) for place in (options.weights, options.kv))
    return [*product(*asked, (False, True))]


def records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One for each model, GPU, link, context, batch: the fastest placement of those asked for."""
    contexts, batches = sorted({*options.context}), sorted({*options.batch})
    for model, gpu, link in product(options.model, options.gpu, options.link):
        device = linked(GPUS[gpu], link, options.efficiency)
        if device is None:
            continue
        disk = LINKS[link].bandwidth if link == "nvme" else math.inf
        for context, batch in product(contexts, batches):
            cell = Cell(SHAPES[model], device, 1, batch, context, options.top_k_keys)
            memory = USABLE * GPUS[gpu].memory
            where = Where(cell, memory, disk, GPUS[gpu].device.bandwidth, efficiency(gpu))
            named = dict(model=model, gpu=gpu, link=link, batch=batch, context=context)
            yield named | where.record(options)


@dataclass(frozen=True)
class Where:
    """One cell, to be placed.

    Attributes:
        peak: bytes/s of the GPU's memory; `by` has efficiencies of its own.
    """

    cell: Cell
    memory: float
    disk: float
    peak: float
    by: Efficiency

    def placed(self, placement: Placement) -> Placed:
        cell = self.cell
        fields = (cell.shape, cell.device, cell.gpus, cell.batch, cell.context, cell.keys)
        return Placed(*fields, self.memory, *placement, self.disk)

    def at_peak(self, placed: Placed) -> Placed:
        return replace(placed, device=replace(placed.device, bandwidth=self.peak))

    def dense(self) -> Placed | None:
        """The fastest dense decoding that fits, whatever was asked for: what to compare with."""
        all_places = (self.placed((*places, False)) for places in product(PLACES, PLACES))
        fitting = [one for one in all_places if one.fitting]
        return min(fitting, key=self.dense_seconds, default=None)

    def dense_seconds(self, placed: Placed) -> float:
        return expected.step_seconds(self.at_peak(placed), self.by)

    def drafting(self, placed: Placed, acceptance: float, length: int | None) -> Prediction:
        return expected.drafting(self.at_peak(placed), placed.copies, acceptance, length, self.by)

    def best(
        self, asked: list[Placement], acceptance: float, length: int | None
    ) -> tuple[Placed, Prediction] | None:
        """The placement that gives the most tokens a second, of those that fit."""
        fitting = [one for one in map(self.placed, asked) if one.fitting]
        found = [(one, self.drafting(one, acceptance, length)) for one in fitting]
        return max(found, key=lambda pair: pair[1].tokens / pair[1].seconds, default=None)

    def record(self, options: argparse.Namespace) -> dict[str, Any]:
        asked, length = placements(options), options.draft_length
        dense, best = self.dense(), self.best(asked, options.acceptance, length)
        if dense is None or best is None:
            least = min(one.needed(one.copies) for one in map(self.placed, asked))
            return dict(fits=False, device_bytes=least)
        took = self.dense_seconds(dense)
        placed, found = best
        ceiling = placed.drafting(placed.copies, options.acceptance, length)
        at_best = ceiling.tokens * dense.dense_seconds() / ceiling.seconds
        others = {p: self.best(asked, p, length) for p in OTHER_ACCEPTANCES}
        gains = {p: took * one[1].tokens / one[1].seconds for p, one in others.items() if one}
        return dict(
            fits=True,
            weights=placed.weights,
            kv=placed.kv,
            four_bit=placed.copies,
            draft_length=found.drafts,
            ms_per_step=1e3 * found.seconds,
            tokens_per_step=found.tokens,
            tokens_per_s=placed.batch * found.tokens / found.seconds,
            dense=dict(weights=dense.weights, kv=dense.kv, tokens_per_s=dense.batch / took),
            speedup=at_best if found.drafts else 1.0,
            expected_speedup=took * found.tokens / found.seconds,
            expected_at=gains,
            device_bytes=placed.device_bytes,
            host_bytes=placed.host_bytes,
            link_bytes=placed.fetched_weights + placed.fetched_keys,
        )

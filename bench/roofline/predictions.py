"""What dense decoding and drafting take on paper: the cost model at a model's shape, on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from bench.models.dimensions import Shape
from bench.roofline.devices import Gpu
from std_decode.costs.workload import Device, Workload, expected_tokens

MOST_DRAFTS = 63  # as patch(draft_length=...) takes
MOST_CONTEXT, MOST_BATCH = 1 << 22, 1 << 12  # where a search for what pays ends
# Of a GPU's memory: the rest is for the vision tower, activations, CUDA graphs and libraries.
USABLE = 0.9
_tokens = lru_cache(maxsize=4096)(expected_tokens)


class Prediction(NamedTuple):
    """A round of `drafts` drafts and their verification; of none, a dense step."""

    drafts: int
    seconds: float
    tokens: float  # that a row gets
    speedup: float


@dataclass(frozen=True)
class Cell:
    """A model on GPUs at one batch size and context length.

    Attributes:
        device: one GPU's, as far as it is reached.
        gpus: share weights, KV heads and work evenly; what they tell each other takes no time.
        context: cached tokens of a row.
        keys: of a row that a draft reads, per layer and KV head.
    """

    shape: Shape
    device: Device
    gpus: int
    batch: int
    context: int
    keys: int

    @property
    def together(self) -> Device:
        one = self.device
        return Device(*(self.gpus * x for x in (one.bandwidth, one.flops, one.cycles, one.link)))

    @property
    def kv_bytes(self) -> int:
        """Of one token on all GPUs; more GPUs than KV heads keep copies."""
        return 2 * self.shape.kv_values * max(1, self.gpus // self.shape.kv_heads)

    def workload(self, attended: int, tokens: int = 1, four_bit: bool = False) -> Workload:
        """One pass over `tokens` tokens of each row that sees `attended` keys.

        The cost model's `parameters` take the products with cached keys and values too: a head
        multiplies each number of a key, and of a value, once a token.
        """
        shape, rows = self.shape, self.batch * tokens
        return Workload(
            weight_bytes=shape.weight_bytes(rows),
            parameters=shape.active
            + 2 * shape.attending * shape.heads * shape.head_dim * attended,
            kv_bytes=self.kv_bytes,
            batch=self.batch,
            context=self.context,
            draft_keys=self.keys,
            draft_weight_bytes=shape.weight_bytes(rows, four_bit),
            state_bytes=shape.state_bytes,
            layers=shape.layers,
            kv_heads=shape.attending * shape.kv_heads,
        )

    def dense_seconds(self, tokens: int = 1) -> float:
        return self.workload(self.context, tokens).dense_seconds(self.together, tokens)

    def draft_seconds(self, four_bit: bool) -> float:
        attended = min(self.keys, self.context)
        return self.workload(attended, four_bit=four_bit).draft_seconds(self.together)

    def dense(self) -> Prediction:
        return Prediction(0, self.dense_seconds(), 1.0, 1.0)

    def drafting(self, four_bit: bool, acceptance: float, length: int | None = None) -> Prediction:
        """At this draft length, or the best of 1 to 63, which may lose against none at all."""
        draft = self.draft_seconds(four_bit)

        def seconds(drafts: int) -> float:
            return drafts * draft + self.dense_seconds(drafts + 1)

        return best_round(self.dense_seconds(), seconds, acceptance, length)

    def needed(self, four_bit: bool) -> float:
        """Bytes of weights and KV cache on all GPUs."""
        row = self.context * self.kv_bytes + self.shape.state_bytes
        return self.shape.stored_bytes(four_bit) + self.batch * row

    def fits(self, gpu: Gpu, four_bit: bool) -> bool:
        return self.needed(four_bit) <= USABLE * gpu.memory * self.gpus

    def pays_from(
        self, what: str, four_bit: bool, acceptance: float, length: int | None = None
    ) -> int | None:
        """The smallest "context" or "batch" that drafting gains at, the rest as it is."""
        most = MOST_CONTEXT if what == "context" else MOST_BATCH

        def pays(value: int) -> bool:
            cell = replace(self, **{what: value})  # type: ignore[arg-type]
            return cell.drafting(four_bit, acceptance, length).speedup > 1

        return _smallest(pays, most)


def best_round(
    dense: float, seconds: Callable[[int], float], acceptance: float, length: int | None = None
) -> Prediction:
    """Of rounds of 1 to 63 drafts, or of `length`: it may lose against none at all.

    Args:
        dense: seconds of a dense step.
        seconds: of a round of so many drafts.
    """
    rounds = []
    for drafts in (length,) if length else range(1, MOST_DRAFTS + 1):
        took, tokens = seconds(drafts), _tokens(acceptance, drafts)
        rounds.append(Prediction(drafts, took, tokens, tokens * dense / took))
    return max(rounds, key=lambda one: one.speedup)


def _smallest(holds: Callable[[int], bool], most: int) -> int | None:
    """Exact where something holds from one value on: found by doubling, then by halving."""
    high = 1
    while not holds(high):
        if high >= most:
            return None
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def fewest_gpus(cell: Cell, gpu: Gpu) -> int:
    """Of 1, 2, 4 and 8 that can share the heads, the first that hold the cell; or the most."""
    possible = [n for n in (1, 2, 4, 8) if can_share(cell.shape, n)]
    fitting = [n for n in possible if replace(cell, gpus=n).fits(gpu, four_bit=True)]
    return (fitting or possible[-1:])[0]


def can_share(shape: Shape, gpus: int) -> bool:
    """Whether each GPU gets as many query heads, and whole KV heads or one of them."""
    small, large = sorted((shape.kv_heads, gpus))
    return shape.heads % gpus == 0 and large % small == 0

"""Products of the few tokens of a decoding pass, in float32 on a CPU, by the quickest kernel.

`F.linear` takes the kernel that MKL has for so many rows, and some of these read weights that no
cache holds at half the memory's pace or less. The product of blocks of the weights, or of the
weights and the rows the other way round, is another kernel of MKL. All 211 products of a
SmolLM2-135M step, one thread of an AMD EPYC (AVX-512), ms of process time, torch 2.13:

    rows         1    2    3    4    5    6    7    8
    F.linear    55   83   97   75   83   88   97   86
    these       28   34   51   60   67   80   97   95

At K 2048 it is 34 and 30 ms for a row of as many weights, 66 and 46 for two. Weights that a cache
holds take longer so, and other CPUs have other kernels; so it is measured, once for each number of
threads, on the model's own weights. They round otherwise, so only passes whose promise leaves that
open go by them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from std_decode.model.running_pass import running_pass

LEAST_BYTES = 1 << 26  # of a model's weights; fewer may stay in a cache
MOST_ROWS = 8  # from some more on, products take as long as their arithmetic
GAIN = 0.9  # of the time of `F.linear` is what a product may take
TURNS = 2
_SAMPLE, _PART = 1 << 26, 1 << 24  # bytes that are read to measure, of all and of one layer
_BLOCK = 32  # output features in a block of the weights, or more
Shape = tuple[int, ...]


class PassLinear(nn.Linear):
    """An ``nn.Linear``; in a pass that has `Pass.products`, by these."""

    def forward(self, input: Tensor) -> Tensor:
        running = running_pass()
        products: Any = None if running is None else running.products
        if products is None:
            return F.linear(input, self.weight, self.bias)
        return products(input, self.weight, self.bias)


class Products:
    """Of one patched model.

    Args:
        layers: of its text decoder and LM head.

    Attributes:
        layers: those whose products may take another way.
        quick: how many rows, 1 to `MOST_ROWS`, take less time so: by threads, then by the shape
            of the weights.
    """

    def __init__(self, layers: Iterable[nn.Linear]):
        plain = [layer for layer in layers if _is_plain(layer)]
        enough = sum(layer.weight.nbytes for layer in plain) >= LEAST_BYTES
        self.layers = plain if enough else []
        self.quick: dict[int, dict[Shape, frozenset[int]]] = {}
        self.rows: dict[Shape, frozenset[int]] = {}  # of `quick`, for the threads of now

    def attach(self) -> None:
        for layer in self.layers:
            if type(layer) is nn.Linear:  # one with a twin knows of products, too
                layer.__class__ = PassLinear

    def detach(self) -> None:
        for layer in self.layers:
            if type(layer) is PassLinear:
                layer.__class__ = nn.Linear

    def of_call(self) -> Products | None:
        """For a generate call; None where `F.linear` is as quick throughout."""
        layers = [layer for layer in self.layers if _is_plain(layer)]
        if not layers:
            return None
        threads = torch.get_num_threads()
        if threads not in self.quick:
            with torch.no_grad():
                self.quick[threads] = measured([layer.weight for layer in layers])
        self.rows = self.quick[threads]
        return self if any(self.rows.values()) else None

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What ``F.linear`` makes of them, but for rounding."""
        rows = input.numel() // input.shape[-1]
        if rows > MOST_ROWS or rows not in self.rows.get(weight.shape, ()):
            return F.linear(input, weight, bias)
        if not (_is_float32(weight) and _is_float32(input) and weight.is_contiguous()):
            return F.linear(input, weight, bias)
        out = product(input.reshape(rows, -1), weight).view(*input.shape[:-1], -1)
        return out if bias is None else out.add_(bias)


def product(input: Tensor, weight: Tensor) -> Tensor:
    """``input @ weight.T``, ``[R, K]`` and ``[N, K]`` to ``[R, N]``, contiguous."""
    out_features, in_features = weight.shape
    if len(input) > 1:
        return torch.mm(weight, input.t()).t().contiguous()
    blocks = 1
    while out_features % (2 * blocks) == 0 and out_features >= 2 * blocks * _BLOCK:
        blocks *= 2
    if blocks == 1:
        return F.linear(input, weight)
    apart = weight.view(blocks, -1, in_features)
    return torch.bmm(apart, input.t().expand(blocks, -1, -1)).view(1, out_features)


def measured(weights: list[Tensor]) -> dict[Shape, frozenset[int]]:
    """How many rows take less time by `product`, by the shape of the weights.

    All are gone through in the order of a pass, so that no cache holds what comes next.
    """
    sample = _sample(weights)
    found: dict[Shape, set[int]] = {shape: set() for shape, _ in sample}
    for rows in range(1, MOST_ROWS + 1):
        inputs = {part.shape[1]: part.new_ones(rows, part.shape[1]) for _, part in sample}
        turns = [
            [_seconds(way, sample, inputs) for way in (F.linear, product)] for _ in range(TURNS)
        ]
        for shape, counts in found.items():
            usual, other = (min(times[shape] for times in way) for way in zip(*turns))
            if other < GAIN * usual:
                counts.add(rows)
    return {shape: frozenset(counts) for shape, counts in found.items()}


def _sample(weights: list[Tensor]) -> list[tuple[Shape, Tensor]]:
    """The first of them, and of each shape at least one, or part of it."""
    sample: list[tuple[Shape, Tensor]] = []
    size = 0
    for weight in weights:
        shape = tuple(weight.shape)
        if size < _SAMPLE or shape not in dict(sample):
            most = max(1, _PART // (_BLOCK * weight[0].nbytes)) * _BLOCK
            sample.append((shape, weight[:most]))
            size += sample[-1][1].nbytes
    return sample


def _seconds(
    way: Callable[[Tensor, Tensor], Tensor],
    sample: list[tuple[Shape, Tensor]],
    inputs: dict[int, Tensor],
) -> dict[Shape, float]:
    seconds: dict[Shape, float] = defaultdict(float)
    for shape, part in sample:
        begin = time.thread_time()
        way(inputs[part.shape[1]], part)
        seconds[shape] += time.thread_time() - begin
    return seconds


def _is_plain(layer: nn.Linear) -> bool:
    weight = layer.weight
    known = "forward" not in vars(layer) and isinstance(layer, nn.Linear)
    return known and _is_float32(weight) and weight.is_contiguous() and weight.dim() == 2


def _is_float32(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype is torch.float32
        and tensor.device.type == "cpu"
    )

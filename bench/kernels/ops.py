"""The ops at real sizes: inputs, what each must compute, the bytes it must move, its rivals."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import std_kernels as sk
from bench.kernels import checks, rivals
from bench.kernels.libraries import Rival, Tensors
from bench.kernels.points import SCORING, TAIL, Point
from bench.kernels.recurrent import Convolution, Rule
from std_decode.weights import quantize

# A rival may round where ours does not: what is further off than this computes something else.
MOST_EXCESS = 4.0


@dataclass
class Case:
    """One op at one size, with its inputs allocated."""

    bytes: int  # each input read once, each output written once
    run: Callable[[], Any]
    check: Callable[[], float]  # the error, over what is allowed; above 1 is wrong
    rivals: dict[str, Rival] = field(default_factory=dict)
    note: str = ""
    # The error of a rival's result, over what our op is allowed; None where it cannot be said.
    check_rival: Callable[[Rival, Any], float] | None = None
    # What a Triton kernel gives beyond right results, if it does: the same bits whatever T.
    promise: Callable[[], bool] | None = None


def copy_case(device: torch.device, numel: int = 1 << 29) -> Case:
    """A device-to-device copy, the ceiling that every share is of; numel 4-byte elements."""
    source, target = torch.randn(2, numel, device=device).unbind()
    return Case(8 * numel, lambda: target.copy_(source), lambda: 0.0)


class Inputs:
    """Makes the case of a point. Keys and values are kept for the next point that has the same."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.cached: tuple[Any, ...] = ()
        self.generator = torch.Generator(device)

    def case(self, point: Point) -> Case:
        # The same numbers whatever was made before.
        self.generator.manual_seed(zlib.crc32(repr(point).encode()))
        made = _CASES[point.op](self, point)
        made.rivals = {name: rival for name, rival in made.rivals.items() if rival is not None}
        return made

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def forget(self) -> None:
        """Free the keys and values."""
        self.cached = ()

    def attention(self, point: Point, T: int, listed: Tensor | None = None) -> Tensors:
        """Query, keys and values, a few of which every query or some one query weighs heavily.

        Among random keys none matters: a mask that is off by one key would pass unnoticed.
        """
        model = point.model
        B, N, D = point.batch, point.context, model.head_dim
        shape = B, model.kv_heads, N, D
        if not self.cached or self.cached[0] != shape:
            self.forget()
            self.cached = shape, self.normal(*shape), self.normal(*shape)
        _, key, value = self.cached
        query = self.normal(B, model.heads, T, D)
        if listed is None:
            listed = torch.tensor([0, N // 2], device=self.device).expand(B, model.kv_heads, 2)
        _plant(query, key, listed)
        kv_len = torch.full((B,), N, dtype=torch.int32, device=self.device)
        return Tensors(query, key, value, kv_len)


def _plant(query: Tensor, key: Tensor, listed: Tensor) -> None:
    """Make keys that stand out: those at `listed` [B, Hkv, 2], and each query's own and next.

    Query t must see the key at its own position and not the one after it; both are like it.
    """
    N, T = key.shape[2], query.shape[2]
    groups = query.unflatten(1, (key.shape[1], -1))  # [B, Hkv, G, T, D]
    t = torch.arange(T, device=query.device)
    own, before = (groups[:, :, t % groups.shape[2], at] for at in (t, t - 1))
    # A logit of about log N, so that such a key weighs as much as all others together.
    size = math.log(N) / query.shape[3] ** 0.5
    key[:, :, N - T :] = own * size if T == 1 else (own + before) * size
    at = listed.long()[..., None].expand(-1, -1, -1, key.shape[3])
    key.scatter_(2, at, torch.stack((own[:, :, 0], own[:, :, -1]), 2) * size)


def _verify(inputs: Inputs, point: Point, scores: bool = False) -> Case:
    given = inputs.attention(point, point.tokens)
    query, key = given.query, given.key
    guess = torch.full(query.shape[:3], math.log(point.context) + 2, device=inputs.device)
    moved = 2 * key.nbytes + 2 * query.nbytes + (4 * key[..., 0].numel() if scores else 0)
    expected: list[checks.Attention] = []

    def right() -> checks.Attention:
        if not expected:
            expected.append(checks.dense(*given, guess if scores else None))
        return expected[0]

    def run() -> Any:
        if scores:
            return sk.verify_attention_with_scores(*given, guess)
        return sk.verify_attention(*given)

    def check_rival(rival: Rival, result: Any) -> float:
        return right().of_rival(rival.output(result), rival.causal)

    def promise() -> bool:
        alone = sk.verify_attention(query[:, :, -1:], *given[1:])
        return all(torch.equal(x[:, :, -1:], one) for x, one in zip(run(), alone))

    return Case(
        moved,
        run,
        lambda: right().of_ours(*run()),
        rivals.with_scores(given, guess) if scores else rivals.dense(given),
        "" if point.tokens == 1 else "sdpa rivals unmasked",
        check_rival,
        promise,
    )


def _verify_with_scores(inputs: Inputs, point: Point) -> Case:
    return _verify(inputs, point, scores=True)


def _select(inputs: Inputs, point: Point) -> Case:
    model, k = point.model, point.keys
    # Probabilities, as score_keys gives them, of all layers: they are selected in one call.
    shape = model.layers, point.batch, model.kv_heads, point.context
    scores = torch.softmax(2 * inputs.normal(*shape, dtype=torch.float32), -1)
    moved = 4 * scores.numel() + 4 * scores.numel() // point.context * k

    def check_rival(rival: Rival, result: Any) -> float:
        best = scores.gather(-1, sk.select_topk(scores, k).long())
        theirs = scores.gather(-1, rival.output(result).long())
        # Equal scores may be taken in any order.
        same = torch.equal(*(x.sort(-1).values for x in (best, theirs)))
        return 0.0 if same else math.inf

    return Case(
        moved,
        lambda: sk.select_topk(scores, k),
        lambda: checks.select_topk(scores, k, sk.select_topk(scores, k)),
        rivals.select(scores, k),
        f"{model.layers} layers",
        check_rival,
    )


def _sparse(inputs: Inputs, point: Point) -> Case:
    B, N, K, heads = point.batch, point.context, point.keys, point.model.kv_heads
    order = torch.rand(B, heads, N - TAIL, generator=inputs.generator, device=inputs.device)
    indices = order.argsort(-1)[..., :K].sort(-1).values.to(torch.int32)
    del order
    given = inputs.attention(point, point.tokens, indices[..., [0, -1]])
    tail_start = given.kv_len - TAIL
    moved = 2 * B * heads * (K + TAIL) * point.model.head_dim * given.key.itemsize
    moved += indices.nbytes + 2 * given.query.nbytes
    expected: list[checks.Attention] = []

    def right() -> checks.Attention:
        if not expected:
            expected.append(checks.sparse(*given[:3], indices, tail_start, given.kv_len))
        return expected[0]

    def run() -> Any:
        return sk.sparse_attention(*given[:3], indices, tail_start, given.kv_len)

    return Case(
        moved,
        run,
        lambda: right().of_ours(*run()),
        rivals.sparse(given, indices, TAIL),
        f"and the last {TAIL} keys",
        lambda rival, result: right().of_rival(rival.output(result), rival.causal),
    )


def _score(inputs: Inputs, point: Point) -> Case:
    query, key, _, kv_len = inputs.attention(point, SCORING)
    B, heads, N = key.shape[:3]
    work = 4 * B * query.shape[1] * SCORING * N * key.shape[3] / 1e9

    def error(got: Tensor) -> float:
        return checks.score_keys(query, key, kv_len, got)

    return Case(
        key.nbytes + query.nbytes + 4 * B * heads * N,
        lambda: sk.score_keys(query, key, kv_len),
        lambda: error(sk.score_keys(query, key, kv_len)),
        rivals.scoring(query, key),
        f"W {SCORING}, {work:.0f} GFLOP in two passes",
        lambda rival, result: error(rival.output(result)),
    )


def _int4_linear(inputs: Inputs, point: Point) -> Case:
    """The product with the 4-bit weights of a draft, beside others' and that with whole ones."""
    shape = point.matrix_shape
    weight = inputs.normal(*shape) / shape[1] ** 0.5
    given = inputs.normal(point.batch, shape[1])
    copy = quantize.quantize(weight)
    packed = quantize.pack(copy.values, copy.group)
    moved = quantize.nbytes(*shape) + given.itemsize * point.batch * sum(shape)

    def run() -> Tensor:
        return sk.int4_linear(given, packed, copy.scales)

    def error(product: Tensor) -> float:
        return checks.int4_linear(given, copy.values, copy.scales, product)

    kind = str(inputs.dtype).removeprefix("torch.")
    return Case(
        moved,
        run,
        lambda: error(run()),
        rivals.linear(given, weight, copy, packed),
        f"GB/s of 4-bit bytes; dense: {kind}",
        lambda rival, result: error(rival.output(result)),
    )


def _gated_delta_rule(inputs: Inputs, point: Point) -> Case:
    rule = Rule(point, inputs.normal)
    state = rule.state.clone()  # what is timed renews it each time
    return Case(
        rule.bytes,
        lambda: rule.run(state),
        rule.check,
        rule.rivals(),
        f"after {point.tokens} accepted",
        lambda rival, result: rule.error(rival.output(result)),
    )


def _causal_conv1d(inputs: Inputs, point: Point) -> Case:
    conv = Convolution(point, inputs.normal)
    return Case(
        conv.bytes,
        conv.run,
        lambda: conv.error(conv.run()),
        conv.rivals(),
        check_rival=lambda rival, result: conv.error(rival.output(result)),
    )


_CASES: dict[str, Callable[[Inputs, Point], Case]] = {
    "verify_attention": _verify,
    "verify_attention_with_scores": _verify_with_scores,
    "select_topk": _select,
    "sparse_attention": _sparse,
    "score_keys": _score,
    "int4_linear": _int4_linear,
    "gated_delta_rule": _gated_delta_rule,
    "causal_conv1d": _causal_conv1d,
}

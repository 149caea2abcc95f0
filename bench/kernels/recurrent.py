"""The ops of layers that keep a state, at real sizes: what they must give, and their rivals.

A pass goes over T tokens that were accepted since the state was stored, and T new ones. Here they
lie in the ring from its first slot on, so that a rival takes the same tensors as a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import std_kernels as sk
from bench.kernels import libraries
from bench.kernels.checks import FLOORS, excess, rows_of
from bench.kernels.libraries import Rival, Rivals
from bench.kernels.points import Point
from bench.models.dimensions import CONVOLUTION, HEAD
from std_kernels import reference

Drawn = Callable[..., Tensor]  # normal numbers of a shape, and of a dtype if one is named


class Rule:
    """The gated delta rule's arguments, as a layer has them."""

    def __init__(self, point: Point, normal: Drawn):
        heads = point.model.recurrent
        assert heads is not None
        B, T, Hk, Hv = point.batch, point.tokens, heads.key_heads, heads.value_heads
        self.T = T
        self.query = normal(B, T, Hk, HEAD)
        # Nearly alike, so that a value is replaced and not only added.
        self.key = normal(B, 2 * T, Hk, HEAD) + 2 * normal(1, 1, 1, HEAD)
        self.value = 3 * normal(B, 2 * T, Hv, HEAD)
        self.g = F.logsigmoid(2 + normal(B, 2 * T, Hv, dtype=torch.float32))
        self.beta = normal(B, 2 * T, Hv).sigmoid()
        self.state = F.normalize(normal(B, Hv, HEAD, HEAD, dtype=torch.float32), dim=2) * 4
        self.state_len = torch.zeros(B, dtype=torch.int32, device=self.state.device)
        self.kv_len = self.state_len + 2 * T

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value, self.g, self.beta

    @property
    def bytes(self) -> int:
        """The state once more, where it is stored, and the results."""
        results = self.value.nbytes // 2
        return sum(x.nbytes for x in self.inputs) + 2 * self.state.nbytes + results

    def run(self, state: Tensor) -> Tensor:
        return sk.gated_delta_rule(*self.inputs, state, self.state_len, self.kv_len)

    def error(self, out: Tensor, state: Tensor | None = None) -> float:
        """Over what is allowed, of some rows and heads; that of the stored state as well."""
        Hv, worst = self.value.shape[2], 0.0
        shared = Hv // self.key.shape[2]
        for b in rows_of(len(self.query)):
            for h in rows_of(Hv):
                one, of = slice(b, b + 1), slice(h, h + 1)
                by = slice(h // shared, h // shared + 1)
                given = (self.query[one, :, by], self.key[one, :, by], self.value[one, :, of],
                         self.g[one, :, of], self.beta[one, :, of], self.state[one, of],
                         self.state_len[one], self.kv_len[one])  # fmt: skip
                found = [out[one, :, of]] + ([] if state is None else [state[one, of]])
                with torch.device(out.device):
                    exact = reference.gated_delta_rule(*given)
                    plain = reference.gated_delta_rule(*given, dtype=torch.float32)
                for got, right, other in zip(found, exact, plain):
                    floor = FLOORS[got.dtype] * float(right.abs().max())
                    off = float((other - right).abs().max())
                    worst = max(worst, excess(got, right, off, floor))
        return worst

    def check(self) -> float:
        state = self.state.clone()
        return self.error(self.run(state), state)

    def rivals(self) -> Rivals:
        found = {"transformers": self.rival(self._transformers)}
        if self.query.is_cuda:
            found |= libraries.installed({"fla": lambda: self.rival(self._fla)})
        return found

    def rival(self, prepare: Callable[..., Callable[[], Any]]) -> Rival:
        """It goes over all tokens as one sequence, and keeps the state after the last of them."""
        queries = torch.cat((torch.zeros_like(self.query), self.query), 1)
        options = dict(
            initial_state=self.state, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        return Rival(
            partial(prepare, queries, options),
            lambda result: result[0][:, -self.T :],
            extra=4 * self.state.nbytes,
        )

    def _fla(self, query: Tensor, options: dict[str, Any]) -> Callable[[], Any]:
        op = import_module("fla.ops.gated_delta_rule").fused_recurrent_gated_delta_rule
        _, k, v, g, beta = self.inputs
        return partial(op, q=query, k=k, v=v, g=g, beta=beta, **options)

    def _transformers(self, query: Tensor, options: dict[str, Any]) -> Callable[[], Any]:
        code = import_module("transformers.models.qwen3_next.modeling_qwen3_next")
        shared = self.value.shape[2] // self.key.shape[2]
        q, k = (x.repeat_interleave(shared, dim=2) for x in (query, self.key))
        function = code.torch_recurrent_gated_delta_rule
        return partial(function, q, k, self.value, g=self.g, beta=self.beta, **options)


class Convolution:
    """The arguments of the short convolution before it."""

    def __init__(self, point: Point, normal: Drawn):
        assert point.model.recurrent is not None
        B, self.T, C = point.batch, point.tokens, point.model.recurrent.channels
        self.inputs = normal(B, self.T + CONVOLUTION - 1, C)
        self.weight = normal(C, CONVOLUTION) / 2
        length = self.inputs.shape[1]
        self.kv_len = torch.full((B,), length, dtype=torch.int32, device=self.inputs.device)

    @property
    def bytes(self) -> int:
        results = self.T * self.inputs[:, 0].nbytes
        return self.inputs.nbytes + self.weight.nbytes + results

    def run(self) -> Tensor:
        return sk.causal_conv1d(self.inputs, self.weight, self.kv_len, self.T, silu=True)

    def error(self, out: Tensor) -> float:
        rows = rows_of(len(self.inputs))
        given = self.inputs[rows], self.weight, self.kv_len[rows], self.T
        with torch.device(out.device):
            exact = reference.causal_conv1d(*given, silu=True)
            plain = reference.causal_conv1d(*given, silu=True, dtype=out.dtype)
        off = float((plain - exact).abs().max())
        floor = FLOORS[out.dtype] * float(exact.abs().max())
        return excess(out[rows], exact, off, floor)

    def rivals(self) -> Rivals:
        found = {"conv1d": self.rival(self._conv1d)}
        if self.inputs.is_cuda:
            found |= libraries.installed({"causal-conv1d": lambda: self.rival(self._library)})
        return found

    def rival(self, prepare: Callable[..., Callable[[], Any]]) -> Rival:
        channels = self.inputs.mT  # [B, C, T + W - 1]
        return Rival(
            partial(prepare, channels),
            lambda out: out[..., -self.T :].mT,
            extra=2 * self.inputs.nbytes,
        )

    def _conv1d(self, channels: Tensor) -> Callable[[], Any]:
        kernel = self.weight[:, None]
        return lambda: F.silu(F.conv1d(channels, kernel, groups=len(kernel)))

    def _library(self, channels: Tensor) -> Callable[[], Any]:
        op = import_module("causal_conv1d").causal_conv1d_fn
        return partial(op, channels, self.weight, activation="silu")

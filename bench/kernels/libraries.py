"""Attention and 4-bit products of other libraries, where they are installed.

A library gets views of the same tensors in its own layout; nothing is copied in what is timed. A
dense cache [B, Hkv, N, D] becomes pages without a copy if each KV head of each row is a request.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Module by name of the rival; flash_attn_interface is FlashAttention-3.
LIBRARIES = {
    "flash-attn": "flash_attn",
    "flash-attn-3": "flash_attn_interface",
    "flashinfer": "flashinfer",
    "xformers": "xformers",
    "gemlite": "gemlite",
    "fla": "fla",
    "causal-conv1d": "causal_conv1d",
}
PAGE = 64  # keys, for what takes pages
TORCH_PAGE = 256  # the least that FlashAttention's kernels in torch take
WORKSPACE = 256 << 20  # bytes that flashinfer is given for its partial results


class Tensors(NamedTuple):
    """What an attention op is given."""

    query: Tensor  # [B, Hq, T, D]
    key: Tensor  # [B, Hkv, N, D]
    value: Tensor
    kv_len: Tensor  # [B]


@dataclass
class Rival:
    """Another way to compute what an op does.

    Attributes:
        prepare: what is not timed (compiling, planning, layouts); returns the call that is.
        output: what the call returns as our op would: [B, Hq, T, D], scores or positions.
        compared: False if it computes something else by intent.
        causal: False if each of the T tokens sees those after it, too.
        extra: bytes it allocates besides its result.
    """

    prepare: Callable[[], Callable[[], Any]]
    output: Callable[[Any], Tensor] = lambda result: result
    compared: bool = True
    causal: bool = True
    extra: int = 0


Rivals = dict[str, Rival]


def absent() -> list[str]:
    """Libraries that are not installed."""
    return [name for name, module in LIBRARIES.items() if find_spec(module) is None]


def installed(made: dict[str, Callable[[], Rival]]) -> Rivals:
    return {name: make() for name, make in made.items() if find_spec(LIBRARIES[name]) is not None}


def flash(given: Tensors, module: str) -> Rival:
    """FlashAttention: [B, T, H, D]; its causal mask is aligned to the bottom right."""
    query, key, value, kv_len = given

    def prepare() -> Callable[[], Any]:
        function = import_module(module).flash_attn_with_kvcache
        inputs = (x.transpose(1, 2) for x in (query, key, value))
        return partial(function, *inputs, cache_seqlens=kv_len, causal=True)

    def output(result: Any) -> Tensor:
        out = result[0] if isinstance(result, tuple) else result
        return out.transpose(1, 2)

    return Rival(prepare, output)


def paged(given: Tensors, seen: Tensor | None, tail: int) -> Rival:
    """FlashInfer over pages of PAGE keys, or of one key: those of `seen` [B, Hkv, K + tail].

    Each KV head of each row is a request of G query heads, so that pages lie one after another.
    """
    query, key, value, _ = given
    B, Hkv, N, D = key.shape
    T, G = query.shape[2], query.shape[1] // Hkv
    requests = B * Hkv
    page = 1 if seen is not None else math.gcd(N, PAGE)

    def prepare() -> Callable[[], Any]:
        import flashinfer

        def numbers(*bounds: int) -> Tensor:
            return torch.arange(*bounds, dtype=torch.int32, device=query.device)

        if seen is None:
            each, indices = N // page, numbers(requests * (N // page))
        else:
            each = seen.shape[2]
            indices = (seen.flatten(0, 1) + N * numbers(requests)[:, None]).flatten()
        pages = tuple(x.view(-1, 1, page, D) for x in (key, value))
        rows = query.view(requests, G, T, D).transpose(1, 2).reshape(requests * T, G, D)
        indptr = numbers(requests + 1) * each
        last = torch.full_like(indptr[1:], page)
        sizes = indptr, indices, last, G, 1, D, page
        types = dict(q_data_type=query.dtype, kv_data_type=key.dtype)
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=query.device)
        if T == 1:
            # As its documentation advises for groups of four and more.
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "HND", use_tensor_cores=G >= 4
            )
            wrapper.plan(*sizes, **types)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
            wrapper.plan(numbers(requests + 1) * T, *sizes, causal=True, **types)
        return partial(wrapper.run, rows, pages)

    def output(out: Tensor) -> Tensor:
        return out.view(requests, T, G, D).transpose(1, 2).reshape(query.shape)

    return Rival(prepare, output, extra=WORKSPACE + 4 * requests * N // page)


def variable_length(given: Tensors) -> Rivals:
    """Of torch, as far as this one has them and they take these tensors."""
    if find_spec("torch.nn.attention.varlen") is None or given.key.dtype == torch.float32:
        return {}
    from torch.nn.attention.varlen import varlen_attn

    found = {"varlen": varlen(given, paged=False)}
    if "block_table" in signature(varlen_attn).parameters and given.key.shape[2] % TORCH_PAGE == 0:
        found["varlen-paged"] = varlen(given, paged=True)
    return found


def varlen(given: Tensors, paged: bool) -> Rival:
    """torch's variable-length attention, from keys in one piece or through a block table.

    Each KV head of each row is a sequence, as in `paged` above.
    """
    query, key, value, kv_len = given
    B, Hkv, N, D = key.shape
    T, G = query.shape[2], query.shape[1] // Hkv
    sequences, pages = B * Hkv, N // TORCH_PAGE

    def prepare() -> Callable[[], Any]:
        from torch.nn.attention.varlen import varlen_attn

        def numbers(count: int, step: int) -> Tensor:
            return torch.arange(count, dtype=torch.int32, device=query.device) * step

        rows = query.view(sequences, G, T, D).transpose(1, 2).reshape(sequences * T, G, D)
        options: dict[str, Any] = dict(window_size=(-1, 0), enable_gqa=True)
        if paged:
            cache = (x.view(-1, TORCH_PAGE, 1, D) for x in (key, value))
            starts = None
            options |= dict(
                seqused_k=kv_len.repeat_interleave(Hkv),
                block_table=numbers(sequences * pages, 1).view(sequences, pages),
            )
        else:
            cache = (x.view(-1, 1, D) for x in (key, value))
            starts = numbers(sequences + 1, N)
        return partial(
            varlen_attn, rows, *cache, numbers(sequences + 1, T), starts, T, N, **options
        )

    def output(out: Tensor) -> Tensor:
        return out.view(sequences, T, G, D).transpose(1, 2).reshape(query.shape)

    return Rival(prepare, output)


def xformers(given: Tensors) -> Rival:
    """xFormers: [B, T, Hkv, G, D], keys expanded over the group with stride 0."""
    query, key, value, _ = given
    Hkv = key.shape[1]
    G, T = query.shape[1] // Hkv, query.shape[2]

    def prepare() -> Callable[[], Any]:
        fmha = import_module("xformers.ops.fmha")
        bias = None
        if T > 1:
            bias = import_module(
                "xformers.ops.fmha.attn_bias"
            ).LowerTriangularFromBottomRightMask()
        rows = query.unflatten(1, (Hkv, G)).permute(0, 3, 1, 2, 4)
        cache = (x.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, G, -1) for x in (key, value))
        return partial(fmha.memory_efficient_attention_forward, rows, *cache, attn_bias=bias)

    return Rival(prepare, lambda out: out.permute(0, 2, 3, 1, 4).reshape(query.shape))


def gemlite(given: Tensor, values: Tensor, scales: Tensor) -> Rival:
    """GemLite: (q - zero) * scale, both in the inputs' precision, a row of each for each group."""
    N, K = len(values), 2 * values.shape[1]

    def prepare() -> Callable[[], Any]:
        core = import_module("gemlite.core")
        dtype = core.TORCH_TO_DTYPE[given.dtype]
        layer = core.GemLiteLinearTriton(
            4, group_size=K // len(scales), in_features=K, out_features=N, input_dtype=dtype,
            output_dtype=dtype,
        )  # fmt: skip
        scale, zero = (x.float().T.reshape(-1, 1) for x in scales.unbind(-1))
        q = torch.stack((values >> 4, values & 15), dim=-1).flatten(1)
        layer.pack(q, scale.to(given.dtype), (8 - zero / scale).to(given.dtype), None)
        return partial(layer.forward, given)

    return Rival(prepare, extra=values.nbytes + 2 * values.numel())

"""What else computes the same as each op: torch's own ways, and libraries."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import std_kernels as sk
from bench.kernels import libraries
from bench.kernels.libraries import LIBRARIES, Rival, Rivals, Tensors
from std_decode.weights.quantize import Quantized

BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
NAMES = (*BACKENDS, "sdpa", "varlen", "varlen-paged", "flexattention", *LIBRARIES, "sdpa+eager",
         "torch.topk", "torch.topk+sort", "flashinfer+ties", "gather+sdpa", "eager",
         "dense-weights", "int4pack_mm", "partials", "transformers", "conv1d")  # fmt: skip


def _call(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[[], Any]:
    """A rival's `prepare` that has nothing to prepare."""
    return lambda: partial(function, *args, **options)


def dense(given: Tensors) -> Rivals:
    """Of verify_attention."""
    query, key, value, _ = given
    found = _sdpa(given)
    found["flexattention"] = Rival(partial(_flex_causal, given))
    if query.is_cuda:
        found |= libraries.variable_length(given)
        found |= libraries.installed({
            "flash-attn": partial(libraries.flash, given, "flash_attn"),
            "flash-attn-3": partial(libraries.flash, given, "flash_attn_interface"),
            "flashinfer": partial(libraries.paged, given, None, 0),
            "xformers": partial(libraries.xformers, given),
        })  # fmt: skip
    return found


def _sdpa(given: Tensors) -> Rivals:
    """Without a mask the G heads are rows like any other: the most a backend can share."""
    query, key, value, _ = given
    B, Hkv, _, D = key.shape
    packed = query.reshape(B, Hkv, -1, D)
    names = ("sdpa-flash", "sdpa-efficient", "sdpa-cudnn") if query.is_cuda else (
        "sdpa-flash", "sdpa-math")  # fmt: skip
    logits = 2 * packed[..., 0].numel() * key.shape[2] * 4
    found = {}
    for name in names:
        extra = logits if name == "sdpa-math" else 0
        call = _call(_with_backend, BACKENDS[name], packed, key, value)
        found[name] = Rival(call, lambda out: out.view(query.shape), causal=False, extra=extra)
    as_is = _call(F.scaled_dot_product_attention, query, key, value, enable_gqa=True)
    found["sdpa"] = Rival(as_is, causal=False)
    return found


def _with_backend(backend: SDPBackend, *args: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*args)


def _products(rows: Tensor, key: Tensor) -> Tensor:
    """Of `rows` [B, Hkv, R, D] with every key, float32 [B, Hkv, R, N], rounded only once.

    As bfloat16 they would have 8 bits, and the scores made of them be refused as wrong.
    """
    if not key.is_cuda or key.dtype == torch.float32:
        return rows.float() @ key.float().mT
    found = torch.bmm(rows.flatten(0, 1), key.flatten(0, 1).mT, out_dtype=torch.float32)
    return found.unflatten(0, key.shape[:2])


def with_scores(given: Tensors, guess: Tensor) -> Rivals:
    """Of verify_attention_with_scores: attention alone, and with a second pass for the scores."""
    query, key, value, _ = given
    B, Hkv, N, D = key.shape
    T, packed = query.shape[2], query.reshape(B, Hkv, -1, D)
    ahead = torch.ones(T, T, dtype=torch.bool, device=query.device).triu(1)
    ahead = ahead.repeat(query.shape[1] // Hkv, 1)

    def both() -> Any:
        out = F.scaled_dot_product_attention(packed, key, value)
        logits = _products(packed, key) * D**-0.5 - guess.view(B, Hkv, -1, 1)
        shares = logits.sigmoid_()
        shares[..., N - T :].masked_fill_(ahead, 0)
        return out, shares.sum(2)

    flash = _sdpa(given)["sdpa-flash"]
    extra = 3 * packed[..., 0].numel() * N * 4
    return {
        "sdpa-flash": flash,
        "sdpa+eager": Rival(
            lambda: both, lambda pair: pair[0].view(query.shape), causal=False, extra=extra
        ),
    }


def _compiled_flex(device: torch.device) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    if device.type == "cuda":
        # A kernel for each size, at its best there; otherwise the limit on recompiling is met.
        torch._dynamo.reset()
        return torch.compile(flex_attention, dynamic=False)
    # On the CPU one kernel for all lengths takes 4 seconds and is as fast.
    torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=True)


def _flex_causal(given: Tensors) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask

    query, key, value, _ = given
    T, N, device = query.shape[2], key.shape[2], query.device
    offset = torch.tensor(N - T, device=device)

    def causal(b: Tensor, h: Tensor, q: Tensor, n: Tensor) -> Tensor:
        return n <= q + offset

    mask = create_block_mask(causal, None, None, T, N, device=device)
    return partial(_compiled_flex(device), query, key, value, block_mask=mask, enable_gqa=True)


def sparse(given: Tensors, indices: Tensor, tail: int) -> Rivals:
    """Of sparse_attention over `indices` [B, Hkv, K] and the last `tail` keys."""
    query, key, value, _ = given
    B, Hkv, N, D = key.shape
    T, G = query.shape[2], query.shape[1] // Hkv
    last = torch.arange(N - tail, N, device=query.device, dtype=torch.int32)
    seen = torch.cat((indices, last.expand(B, Hkv, tail)), -1)  # [B, Hkv, K + tail]
    slots = seen.long()[..., None].expand(-1, -1, -1, D)
    packed = query.reshape(B, Hkv, G * T, D)

    def gathered() -> Tensor:
        return F.scaled_dot_product_attention(packed, key.gather(2, slots), value.gather(2, slots))

    found = {
        "gather+sdpa": Rival(
            lambda: gathered,
            lambda out: out.view(query.shape),
            causal=False,
            extra=2 * slots.numel() * key.itemsize,
        ),
        "flexattention": Rival(
            partial(_flex_listed, given, seen, tail), extra=3 * key[..., 0].numel()
        ),
    }
    if query.is_cuda:
        found |= libraries.installed({"flashinfer": partial(libraries.paged, given, seen, tail)})
    return found


def _flex_listed(given: Tensors, seen: Tensor, tail: int) -> Callable[[], Tensor]:
    """Blocks of keys that hold none of the listed are left out, by a mask made beforehand."""
    from torch.nn.attention.flex_attention import BlockMask

    query, key, value, _ = given
    B, Hkv, N, _ = key.shape
    T, G, block = query.shape[2], query.shape[1] // Hkv, 128
    listed = torch.zeros(B, Hkv, N, dtype=torch.bool, device=query.device)
    listed.scatter_(2, seen.long(), torch.ones_like(seen, dtype=torch.bool))
    offset = torch.tensor(N - T, device=query.device)

    def is_seen(b: Tensor, h: Tensor, q: Tensor, n: Tensor) -> Tensor:
        return listed[b, h // G, n] & (n <= q + offset)

    blocks = F.pad(listed, (0, -N % block)).unflatten(2, (-1, block)).any(-1)
    blocks = blocks.repeat_interleave(G, 1)[:, :, None]  # [B, Hq, 1, blocks]
    # Those that hold something, first and in order.
    order = blocks.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    count = blocks.sum(-1, dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(
        count, order, BLOCK_SIZE=block, mask_mod=is_seen, seq_lengths=(T, N)
    )
    flex = _compiled_flex(query.device)
    return partial(flex, query, key, value, block_mask=mask, enable_gqa=True)


def select(scores: Tensor, k: int) -> Rivals:
    """Of select_topk; torch.topk sorts by score, our op by position."""
    extra = 3 * scores.nbytes
    found = {
        "torch.topk": Rival(_call(scores.topk, k, dim=-1), lambda pair: pair[1], extra=extra),
        "torch.topk+sort": Rival(
            lambda: lambda: scores.topk(k, dim=-1).indices.sort(-1).values, extra=extra
        ),
    }
    if scores.is_cuda and find_spec("flashinfer") is not None:
        flashinfer = import_module("flashinfer")
        if hasattr(flashinfer, "top_k"):
            found |= _flashinfer_top_k(flashinfer, scores, k)
    return found


def _flashinfer_top_k(flashinfer: Any, scores: Tensor, k: int) -> Rivals:
    """As it comes, and with the lowest positions of equals, as our op takes them, if it can."""
    flat = scores.view(-1, scores.shape[-1])
    ways: dict[str, dict[str, Any]] = {"flashinfer": {}}
    if "tie_break" in signature(flashinfer.top_k).parameters:
        lowest = import_module("flashinfer.topk").TopKTieBreak.SMALL
        ways["flashinfer+ties"] = {"deterministic": True, "tie_break": lowest}
    return {
        name: Rival(
            _call(flashinfer.top_k, flat, k, **options),
            lambda pair: pair[1].view(*scores.shape[:-1], k),
        )
        for name, options in ways.items()
    }


def scoring(query: Tensor, key: Tensor) -> Rivals:
    """Of score_keys."""
    B, Hkv, N, D = key.shape
    W, G = query.shape[2], query.shape[1] // Hkv
    rows = query.reshape(B, Hkv, G * W, D)
    ahead = torch.ones(W, W, dtype=torch.bool, device=query.device).triu(1).repeat(G, 1)

    def eager() -> Tensor:
        logits = _products(rows, key) * D**-0.5
        logits[..., N - W :].masked_fill_(ahead, -math.inf)
        return logits.softmax(-1).mean(2)

    return {"eager": Rival(lambda: eager, extra=3 * 4 * rows[..., 0].numel() * N)}


def linear(given: Tensor, weight: Tensor, copy: Quantized, packed: Tensor) -> Rivals:
    """Of int4_linear: weights in the inputs' precision, other 4-bit products, ours unadded.

    On the CPU ours is PyTorch's.
    """
    found = {
        "dense-weights": Rival(_call(F.linear, given, weight), compared=False),
        "partials": Rival(
            _call(sk.int4_linear_partials, given, packed, copy.scales), lambda parts: parts.sum(0)
        ),
    }
    if given.is_cuda:
        found["int4pack_mm"] = Rival(partial(_int4pack_mm, given, copy), extra=packed.nbytes)
        found |= libraries.installed(
            {"gemlite": partial(libraries.gemlite, given, copy.values, copy.scales)}
        )
    return found


def _int4pack_mm(given: Tensor, copy: Quantized) -> Callable[[], Tensor]:
    """PyTorch's, which takes nothing but bfloat16."""
    # The more k-tiles of 16 side by side, the longer a thread's loads: 8 are 16 bytes.
    tiles = next(tiles for tiles in (8, 4, 2) if given.shape[1] % (16 * tiles) == 0)
    packed = torch.ops.aten._convert_weight_to_int4pack(copy.values, tiles)
    rows = given.bfloat16()
    return partial(torch.ops.aten._weight_int4pack_mm, rows, packed, copy.group, copy.scales)

"""What else computes the same: torch's own ways, and libraries where they are installed.

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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
# Module by name of the rival; flash_attn_interface is FlashAttention-3.
LIBRARIES = {
    "flash-attn": "flash_attn",
    "flash-attn-3": "flash_attn_interface",
    "flashinfer": "flashinfer",
    "xformers": "xformers",
}
NAMES = (*BACKENDS, "sdpa", "flexattention", *LIBRARIES, "sdpa+eager", "torch.topk",
         "torch.topk+sort", "gather+sdpa", "eager", "dense-weights")  # fmt: skip
PAGE = 64  # keys, for what takes pages
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


def _installed(made: dict[str, Callable[[], Rival]]) -> Rivals:
    return {name: make() for name, make in made.items() if find_spec(LIBRARIES[name]) is not None}


def _call(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[[], Any]:
    """A rival's `prepare` that has nothing to prepare."""
    return lambda: partial(function, *args, **options)


def dense(given: Tensors) -> Rivals:
    """Of verify_attention."""
    query, key, value, _ = given
    found = _sdpa(given)
    found["flexattention"] = Rival(partial(_flex_causal, given))
    if query.is_cuda:
        found |= _installed({
            "flash-attn": partial(_flash, given, "flash_attn"),
            "flash-attn-3": partial(_flash, given, "flash_attn_interface"),
            "flashinfer": partial(_flashinfer, given, None, 0),
            "xformers": partial(_xformers, given),
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


def with_scores(given: Tensors, guess: Tensor) -> Rivals:
    """Of verify_attention_with_scores: attention alone, and with a second pass for the scores."""
    query, key, value, _ = given
    B, Hkv, N, D = key.shape
    T, packed = query.shape[2], query.reshape(B, Hkv, -1, D)
    ahead = torch.ones(T, T, dtype=torch.bool, device=query.device).triu(1)
    ahead = ahead.repeat(query.shape[1] // Hkv, 1)

    def both() -> Any:
        out = F.scaled_dot_product_attention(packed, key, value)
        logits = (packed @ key.mT).float() * D**-0.5 - guess.view(B, Hkv, -1, 1)
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
        found |= _installed({"flashinfer": partial(_flashinfer, given, seen, tail)})
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


def _flash(given: Tensors, module: str) -> Rival:
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


def _flashinfer(given: Tensors, seen: Tensor | None, tail: int) -> Rival:
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


def _xformers(given: Tensors) -> Rival:
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
            flat = scores.view(-1, scores.shape[-1])
            found["flashinfer"] = Rival(
                _call(flashinfer.top_k, flat, k), lambda pair: pair[1].view(*scores.shape[:-1], k)
            )
    return found


def scoring(query: Tensor, key: Tensor) -> Rivals:
    """Of score_keys."""
    B, Hkv, N, D = key.shape
    W, G = query.shape[2], query.shape[1] // Hkv
    rows = query.reshape(B, Hkv, G * W, D)
    ahead = torch.ones(W, W, dtype=torch.bool, device=query.device).triu(1).repeat(G, 1)

    def eager() -> Tensor:
        logits = (rows @ key.mT).float() * D**-0.5
        logits[..., N - W :].masked_fill_(ahead, -math.inf)
        return logits.softmax(-1).mean(2)

    return {"eager": Rival(lambda: eager, extra=3 * 4 * rows[..., 0].numel() * N)}


def linear(given: Tensor, weight: Tensor) -> Rivals:
    """Of the product with 4-bit weights: the same with weights in the inputs' precision."""
    return {"dense-weights": Rival(_call(F.linear, given, weight), compared=False)}

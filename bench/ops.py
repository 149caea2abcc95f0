"""The ops at real sizes: what each must compute, the bytes it must move, and its rivals."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import std_kernels as sk
from std_decode import quantize
from std_kernels import reference

# A 7B video LLM: 28 layers, 28 query heads, 4 KV heads, head dim 128.
LAYERS, HQ, HKV, D = 28, 28, 4, 128
DTYPE = torch.bfloat16
UP, DOWN, HEAD = (18944, 3584), (3584, 18944), (152064, 3584)  # its MLP and LM head
BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass
class Case:
    """One op at one size, with its inputs allocated."""

    op: str
    size: str
    bytes: int  # each input read once, each output written once
    run: Callable[[], Any]
    check: Callable[[], float]  # the error, over what is allowed; above 1 is wrong
    rivals: dict[str, Callable[[], Any]] = field(default_factory=dict)
    note: str = ""


def cases(device: torch.device, small: bool = False) -> Iterator[Callable[[], Case]]:
    """What to time, most important first; each is called when its turn comes.

    Args:
        device: where inputs live.
        small: tiny sizes, to run the code where speed means nothing.
    """
    cut, least = (256, 1) if small else (1, 64)
    for B, N, T in ((1, 131072, 5), (16, 32768, 5), (1, 25088, 5), (1, 131072, 1)):
        yield partial(_verify, device, min(B, least), N // cut, T)
    yield partial(_verify, device, min(16, least), 32768 // cut, 5, scores=True)
    for B, N, k in ((1, 131072, 1024), (1, 25088, 1024), (16, 32768, 1024)):
        yield partial(_select, device, min(B, least), N // cut, k // cut, small)
    for B, N, K in ((1, 131072, 1024), (16, 32768, 1024), (1, 131072, 3072)):
        yield partial(_sparse, device, min(B, least), N // cut, K // cut)
    for rows, shape in ((1, UP), (4, UP), (16, UP), (32, UP), (1, DOWN), (1, HEAD)):
        yield partial(_int4_linear, device, rows, (64, 256) if small else shape)
    for B, N in ((1, 25088), (1, 131072), (16, 32768)):
        yield partial(_score, device, min(B, least), N // cut, 64)


def copy_case(device: torch.device, numel: int = 1 << 29) -> Case:
    """A device-to-device copy, the ceiling that every share is of; numel 4-byte elements."""
    source, target = torch.randn(2, numel, device=device).unbind()
    return Case("copy", f"{numel * 4 / 1e9:.1f} GB", 8 * numel, lambda: target.copy_(source),
                lambda: 0.0)  # fmt: skip


def _cache(device: torch.device, B: int, N: int, T: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query = 2 * torch.randn(B, HQ, T, D, device=device, dtype=DTYPE)
    key, value = torch.randn(2, B, HKV, N, D, device=device, dtype=DTYPE).unbind()
    return query, key, value, torch.full((B,), N, dtype=torch.int32, device=device)


def _excess(got: Tensor, exact: Tensor, plain: Tensor, floor: float) -> float:
    """Error over what is allowed: twice plain torch's at the same precision, and a floor."""
    if got.isnan().any():
        return math.inf
    error = (got.double() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + floor
    return float(error / allowed)


def _rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The first and the last batch row: float64 references of a whole batch are too large."""
    for b in sorted({0, len(tensors[0]) - 1}):
        yield tuple(tensor[b : b + 1] for tensor in tensors)


def _verify(device: torch.device, B: int, N: int, T: int, scores: bool = False) -> Case:
    query, key, value, kv_len = _cache(device, B, N, T)
    guess = torch.full((B, HQ, T), math.log(N) + 2, device=device)
    kv = 2 * key.numel() * key.element_size()
    moved = kv + 2 * query.numel() * query.element_size() + (4 * B * HKV * N if scores else 0)

    def run() -> Any:
        if scores:
            return sk.verify_attention_with_scores(query, key, value, kv_len, guess)
        return sk.verify_attention(query, key, value, kv_len)

    def check() -> float:
        worst = 0.0
        results = run()
        for row in _rows(query, key, value, kv_len, guess, *results):
            out, lse, *rest = row[5:]
            with torch.device(device):
                exact = reference.verify_attention_with_scores(*row[:5])
                plain = reference.verify_attention(*row[:4], dtype=DTYPE)
            worst = max(worst, _excess(out, exact[0], plain[0], 2**-8))
            worst = max(worst, _excess(lse, exact[1], exact[1].float(), 1e-4))
            for got in rest:
                worst = max(worst, _excess(got, exact[2], exact[2].float(), 1e-4))
        return worst

    # Without a mask the G heads are rows like any other: the most a backend can share.
    packed = query.view(B, HKV, HQ // HKV * T, D)
    rivals: dict[str, Callable[[], Any]] = {
        name: partial(_sdpa, backend, packed, key, value) for name, backend in BACKENDS.items()
    }
    rivals["sdpa as is"] = lambda: F.scaled_dot_product_attention(
        query, key, value, enable_gqa=True
    )
    name = "verify_attention_with_scores" if scores else "verify_attention"
    return Case(name, f"B {B}, N {N}, T {T}", moved, run, check, rivals, "rivals unmasked")


def _sdpa(backend: SDPBackend, *args: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*args)


def _select(device: torch.device, B: int, N: int, k: int, small: bool) -> Case:
    layers = 2 if small else LAYERS
    # Probabilities, as score_keys gives them.
    scores = torch.softmax(2 * torch.randn(layers, B, HKV, N, device=device), -1)
    moved = 4 * scores.numel() + 4 * scores.numel() // N * k

    def check() -> float:
        # Random floats tie: torch.topk may take any of the equals, so compare with a sort.
        got = sk.select_topk(scores, k)
        order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        wanted = order.sort(dim=-1).values.to(torch.int32)
        return 0.0 if torch.equal(got, wanted) else math.inf

    rivals = {"torch.topk": lambda: scores.topk(k, dim=-1)}
    size = f"[{layers * B * HKV}, {N}], k {k}"
    return Case("select_topk", size, moved, lambda: sk.select_topk(scores, k), check, rivals,
                "torch.topk sorts by score")  # fmt: skip


def _sparse(device: torch.device, B: int, N: int, K: int) -> Case:
    query, key, value, kv_len = _cache(device, B, N, 1)
    tail = min(64, N // 4)
    tail_start = kv_len - tail
    order = torch.rand(B, HKV, N - tail, device=device).argsort(-1)[..., :K]
    indices = order.sort(-1).values.to(torch.int32)
    moved = 2 * 2 * B * HKV * (K + tail) * D + 4 * indices.numel() + 4 * query.numel()

    def run() -> Any:
        return sk.sparse_attention(query, key, value, indices, tail_start, kv_len)

    def check() -> float:
        worst = 0.0
        results = run()
        for row in _rows(query, key, value, indices, tail_start, kv_len, *results):
            with torch.device(device):
                exact = reference.sparse_attention(*row[:6])
                plain = reference.sparse_attention(*row[:6], dtype=DTYPE)
            worst = max(worst, _excess(row[6], exact[0], plain[0], 2**-8))
            worst = max(worst, _excess(row[7], exact[1], exact[1].float(), 1e-4))
        return worst

    tail_at = torch.arange(N - tail, N, device=device).expand(B, HKV, tail)
    slots = torch.cat((indices.long(), tail_at), -1)[..., None].expand(-1, -1, -1, D)
    packed = query.view(B, HKV, HQ // HKV, D)

    def gathered() -> Tensor:
        return F.scaled_dot_product_attention(packed, key.gather(2, slots), value.gather(2, slots))

    size = f"B {B}, N {N}, K {K} + {tail}"
    return Case("sparse_attention", size, moved, run, check, {"gather + sdpa": gathered})


def _int4_linear(device: torch.device, rows: int, shape: tuple[int, int]) -> Case:
    """PyTorch's matmul with the 4-bit weights of a draft, beside that with bfloat16 ones."""
    weight = torch.randn(shape, device=device, dtype=DTYPE) / shape[1] ** 0.5
    given = torch.randn(rows, shape[1], device=device, dtype=DTYPE)
    copy = quantize.quantize(weight)
    packed = quantize.pack(copy.values)
    moved = quantize.nbytes(*shape) + 2 * rows * sum(shape)

    def run() -> Tensor:
        return quantize.linear(given, packed, copy.scales, copy.group, None)

    def check() -> float:
        rounded = quantize.dequantize(copy)
        worst = 0.0
        for part, got in zip(rounded.split(4096), run().split(4096, dim=1)):
            exact = F.linear(given.double(), part.double())
            worst = max(worst, _excess(got, exact, F.linear(given, part.to(DTYPE)), 2**-8))
        return worst

    size = f"{rows} x [{shape[0]}, {shape[1]}]"
    rivals = {"bfloat16 weights": lambda: F.linear(given, weight)}
    return Case("int4 linear", size, moved, run, check, rivals, "of PyTorch; GB/s of 4-bit bytes")


def _score(device: torch.device, B: int, N: int, W: int) -> Case:
    query, key, _, kv_len = _cache(device, B, N, W)
    moved = key.numel() * 2 + query.numel() * 2 + 4 * B * HKV * N

    def check() -> float:
        worst = 0.0
        for row in _rows(query, key, kv_len, sk.score_keys(query, key, kv_len)):
            with torch.device(device):
                exact = reference.score_keys(*row[:3])
                plain = reference.score_keys(*row[:3], dtype=torch.float32)
            worst = max(worst, _excess(row[3], exact, plain, 1e-6))
        return worst

    ahead = torch.ones(W, W, dtype=torch.bool, device=device).triu(1).repeat(HQ // HKV, 1)

    def eager() -> Tensor:
        rows = query.view(B, HKV, HQ // HKV * W, D)
        logits = (rows @ key.mT).float() * D**-0.5
        logits[..., N - W :].masked_fill_(ahead, -math.inf)
        return logits.softmax(-1).mean(2)

    size = f"B {B}, N {N}, W {W}"
    work = f"{4 * B * HQ * W * N * D / 1e9:.0f} GFLOP in two passes"
    return Case("score_keys", size, moved, lambda: sk.score_keys(query, key, kv_len), check,
                {"eager": eager}, work)  # fmt: skip

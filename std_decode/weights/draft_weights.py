"""What ``patch(draft_weights=...)`` asks for: twins or none, or what the cost model says."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from std_decode.costs import expected
from std_decode.costs.hardware import H100, gpu
from std_decode.costs.memory import free_memory, gigabytes
from std_decode.costs.workload import Device, Workload, expected_tokens
from std_decode.stats import DecodeStats
from std_decode.weights import room, twin_cache
from std_decode.weights.twins import Twins, local

# "auto" has to decide before any prompt is seen, so it goes by one that people patch for, and by
# what a pretrained model's drafts came to (bench/results/draft-weights-tried.md), which the first
# rounds put right: see `DraftWeights.measured`.
CONTEXT, ACCEPTANCE, MOST_DRAFTS = 25_000, 0.8, 16
LEAST_GAIN = 1.05  # over drafting with the model's own weights, and over not drafting
CACHED = 64 << 20  # weights of so few bytes are read from a cache, where fewer are no faster
ENOUGH = 32  # drafts, by whose acceptance rather than `ACCEPTANCE` is predicted what copies gain
MOST_SHARE = 0.5  # of the free memory; the rest is for KV caches
# Rows of a draft above which 4 bits gain nothing. On a GPU by the expected time of one product,
# with 4-bit weights and with whole ones: 32, all that our kernel takes in one reading of the
# weights (PyTorch's, which reads them anew for each 16, came to 16). PyTorch's CPU kernel reads
# them anew for each 4.
MOST_ROWS = {"cuda": expected.most_four_bit_rows(H100), "cpu": 8}


@dataclass
class DraftWeights:
    """What the drafts of a patched model read.

    Attributes:
        twins: None: the model's own weights.
        because: why "auto" decided so; None where it was not asked.
        most_rows: of a batch that drafts with twins; None: any.
        predicted: how many times faster than dense steps at an acceptance, where "auto" predicted.
    """

    twins: Twins | None = None
    because: str | None = None
    most_rows: int | None = None
    predicted: Callable[[float], float] | None = None

    def attach(self) -> None:
        if self.twins is not None:
            self.twins.attach()

    def detach(self) -> None:
        if self.twins is not None:
            self.twins.detach()

    def tensors(self) -> list[Tensor]:
        """What a draft reads of the twins."""
        made = [twin for twin in self.twins.twins if twin.packed is not None] if self.twins else []
        return [part for twin in made for part in (twin.packed, twin.scales)]

    def of_call(self, model: Any, rows: int) -> tuple[Twins | None, dict[str, Any]]:
        """The twins that a call of a batch of `rows` drafts with, and an account of it."""
        if self.twins is None:
            return None, {"draft_weights_because": self.because}
        twins = self.twins.refresh(model)
        account: dict[str, Any] = dict(
            draft_weight_bytes=self.twins.nbytes,
            twinned_layers=self.twins.count,
            kept_layers=len(self.twins.kept),
        )
        reasons = [self.because, self.twins.missing or self.twins.why_kept()]
        if self.most_rows is not None and rows > self.most_rows:
            twins = None
            few = f"4 bits gain nothing above {self.most_rows}"
            reasons.insert(0, f"not for a batch of {rows}: {few}")
        account["draft_weights"] = "int4" if twins is not None else None
        account["draft_weights_because"] = "; ".join(filter(None, reasons)) or None
        return twins, account

    def measured(self, stats: DecodeStats, right: int, tried: int) -> None:
        """Tell `stats` of a call with twins what they gain at the acceptance that there is.

        Args:
            right, tried: drafts so far.
        """
        if self.predicted is None or stats.draft_weights is None or tried < ENOUGH:
            return
        gain = self.predicted(right / tried)
        stats.draft_weights_because = (
            f"{stats.draft_weights_because}; measured: {right / tried:.0%} of {tried:,} drafts "
            f"agree, at which {gain:.2f}x is predicted"
        )


def check(wanted: Any, cache: Any) -> None:
    """Refuse what patch cannot mean.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if wanted not in (None, "int4", "auto"):
        raise ValueError(f'patch: draft_weights is {wanted!r}, expected None, "int4" or "auto"')
    if cache is None:
        return
    if not isinstance(cache, (str, os.PathLike)):
        raise TypeError(f"patch: draft_weights_cache is {cache!r}, expected a path or None")
    if wanted is None:
        raise ValueError(
            f"patch: draft_weights_cache is {str(cache)!r}, expected None without draft_weights; "
            'give draft_weights="int4" or "auto" as well'
        )
    path = Path(cache)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(
            f"patch: draft_weights_cache is {str(cache)!r}, expected a file in an existing folder"
        )


def prepare(
    model: Any,
    wanted: Literal["int4", "auto"] | None,
    cache: Any,
    top_k_keys: int,
    compiles: bool = False,
) -> DraftWeights:
    """Make the twins that are wanted. The model is not changed.

    Raises:
        MemoryError: "int4" does not fit.
        ValueError: `cache` is a file of another kind.
    """
    if wanted is None:
        return DraftWeights()
    twins = Twins(model, compiles)
    if wanted == "int4" and twins.missing:
        warnings.warn(
            f"std_decode: drafts keep the model's weights: {twins.missing}", stacklevel=4
        )
    because = most_rows = predicted = None
    if wanted == "auto":
        gains, because = decide(model, twins, top_k_keys)
        if not gains:
            return DraftWeights(because=because)
        if not twins.offload.found:  # else no number of rows makes up for what is fetched
            most_rows = MOST_ROWS[twins.twins[0].device.type]
            workload = workload_of(model, top_k_keys, twins)
            predicted = partial(best_speedup, workload, held_by(twins))
    if cache is None:
        twins.make(model)
    else:
        twin_cache.make(model, twins, cache)
    return DraftWeights(twins, because, most_rows, predicted)


def decide(model: Any, twins: Twins, top_k_keys: int) -> tuple[bool, str]:
    """Whether twins gain anything, and why: by the free memory, and by the time that steps should
    take on the GPU that holds them, elsewhere by their bytes alone."""
    if twins.missing:
        return False, f"auto: {twins.missing}"
    fetched = twins.offload.fetched_bytes
    if fetched:  # whatever the link, it is slower than memory
        because = f"auto: a dense pass fetches {gigabytes(fetched)} of offloaded weights"
        return _fits(twins) or (True, because)
    workload = workload_of(model, top_k_keys, twins)
    if workload.weight_bytes < CACHED:
        size = f"{workload.weight_bytes / 2**20:.1f} MiB"
        return False, f"auto: {size} of weights are read from a cache, 4 bits would gain nothing"
    device = held_by(twins)
    own = best_speedup(replace(workload, draft_weight_bytes=None), device)
    four_bit = best_speedup(workload, device)
    where = f"{workload.context} tokens, batch 1, if {ACCEPTANCE:.0%} of the drafts agree"
    predicted = f"{four_bit:.2f}x with 4-bit drafts, {own:.2f}x with the model's weights ({where})"
    because = f"auto: predicted {predicted}"
    if four_bit < LEAST_GAIN * max(1.0, own):
        return False, because
    return _fits(twins) or (True, because)


def _fits(twins: Twins) -> tuple[bool, str] | None:
    """None where the twins leave enough memory, else that they do not and why."""
    for device, _, copies, beside, _ in room.needed(twins.twins, twins.beside()):
        free = free_memory(device)
        if copies + beside > MOST_SHARE * free:
            return False, (
                f"auto: 4-bit weights take {gigabytes(copies + beside)}, more than "
                f"{MOST_SHARE:.0%} of the {gigabytes(free)} free on {device}"
            )
    return None


def held_by(twins: Twins) -> Device | None:
    """The GPU that reads the twins."""
    device = twins.twins[0].device
    return gpu(device) if device.type == "cuda" else None


def workload_of(model: Any, top_k_keys: int, twins: Twins | None = None) -> Workload:
    """A decoding step of the model at batch 1, dense and with drafts that read the twins."""
    read = weights_of_step(model)
    weights = sum(weight.nbytes for weight in read)
    four_bit = None
    if twins is not None:
        own = sum(twin.weight.nbytes for twin in twins.twins)
        four_bit = weights - own + twins.planned_bytes
    config = model.get_decoder().config
    layers = DynamicCache(config=config).layers
    # Gemma 4 has heads of another width, and of another number, where there is no window.
    kinds = getattr(config, "per_layer_config", None) or [config] * len(layers)
    attending = [
        (kind, getattr(layer, "sliding_window", None))
        for kind, layer in zip(kinds, layers)
        if not isinstance(layer, LinearAttentionLayer)  # which has a state
    ]
    size = model.get_input_embeddings().weight.element_size()
    tokens = [(_token_width(kind) * size, window) for kind, window in attending]
    experts, share = experts_of(model)
    idle = (1 - share) * sum(weight.numel() for weight in experts)
    return Workload(
        weight_bytes=weights,
        parameters=sum(weight.numel() for weight in read) - idle,
        kv_bytes=sum(token for token, window in tokens if window is None),
        batch=1,
        context=min(CONTEXT, getattr(config, "max_position_embeddings", CONTEXT)),
        draft_keys=top_k_keys,
        draft_weight_bytes=four_bit,
        window_bytes=sum(token * window for token, window in tokens if window),
        state_bytes=(len(layers) - len(attending)) * _state_bytes(config),
        expert_bytes=sum(weight.nbytes for weight in experts),
        expert_share=share,
        layers=config.num_hidden_layers,
        kv_heads=sum(_kv_heads(kind) for kind, window in attending if window is None),
    )


def _token_width(config: Any) -> int:
    """Numbers that a token's key and value have in a layer."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * _kv_heads(config) * width


def _state_bytes(config: Any) -> int:
    """Of a gated delta layer's state, float32."""
    names = ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    return 4 * math.prod(getattr(config, name, 0) for name in names)


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def weights_of_step(model: Any) -> list[Tensor]:
    """What a dense step reads: all weights but the embedding, of which it reads a row a token."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    read = {id(p): p for p in model.get_decoder().parameters() if p is not embedding}
    read |= {} if head is None else {id(p): p for p in head.parameters()}
    return [local(weight) for weight in read.values()]


def experts_of(model: Any) -> tuple[list[Tensor], float]:
    """The fused weights of experts ``[E, ..., ...]``, and what share of them a token takes."""
    decoder = model.get_decoder()
    names = ("num_experts_per_tok", "moe_topk", "moe_k")
    taken = next((getattr(decoder.config, n) for n in names if hasattr(decoder.config, n)), None)
    found = [
        weight
        for name, weight in decoder.named_parameters()
        if "experts" in name.split(".") and weight.dim() == 3
    ]
    if taken is None or not found:
        return [], 1.0
    return [local(weight) for weight in found], min(1.0, taken / found[0].shape[0])


def best_speedup(
    workload: Workload, on: Device | None = None, acceptance: float = ACCEPTANCE
) -> float:
    """Of the best draft length over dense decoding; without a GPU while only bytes count."""
    if on is not None:
        return expected.best_speedup(workload, on, acceptance, MOST_DRAFTS)
    device = Device(bandwidth=1.0, flops=math.inf)
    dense = workload.dense_seconds(device)
    return max(
        expected_tokens(acceptance, gamma) * dense / workload.round_seconds(device, gamma)
        for gamma in range(1, MOST_DRAFTS + 1)
    )

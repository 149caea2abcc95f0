"""What was asked of `bench roofline`, and of what it knows, in words."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from bench.models.dimensions import FOUR_BIT_BYTES, SHAPES
from bench.roofline.devices import GIB, GPUS, LINKS
from bench.roofline.predictions import USABLE

PREDICTED = "PREDICTED, not measured"
WAYS = {False: "bf16 drafts", True: "4-bit drafts"}
MODELS = [name for name in SHAPES if name != "tiny"]


def assumptions(options: argparse.Namespace) -> dict[str, Any]:
    names = ["acceptance", "draft_length", "top_k_keys", "tensor_parallel", "efficiency"]
    names += ["link", "weights", "kv"] if options.link else []
    return {
        "status": PREDICTED,
        **{name: getattr(options, name) for name in names},  # None: best, fit
        "four_bit_bytes_per_weight": FOUR_BIT_BYTES,
        "usable_memory": USABLE,
    }


def in_words(options: argparse.Namespace) -> str:
    length = options.draft_length
    return (
        f"{PREDICTED}: acceptance {options.acceptance:g}, {options.top_k_keys} keys a draft, "
        f"{'best draft length' if length is None else f'draft length {length}'}, "
        f"{options.efficiency:.0%} of the peak bandwidth"
    )


def gpu_in_words(gpu: str) -> str:
    memory, device, source, _ = GPUS[gpu]
    return (
        f"{gpu}: {device.bandwidth / 1e12:g} TB/s, {device.flops / 1e12:g} TFLOP/s of dense "
        f"bfloat16, {memory / GIB:g} GiB ({source})"
    )


def link_in_words(link: str) -> str:
    bandwidth, source = LINKS[link]
    return f"{link}: {bandwidth / 1e9:g} GB/s ({source})"


def model_in_words(model: str) -> str:
    shape = SHAPES[model]
    bf16, four_bit = (shape.weight_bytes(1, kind) / 1e9 for kind in (False, True))
    experts = f" ({shape.experts_per_token} of {shape.experts} experts)" if shape.experts else ""
    states = f"{shape.state_bytes / 1e6:.0f} MB of states a row; " if shape.state_bytes else ""
    return (
        f"{model}: {shape.parameters / 1e9:.2f}B weights in the text decoder; one token reads "
        f"{bf16:.2f} GB of them, {four_bit:.2f} GB in 4 bits{experts}; "
        f"{states}{2 * shape.kv_values / 1024:.4g} KiB of KV cache a token"
    )


def command(options: argparse.Namespace) -> str:
    """The command line that writes the same again."""
    words = ["python", "-m", "bench", "roofline"]
    words += ["--model", *(["all"] if options.model == MODELS else options.model)]
    words += ["--gpu", *options.gpu, "--batch", *map(str, options.batch)]
    words += ["--context", *map(str, options.context)]
    words += ["--acceptance", str(options.acceptance)]
    words += ["--draft-length", str(options.draft_length or "best")]
    words += ["--top-k-keys", str(options.top_k_keys)]
    if not options.link:
        words += ["--tensor-parallel", str(options.tensor_parallel or "fit")]
    words += ["--efficiency", str(options.efficiency)]
    if options.link:
        words += ["--link", *options.link, "--weights", options.weights, "--kv", options.kv]
    words += ["--out", str(options.out)]
    return shlex.join(words)

"""Passes as torch.compile makes them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

import std_kernels

# Compiled variants of a pass that may live at a time; PyTorch's own limit, 8, is soon reached by a
# few batch sizes and draft lengths, and ends the call with an error.
MOST_COMPILED = 64


def compile_pass(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same pass with its small kernels (norms, rotary, activations, residuals) fused."""
    # Fused kernels keep more digits between operators than bfloat16 has; rounding there as plain
    # PyTorch does keeps the choices of the unpatched model.
    options = {"emulate_precision_casts": True}
    return torch.compile(forward, fullgraph=True, dynamic=False, options=options)


@contextmanager
def settings() -> Iterator[None]:
    """What PyTorch has to know whenever a compiled pass runs, which may compile it.

    Its cache on disk knows an op by name. After an upgrade it would hand out a pass that expects
    another version's strides, and fail; so the tag in its keys tells versions apart.
    """
    config = torch.compiler.config
    tag = f"{config.cache_key_tag} {version_of_ops()}"
    with (
        torch._dynamo.config.patch(recompile_limit=MOST_COMPILED),
        config.patch(cache_key_tag=tag),
    ):
        yield


@cache
def version_of_ops() -> str:
    """Of the ops as they are installed, also from a checkout that has just changed."""
    digest = hashlib.sha256()
    for source in sorted(Path(std_kernels.__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return f"std_kernels-{digest.hexdigest()[:16]}"


def compiling(phase: str) -> AbstractContextManager:
    """Tell someone at a terminal what takes so long."""
    from rich.console import Console

    return Console(stderr=True).status(f"std_decode: compiling the {phase} pass, once")

"""What of a grid of models, batches and contexts `bench decode` can run, and with what."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import product
from typing import Any

from bench.models.dimensions import SHAPES

_RANDOM: dict[str, Any] = dict(batch=[1], context=[25000], top_k_keys=[1024], new_tokens=64)
_DEMO: dict[str, Any] = dict(batch=[1], context=[1024, 4096], top_k_keys=[64], new_tokens=61)
_QUICK: dict[str, Any] = dict(batch=[1, 8], context=[384, 1536], top_k_keys=[64], new_tokens=32)
_QUICK_DEMO: dict[str, Any] = dict(
    batch=[1, 4], context=[512, 1024], top_k_keys=[16, 64], new_tokens=61
)


class Refused(Exception):
    """Why nothing was run, in one line."""


@dataclass
class Plan:
    """One model and what of its grid can be run.

    Attributes:
        options: of the command line, with this model's defaults.
        cells: context and batch of each that fits.
        refused: record of each that does not, and why.
    """

    name: str
    shape: Any
    dtype: Any
    options: argparse.Namespace
    cells: list[tuple[int, int]]
    refused: list[tuple[dict[str, Any], str]]


def plan_of(name: str, options: argparse.Namespace, device: Any) -> Plan:
    import torch

    from bench.models.build import needs, shape_of

    demo, given = name == "demo", argparse.Namespace(**vars(options))
    if not demo and name not in SHAPES:
        raise Refused(f"--shape is {name}, expected one of demo, {', '.join(SHAPES)}")
    quick = _QUICK_DEMO if demo else _QUICK
    fill(given, quick if options.quick else _DEMO if demo else _RANDOM)
    own = device.type == "cpu" or demo
    dtype = getattr(torch, options.dtype or ("float32" if own else "bfloat16"))
    plan = Plan(name, shape_of(name), dtype, given, [], [])
    twins = "int4" in options.draft_weights
    for context, batch in dict.fromkeys(product(given.context, given.batch)):
        needed = needs(plan.shape, dtype, device, batch, context + given.new_tokens, twins)
        why = _beyond(context, given) if demo else None
        if why is None and needed.total > needed.free:
            why = f"does not fit: {needed}"
        if why is None:
            plan.cells.append((context, batch))
        else:
            record = {"kind": "decode", "what": "everything", **where_of(plan, batch, context)}
            plan.refused.append((record, why))
    return plan


def _beyond(context: int, options: argparse.Namespace) -> str | None:
    """Why the demo model's camera has no such clip."""
    from std_decode.demo.camera import TAGS, TOKENS_PER_SECOND
    from std_decode.demo.video import MOST_SECONDS

    events, seconds = _events(options), context // TOKENS_PER_SECOND
    if context % TOKENS_PER_SECOND:
        return f"--context is {context}, expected a multiple of {TOKENS_PER_SECOND}"
    if not events <= seconds <= MOST_SECONDS:
        least, most = TOKENS_PER_SECOND * events, TOKENS_PER_SECOND * MOST_SECONDS
        return f"--context is {context}, expected {least} to {most} video tokens"
    if events > TAGS:
        return f"--new-tokens is {options.new_tokens}, expected at most {5 * TAGS + 1}"
    return None


def where_of(plan: Plan, batch: int, context: int) -> dict[str, Any]:
    dtype = str(plan.dtype).removeprefix("torch.")
    return {"shape": plan.name, "dtype": dtype, "batch": batch, "context": context}


def model_of(plan: Plan, device: Any) -> Any:
    from bench.models import build

    if plan.name == "demo":
        return build.demo_model(plan.dtype, device)
    return build.random_model(plan.shape, plan.dtype, device, plan.options.seed)


def prompt_of(plan: Plan, model: Any, context: int) -> Any:
    from bench.models.prompts import DemoPrompt, Prompt

    if plan.name == "demo":
        return DemoPrompt(model, context, plan.options.seed, _events(plan.options))
    return Prompt(model, context, plan.options.seed)


def _events(options: argparse.Namespace) -> int:
    """Of a clip whose narration is as long as asked for."""
    return max(1, (options.new_tokens - 1) // 5)


def fill(options: argparse.Namespace, defaults: dict[str, Any]) -> None:
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)

"""Texts of one prompt told in several ways, and where they part."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

EVENTS, MOST_TOKENS, BATCH, RANDOM_TOKENS, READ_TOKENS = 12, 96, 4, 300, 600


@dataclass
class Way:
    """What came of one way to narrate, over all prompts.

    Attributes:
        tokens: compared, up to where texts part.
        lags: of the tokens with which texts parted, in log-probability.
        right: share of attributes told right, of each prompt.
    """

    texts: int = 0
    tokens: int = 0
    lags: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)


@dataclass
class Found:
    """Of one type.

    Attributes:
        margins: between the best two tokens, of each step of the unpatched model.
        drafted, accepted: by the way that drafts.
    """

    ways: dict[str, Way] = field(default_factory=dict)
    margins: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0


def measure(options: argparse.Namespace, device: Any) -> dict[tuple[str, str], Found]:
    """By model (one of `SOURCES`) and type."""
    from rich.progress import Progress
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    found: dict[tuple[str, str], Found] = {}
    with Progress(disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("prompts", total=len(options.models) * options.prompts)
        for kind in options.models:
            for models, inputs, right in SOURCES[kind](options, device):
                reference = narrate(models["float32"], inputs)[0]
                for dtype in options.dtypes:
                    here = found.setdefault((kind, dtype), Found())
                    _one(options, here, models[dtype], inputs, right, reference)
                progress.advance(task)
    return found


def _one(
    options: argparse.Namespace,
    here: Found,
    model: Any,
    inputs: dict[str, Any],
    right: Callable[[Any], float] | None,
    reference: Any,
) -> None:
    """Compare the texts of one prompt; the reference is the float32 one."""
    import torch

    expected, scores = narrate(model, inputs)
    best = scores.topk(2, dim=-1).values
    here.margins += (best[:, 0] - best[:, 1]).tolist()
    texts = {"unpatched": expected, **ways(options, model, inputs, here)}
    if model.dtype != torch.float32:
        texts["float32"] = reference
    for way, told in texts.items():
        note = here.ways.setdefault(way, Way())
        note.texts += 1
        compare(note, expected, told, scores)
        if right is not None:
            note.right.append(right(told))


Prompt = tuple[dict[str, Any], dict[str, Any], Callable[[Any], float] | None]


def _types(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    return {name: getattr(torch, name) for name in {"float32", *options.dtypes}}


def _demo(options: argparse.Namespace, device: Any) -> Iterator[Prompt]:
    """Of each prompt: the models by type, its inputs, and what judges its text."""
    import numpy as np

    from std_decode.demo import camera
    from std_decode.demo.model import TEMPORAL, generate_inputs, load_model, load_tokenizer

    tokenizer = load_tokenizer()
    models = {name: load_model().to(device, dtype) for name, dtype in _types(options).items()}
    for prompt in range(options.prompts):
        clip = camera.random_clip(
            options.seconds, EVENTS, np.random.default_rng([options.seed, prompt])
        )
        pictures = (255 * camera.draw_seconds(clip)).round().astype(np.uint8)
        frames = pictures.transpose(0, 2, 3, 1).repeat(TEMPORAL, axis=0)
        inputs = generate_inputs(frames, clip.first_tag, tokenizer)

        def right(tokens: Any, clip: Any = clip) -> float:
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            return camera.attributes_right(text, clip)

        yield models, {name: x.to(device) for name, x in inputs.items()}, right


def _random(options: argparse.Namespace, device: Any) -> Iterator[Prompt]:
    import copy

    import torch

    from bench.models import build, prompts
    from bench.models.dimensions import SHAPES

    shape = SHAPES["tiny"]
    for prompt in range(options.prompts):
        model = build.random_model(shape, torch.float32, device, options.seed + prompt)
        models = {name: copy.deepcopy(model).to(x) for name, x in _types(options).items()}
        ids = torch.randint(2, shape.vocabulary - prompts.SPECIAL, (1, RANDOM_TOKENS))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        yield models, {name: x.to(device) for name, x in inputs.items()}, None


def _pretrained(options: argparse.Namespace, device: Any) -> Iterator[Prompt]:
    from bench.models import pretrained

    loaded = {name: pretrained.load(dtype) for name, dtype in _types(options).items()}
    tokenizer = loaded["float32"][0]
    models = {name: model.to(device) for name, (_, model) in loaded.items()}
    for prompt in range(options.prompts):
        inputs = pretrained.prompt(tokenizer, READ_TOKENS, options.seed + prompt)
        yield models, {name: x.to(device) for name, x in inputs.items()}, None


SOURCES = {"demo": _demo, "random": _random, "pretrained": _pretrained}


def narrate(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """A text's tokens ``[steps]``, and log-probabilities float32 ``[steps, V]`` before each."""
    import torch

    output = model.generate(
        **_as(model, inputs), max_new_tokens=MOST_TOKENS, do_sample=False,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    told = output.sequences[0, inputs["input_ids"].shape[1] :]
    return told, torch.stack(output.scores).float().log_softmax(-1)[:, 0]


def _as(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
    }


def ways(
    options: argparse.Namespace, model: Any, inputs: dict[str, Any], found: Found
) -> dict[str, Any]:
    """The same prompt's texts, each ``[steps]``, by way."""
    import torch

    import std_decode

    def tell(**more: Any) -> Any:
        given = _as(model, {**inputs, **more})
        told = model.generate(**given, max_new_tokens=MOST_TOKENS, do_sample=False)
        return told[0, inputs["input_ids"].shape[1] :]

    texts = {}
    drafting = dict(draft_length=options.draft_length, top_k_keys=options.top_k_keys)
    if model.dtype != torch.float32:
        with std_decode.patched(model, **drafting):
            texts["drafts, as promised"] = tell()
    with std_decode.patched(model, **drafting, reproducible=False):
        texts["drafts"] = tell()
        stats = std_decode.last_stats(model)
    assert stats is not None and stats.fallback is None and stats.rounds > 0
    found.drafted, found.accepted = (
        found.drafted + stats.drafted, found.accepted + stats.accepted
    )  # fmt: skip
    with std_decode.patched(model, draft_length=0):
        texts["dense path"] = tell()
    many = {name: torch.cat([value] * BATCH) for name, value in inputs.items()}
    texts[f"batch of {BATCH}"] = tell(**many)
    return texts


def compare(way: Way, expected: Any, told: Any, scores: Any) -> None:
    """Note where a text parts from the expected one, and by how little."""
    most = min(len(expected), len(told))
    differs = (expected[:most] != told[:most]).nonzero()
    at = int(differs[0]) if len(differs) else most
    way.tokens += at
    if len(differs):
        way.lags.append(float(scores[at].max() - scores[at, told[at]]))
    elif len(expected) != len(told):
        raise AssertionError(f"a text of {len(told)} tokens, expected {len(expected)}")

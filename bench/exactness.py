"""What "the same tokens" means where rounding is coarse, measured on the demo model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.decode import between

_HELP = """\
Narrates clips with the demo model, greedily, and compares texts token by token with those of the
unpatched model of the same type. The demo model is sure of nearly all it says, so rounding decides
little; a model of random weights (the tiny shape of bench decode, another for each prompt) is not
sure of anything, and shows the other end. What is compared:

  drafts        patched, always drafting, and so verifying several tokens at once
  dense path    patched, never drafting
  batch of 4    unpatched, the same prompt four times: how far plain decoding is from itself
  float32       unpatched, but in float32: what the type itself changes

Two texts part where they first differ; what comes after is no longer comparable, so only the
tokens up to there count. At that step the unpatched model has a best token, and the other text
takes one that lags behind it by so much log-probability. "Margin" is how far the second best token
lags behind the best, over all steps of the unpatched model: where it is below what rounding does,
either may come. "Attributes right" judges the demo's texts by what happens in the clip.

Exit status: 0, 1 if in float32 a patched text parts at a lag of 1e-4 or more."""
_EXAMPLES = """\
examples:
  python -m bench exactness                               50 prompts, some minutes on one core
  python -m bench exactness --prompts 3 --dtypes bfloat16 a trial
  python -m bench exactness --out bench/results           a section of reliability.md"""
EVENTS, MOST_TOKENS, BATCH, RANDOM_TOKENS = 12, 96, 4, 300
MARGIN = 1e-4  # of log-probability: below it float32 rounding may decide
BELOW = (0.0, 0.01, 0.03, 0.1, 0.3)
HEAD = """\
# Reliability

What the long runs found. Each section names its command, and is written by it."""


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


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "exactness",
        help="how many tokens differ in bfloat16, and by how little, on the demo model",
        description=_HELP,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    count = between(int, 1, 2**31)
    add("--prompts", type=count, default=50, metavar="N", help="clips, each another (default 50)")
    add("--seconds", type=between(int, EVENTS, 4096), default=256, metavar="N",
        help="length of a clip, 4 video tokens each (default 256)")  # fmt: skip
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], metavar="TYPE",
        choices=["float32", "bfloat16", "float16"], help="(default float32 bfloat16)")  # fmt: skip
    add("--draft-length", type=between(int, 1, 63), default=4, metavar="G", help="(default 4)")
    add("--top-k-keys", type=count, default=64, metavar="K", help="(default 64)")
    add("--device", choices=["cuda", "cpu"], help="default: a GPU if there is one")
    add("--seed", type=between(int, 0, 2**31), default=0, help="of the clips (default 0)")
    add("--out", type=Path, metavar="DIR", help="write a section of DIR/reliability.md")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.markdown import Markdown

    from bench.sections import about, write_section

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = measure(options, torch.device(device))
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    text = section(options, found, f"{about()}; {where}")
    Console(width=None if sys.stdout.isatty() else 160).print(Markdown(text))
    if options.out is not None:
        write_section(options.out / "reliability.md", HEAD, "Rounding", text)
    exact = [here.ways for (_, dtype), here in found.items() if dtype == "float32"]
    patched = [ways[name] for ways in exact for name in ("drafts", "dense path")]
    return int(any(lag >= MARGIN for way in patched for lag in way.lags))


def measure(options: argparse.Namespace, device: Any) -> dict[tuple[str, str], Found]:
    """By model ("demo", "random") and type."""
    from rich.progress import Progress
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    found: dict[tuple[str, str], Found] = {}
    with Progress(disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("prompts", total=2 * options.prompts)
        for source in (_demo, _random):
            for kind, models, inputs, right in source(options, device):
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


Prompt = tuple[str, dict[str, Any], dict[str, Any], Callable[[Any], float] | None]


def _types(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    return {name: getattr(torch, name) for name in {"float32", *options.dtypes}}


def _demo(options: argparse.Namespace, device: Any) -> Iterator[Prompt]:
    """Of each prompt: kind and type of the models, them, its inputs, and what judges its text."""
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

        yield "demo", models, {name: x.to(device) for name, x in inputs.items()}, right


def _random(options: argparse.Namespace, device: Any) -> Iterator[Prompt]:
    import copy

    import torch

    from bench import prompts, shapes
    from bench.models import SHAPES

    shape = SHAPES["tiny"]
    for prompt in range(options.prompts):
        model = shapes.build(shape, torch.float32, device, options.seed + prompt)
        models = {name: copy.deepcopy(model).to(x) for name, x in _types(options).items()}
        ids = torch.randint(2, shape.vocabulary - prompts.SPECIAL, (1, RANDOM_TOKENS))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        yield "random", models, {name: x.to(device) for name, x in inputs.items()}, None


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
    with std_decode.patched(
        model, draft_length=options.draft_length, top_k_keys=options.top_k_keys
    ):
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


def section(options: argparse.Namespace, found: dict[tuple[str, str], Found], about: str) -> str:
    """Markdown."""
    arguments = (
        f"--prompts {options.prompts} --seconds {options.seconds} --dtypes "
        f"{' '.join(options.dtypes)} --draft-length {options.draft_length} --top-k-keys "
        f"{options.top_k_keys} --seed {options.seed}"
    )
    head = ("model", "type", "against the unpatched model of this type", "texts that part",
            "tokens up to there", "partings per 1,000 tokens", "lag at partings: median, largest",
            "attributes right")  # fmt: skip
    rows = []
    for (kind, dtype), here in found.items():
        for name, way in here.ways.items():
            right = f"{sum(way.right) / len(way.right):.1%}" if way.right else "-"
            if name == "unpatched":
                rows.append((kind, dtype, "(itself)", "", "", "", "", right))
                continue
            lags = sorted(way.lags)
            lag = f"{lags[len(lags) // 2]:.2g}, {lags[-1]:.2g}" if lags else "-"
            rate = 1000 * len(lags) / max(1, way.tokens + len(lags))
            rows.append((kind, dtype, name, f"{len(lags)} of {way.texts}", f"{way.tokens:,}",
                         f"{rate:.2f}", lag, right))  # fmt: skip
    margins = [
        (kind, dtype, f"{len(here.margins):,}",
         *(f"{sum(m <= most for m in here.margins) / len(here.margins):.2%}" for most in BELOW),
         f"{here.accepted / max(1, here.drafted):.1%}")
        for (kind, dtype), here in found.items()
    ]  # fmt: skip
    below = [f"margin {'0' if most == 0 else f'at most {most:g}'}" for most in BELOW]
    return "\n".join(
        [
            f"`python -m bench exactness {arguments}` ({about}). Greedy; the "
            f"demo model on clips of {EVENTS} events, {4 * options.seconds:,} video tokens, the "
            f"random ones on {RANDOM_TOKENS} tokens of text. What the words mean: "
            "`python -m bench exactness --help`.",
            "",
            *_table(head, rows),
            "",
            "How close the best two tokens were, in log-probability, at the unpatched model's "
            "steps:",
            "",
            *_table(("model", "type", "steps", *below, "drafts accepted"), margins),
        ]
    )


def _table(head: Any, rows: Any) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]

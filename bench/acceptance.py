"""What 4-bit draft weights cost in agreement, measured on the demo model; and their bytes."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

from bench.arguments import between, new_parser

_HELP = """\
Narrates clips with the demo model, drafting with its own weights and with 4-bit copies of them
(patch(draft_weights="int4")), at each number of keys, greedily and by sampling. Counts how many
drafts the dense model agrees with, and compares every text with the one the unpatched model gives:
in float32 a token may differ only where rounding decides (see docs/promises.md).

Then adds up what a draft reads of the weights, beside what bench roofline counts.

Says nothing about speed: the demo model's weights fit a CPU's caches. Writes draft-weights.md.
Exit status: 0, 1 if a text differs, 2 if it cannot run."""
_EXAMPLES = """\
examples:
  python -m bench acceptance                                 a few minutes on one core
  python -m bench acceptance --seconds 256 --clips 2         a few seconds
  python -m bench acceptance --checkpoint FOLDER --out bench/results"""
WEIGHTS = {"own": None, "int4": "int4"}
EVENTS, MOST_TOKENS, DRAFTS = 12, 96, 4


@dataclass
class Figures:
    """Of one way to draft, over all clips."""

    drafted: int = 0
    accepted: int = 0
    steps: int = 0  # tokens after each text's first
    passes: int = 0  # dense ones
    differing: int = 0

    @property
    def rate(self) -> float:
        return self.accepted / max(1, self.drafted)

    @property
    def per_pass(self) -> float:
        return self.steps / max(1, self.passes)


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "acceptance",
        "count how many drafts agree, with and without 4-bit weights, on the demo model",
        _HELP,
        _EXAMPLES,
    )
    add = parser.add_argument
    count = between(int, 1, 2**31)
    add(
        "--checkpoint",
        type=Path,
        metavar="FOLDER",
        help="of a demo model (default: the package's)",
    )
    add("--top-k-keys", type=count, nargs="+", metavar="K", default=[64, 256, 1024],
        help="keys a draft reads per layer and KV head (default 64 256 1024)")  # fmt: skip
    add("--seconds", type=between(int, EVENTS, 4096), nargs="+", metavar="N", default=[256, 1024],
        help="length of the clips, 4 video tokens each (default 256 1024)")  # fmt: skip
    add("--clips", type=count, default=5, metavar="N", help="of each length (default 5)")
    add("--out", type=Path, metavar="DIR", help="where to write (default: only print)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    if options.checkpoint is not None and not (options.checkpoint / "config.json").is_file():
        print(f"bench acceptance: --checkpoint is {options.checkpoint}, expected a folder with a "
              "demo model", file=sys.stderr)  # fmt: skip
        return 2
    model, tokenizer = _demo(options.checkpoint)
    counted = _count(options, model, tokenizer)
    console = Console(width=None if sys.stdout.isatty() else 160)
    sections = [("Acceptance", *_acceptance(counted)), ("Bytes", *_bytes(model))]
    for title, head, rows in sections:
        table = Table(*head, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if options.out is not None:
        from bench.roofline.tables import write

        path = options.out / "draft-weights.md"
        write(path, _markdown(options, sections).encode())
        console.print(f"written to {path}", soft_wrap=True)
    return 1 if any(figures.differing for figures in counted.values()) else 0


def _demo(folder: Path | None) -> tuple[Any, Any]:
    from transformers.utils.logging import disable_progress_bar

    from std_decode.demo.model import FOLDER, load_model, load_tokenizer

    disable_progress_bar()
    return load_model(folder or FOLDER), load_tokenizer(folder or FOLDER)


def _count(options: argparse.Namespace, model: Any, tokenizer: Any) -> dict[tuple, Figures]:
    """By clip length, whether sampled, keys, and weights."""
    from rich.console import Console
    from rich.progress import Progress

    counted: dict[tuple, Figures] = {}
    work = list(product(options.seconds, range(options.clips)))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for seconds, seed in progress.track(work, description="narrating"):
            inputs = _clip(tokenizer, seconds, seed)
            for sampled in (False, True):
                for keys, weights, one in _narrate(model, inputs, sampled, seed, options):
                    total = counted.setdefault((seconds, sampled, keys, weights), Figures())
                    for name, value in vars(one).items():
                        setattr(total, name, getattr(total, name) + value)
    return counted


def _clip(tokenizer: Any, seconds: int, seed: int) -> dict[str, Any]:
    import numpy as np

    from std_decode.demo import camera
    from std_decode.demo.model import generate_inputs
    from std_decode.demo.train import camera_noise

    rng = np.random.default_rng(seed)
    clip = camera.random_clip(seconds, EVENTS, rng)
    pictures = camera_noise(camera.draw_seconds(clip), rng).repeat(2, axis=0)
    frames = (pictures.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
    return generate_inputs(frames, clip.first_tag, tokenizer)


def _narrate(
    model: Any, inputs: dict[str, Any], sampled: bool, seed: int, options: argparse.Namespace
) -> Iterator[tuple[int, str, Figures]]:
    import torch

    import std_decode

    def generate() -> Any:
        torch.manual_seed(seed)
        sampling = dict(do_sample=True, top_k=0) if sampled else dict(do_sample=False)
        return model.generate(**inputs, **sampling, max_new_tokens=MOST_TOKENS)

    expected = generate()
    for keys, (weights, wanted) in product(options.top_k_keys, WEIGHTS.items()):
        patch = dict(top_k_keys=keys, draft_length=DRAFTS, draft_weights=wanted)
        with std_decode.patched(model, **patch):
            same = torch.equal(generate(), expected)
            stats = std_decode.last_stats(model)
        assert stats is not None and stats.draft_weights == wanted and stats.fallback is None
        passes = stats.calls["verify"] + stats.calls["dense"]
        steps = stats.emitted - 1
        yield keys, weights, Figures(stats.drafted, stats.accepted, steps, passes, int(not same))


Table = tuple[tuple[str, ...], list[list[str]]]


def _acceptance(counted: dict[tuple, Figures]) -> Table:
    head = ("video tokens", "tokens are", "keys", "accepted, own weights", "accepted, int4",
            "tokens/pass, own", "tokens/pass, int4", "texts that differ")  # fmt: skip
    rows = []
    for seconds, sampled, keys in dict.fromkeys(key[:3] for key in counted):
        own, int4 = (counted[seconds, sampled, keys, weights] for weights in WEIGHTS)
        rates = [f"{x.rate:.1%} of {x.drafted}" for x in (own, int4)]
        passes = [f"{x.per_pass:.2f}" for x in (own, int4)]
        kind = "sampled" if sampled else "greedy"
        differing = str(own.differing + int4.differing)
        rows.append([str(4 * seconds), kind, str(keys), *rates, *passes, differing])
    return head, rows


def _bytes(model: Any) -> Table:
    """Of the weights a decoding step reads: the model's as it is, and as 4-bit twins have it."""
    from bench.models.build import weight_bytes
    from bench.models.dimensions import FOUR_BIT_BYTES
    from std_decode.weights import draft_weights
    from std_decode.weights.twins import Twins

    twins = Twins(model)
    matrices = sum(twin.layer.weight.numel() for twin in twins.twins)
    rest = weight_bytes(model) - sum(twin.layer.weight.nbytes for twin in twins.twins)
    reads = draft_weights.workload_of(model, 1024, twins).draft_weight_bytes
    head = ("bytes", "counted", "by the roofline")
    return head, [
        ["a dense step reads", f"{weight_bytes(model):,}", ""],
        ["a draft reads", f"{reads:,.0f}", f"{FOUR_BIT_BYTES * matrices + rest:,.0f}"],
        ["memory for the twins", f"{twins.planned_bytes:,}", f"{FOUR_BIT_BYTES * matrices:,.0f}"],
        ["layers with a twin, without", f"{len(twins.twins)}, {len(twins.kept)}", ""],
    ]


def _markdown(options: argparse.Namespace, sections: list[Any]) -> str:
    import torch
    import transformers

    words = ["python -m bench acceptance --top-k-keys", *map(str, options.top_k_keys)]
    words += ["--seconds", *map(str, options.seconds), "--clips", str(options.clips)]
    model = "the package's demo model" if options.checkpoint is None else "another checkpoint"
    lines = [
        "# 4-bit draft weights: how many drafts agree",
        "",
        f"Written by `{' '.join(words)} --out bench/results`, on {model}, float32, batch 1,",
        f"draft length {DRAFTS}, {options.clips} clips of each length with {EVENTS} events; torch "
        f"{torch.__version__}, transformers",
        f"{transformers.__version__}, Python {platform.python_version()}, "
        f"{datetime.now(timezone.utc).date()}. Measured; no figure is a speed.",
    ]
    for title, head, rows in sections:
        lines += ["", f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"

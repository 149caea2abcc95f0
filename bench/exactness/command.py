"""What "the same tokens" means where rounding is coarse, measured on three kinds of models."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.arguments import between, new_parser
from bench.exactness.measure import (
    EVENTS,
    RANDOM_TOKENS,
    READ_TOKENS,
    SOURCES,
    Found,
    measure,
)
from bench.models import pretrained
from bench.records import markdown_table

_HELP = """\
Narrates clips with the demo model, greedily, and compares texts token by token with those of the
unpatched model of the same type. The demo model is sure of nearly all it says, so rounding decides
little; a model of random weights (the tiny shape of bench decode, another for each prompt) is not
sure of anything, and shows the other end. A pretrained one (SmolLM2-135M-Instruct, from packages)
summarises English texts. What is compared:

  drafts        patched with reproducible=False, always drafting, and so verifying several tokens
                at once; in half precision "drafts, as promised" are those of reproducible="auto",
                which on a CPU has every bit of the unpatched model's
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
  python -m bench exactness --out bench/results           a section of reliability.md
  python -m bench exactness --models pretrained --prompts 10 --dtypes bfloat16"""
MARGIN = 1e-4  # of log-probability: below it float32 rounding may decide
BELOW = (0.0, 0.01, 0.03, 0.1, 0.3)


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "exactness",
        "how many tokens differ in bfloat16, and by how little",
        _HELP,
        _EXAMPLES,
    )
    add = parser.add_argument
    count = between(int, 1, 2**31)
    add("--models", nargs="+", default=["demo", "random"], choices=list(SOURCES), metavar="MODEL",
        help=f"of {', '.join(SOURCES)} (default demo random)")  # fmt: skip
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

    from bench.sections import RELIABILITY, about, write_section

    if "pretrained" in options.models and not pretrained.installed():
        print(f"bench exactness: no pretrained model; {pretrained.INSTALL}", file=sys.stderr)
        return 2
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = measure(options, torch.device(device))
    text = section(options, found, about(device))
    Console(width=None if sys.stdout.isatty() else 160).print(Markdown(text))
    if options.out is not None:
        title = "Rounding"
        if options.models == ["pretrained"]:
            title += f", {pretrained.NAME}"
        write_section(options.out / "reliability.md", RELIABILITY, title, text)
    exact = [here.ways for (_, dtype), here in found.items() if dtype == "float32"]
    patched = [ways[name] for ways in exact for name in ("drafts", "dense path")]
    return int(any(lag >= MARGIN for way in patched for lag in way.lags))


def section(options: argparse.Namespace, found: dict[tuple[str, str], Found], about: str) -> str:
    """Markdown."""
    models = " ".join(options.models)
    arguments = (
        f"--models {models} --prompts {options.prompts} --seconds {options.seconds} --dtypes "
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
    prompts = {
        "demo": f"the demo model on {4 * options.seconds:,} video tokens, {EVENTS} events",
        "random": f"random models on {RANDOM_TOKENS} tokens of text",
        "pretrained": f"{pretrained.NAME} on {READ_TOKENS} tokens of English",
    }
    below = [f"margin {'0' if most == 0 else f'at most {most:g}'}" for most in BELOW]
    return "\n".join(
        [
            f"`python -m bench exactness {arguments}` ({about}). Greedy, "
            f"{' and '.join(prompts[kind] for kind in options.models)}. What the words mean: "
            "`python -m bench exactness --help`.",
            "",
            *markdown_table(head, rows),
            "",
            "How close the best two tokens were, in log-probability, at the unpatched model's "
            "steps:",
            "",
            *markdown_table(("model", "type", "steps", *below, "drafts accepted"), margins),
        ]
    )

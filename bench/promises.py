"""What a promise costs: dense and verify steps that round, of one shape, and as unpatched."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench.arguments import between, new_parser
from bench.environment import in_words
from bench.models import pretrained
from bench.models.dimensions import SHAPES
from bench.records import Journal, Record, file_of, markdown_table
from std_decode.app.output import replace_file

_HELP = """\
Times decoding steps in half precision under each promise of patch(reproducible=...): a dense step
(nothing is drafted) and verifications of several tokens, beside a step of the unpatched model.

  rounded        reproducible=False: passes as wide as what is drafted; rounding may decide
  one shape      reproducible=True: every pass feeds 8 tokens, so no draft changes a bit
  unpatched bits reproducible="unpatched": each token's attention is a call of its own, and
                 products that would round otherwise are made token by token (on the CPU only)

The models are SmolLM2-135M-Instruct, from packages, after 600 and 2,000 tokens of English, the
demo model after a clip of 4,096 video tokens, and any shape of bench decode with random weights
after --tokens random tokens. Each way generates the same number of tokens; milliseconds are those
that the call's own stats count for its passes, per pass, medians over runs that take turns. The
unpatched step is the median of what comes between two tokens. Where a promise was not kept, of
bits or of shape, the tokens are compared and the table says so.

Writes into DIR as it goes: promises-DEVICE.jsonl (a record per model and type) and .md (a table).
Exit status: 0, 1 if a promise was not kept, 2 without the pretrained model. Being slow is no
error: look at the table."""
_EXAMPLES = """\
examples:
  python -m bench promises                              some minutes on two cores
  python -m bench promises --out bench/results          writes the results file and its table there
  python -m bench promises --runs 1 --new 12 --models demo --dtypes bfloat16
  python -m bench promises --models qwen2-vl-7b --tokens 25000   on a GPU"""
WAYS: dict[str, Any] = {"rounded": False, "one shape": True, "unpatched bits": "unpatched"}
WIDTHS = (1, 2, 5, 8)  # tokens of a pass that are the row's own
_ENGLISH = (600, 2000)
_CLIP = 1024  # seconds, of 4 tokens


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands, "promises", "what passes take under each promise", _HELP, _EXAMPLES
    )
    add = parser.add_argument
    count = between(int, 1, 2**31)
    add("--models", nargs="+", choices=["pretrained", "demo", *SHAPES], metavar="MODEL",
        default=["pretrained", "demo"],
        help="pretrained, demo, shapes of bench decode (default pretrained demo)")  # fmt: skip
    add("--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"], metavar="TYPE",
        default=["bfloat16", "float16"], help="(default bfloat16 float16)")  # fmt: skip
    add("--tokens", type=between(int, 16, 2**31), default=25_000, metavar="N",
        help="of the prompt of a shape (default 25000)")  # fmt: skip
    add("--new", type=between(int, 4, 2**31), default=32, metavar="N",
        help="tokens of an answer (default 32)")  # fmt: skip
    add("--runs", type=count, default=5, metavar="R", help="of each way (default 5)")
    add("--device", choices=["cuda", "cpu"], help="default: a GPU if there is one")
    add("--seconds", type=between(float, 0, 2**31), default=1800.0, metavar="T",
        help="time box; what does not fit is listed as skipped (default 1800)")  # fmt: skip
    add("--resume", action="store_true", help="go on where a run into DIR was cut off")
    add("--out", type=Path, metavar="DIR", help="where to write (default: only print)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.markdown import Markdown
    from transformers.utils.logging import disable_progress_bar

    from bench.environment import environment

    if "pretrained" in options.models and not pretrained.installed():
        print(f"bench promises: no pretrained model; {pretrained.INSTALL}", file=sys.stderr)
        return 2
    disable_progress_bar()
    deadline = time.monotonic() + options.seconds
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    about = environment(device, new=options.new, runs=options.runs)
    path = None if options.out is None else file_of(options.out, "promises", about["device"])
    complete = (lambda record: "milliseconds" in record) if options.resume else None
    journal = Journal(path, about, complete)
    known = {(record["model"], record["dtype"]) for record in journal.records[1:]}
    console = Console(width=None if sys.stdout.isatty() else 160)
    for dtype in options.dtypes:
        for name, make in _cases(options, dtype, device):
            if (name, dtype) in known:
                continue
            record: Record = {"model": name, "dtype": dtype}
            if time.monotonic() > deadline:
                journal.keep({**record, "note": "skipped: out of time"})
                continue
            with console.status(f"{name}, {dtype}"):
                model, inputs = make()
                timed = measure(model, inputs, options.new, options.runs, deadline)
                journal.keep({**record, **timed})
            if path is not None:
                replace_file(path.with_suffix(".md"), f"{_text(journal)}\n".encode())
    console.print(Markdown(_text(journal)))
    kept = [record.get("kept", {}) for record in journal.records[1:]]
    return int(any(not same for ways in kept for same in ways.values()))


def _cases(options: argparse.Namespace, dtype: str, device: Any) -> Iterator[tuple[str, Any]]:
    """Names, and what makes the model and its inputs once their turn has come."""
    import torch

    kind = getattr(torch, dtype)

    def there(inputs: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.to(device, kind if value.is_floating_point() else None)
            for name, value in inputs.items()
        }

    def english(tokens: int) -> tuple[Any, dict[str, Any]]:
        tokenizer, model = pretrained.load(kind)
        return model.to(device), there(pretrained.prompt(tokenizer, tokens))

    def video() -> tuple[Any, dict[str, Any]]:
        import numpy as np

        from std_decode.demo import camera
        from std_decode.demo.model import TEMPORAL, generate_inputs, load_model, load_tokenizer

        clip = camera.random_clip(_CLIP, 12, np.random.default_rng(0))
        pictures = (255 * camera.draw_seconds(clip)).round().astype(np.uint8)
        frames = pictures.transpose(0, 2, 3, 1).repeat(TEMPORAL, axis=0)
        inputs = generate_inputs(frames, clip.first_tag, load_tokenizer())
        return load_model().to(device, kind), there(inputs)

    def random(shape: str) -> tuple[Any, dict[str, Any]]:
        from bench.models import build, prompts

        most = SHAPES[shape].vocabulary - prompts.SPECIAL
        ids = torch.randint(2, most, (1, options.tokens), generator=torch.Generator())
        model = build.random_model(SHAPES[shape], kind, device, 0)
        return model, there({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    for model in options.models:
        if model == "pretrained":
            for tokens in _ENGLISH:
                name = f"{pretrained.NAME}, {tokens:,} tokens"
                yield name, lambda tokens=tokens: english(tokens)
        elif model == "demo":
            yield f"demo model, {4 * _CLIP:,} video tokens", video
        else:
            yield f"{model}, {options.tokens:,} tokens", lambda model=model: random(model)


def measure(model: Any, inputs: dict[str, Any], new: int, runs: int, deadline: float) -> Record:
    """Milliseconds a pass, by way and width, and which promises were kept.

    Ways that the model cannot have are missing.
    """
    import torch

    import std_decode

    taken: dict[str, dict[int, list[float]]] = {}
    told: dict[str, list[Any]] = {}

    def tell(**more: Any) -> Any:
        return model.generate(
            **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, **more
        )

    for run in range(runs + 1):  # the first is not counted: it tries products and allocates
        if run > 1 and time.monotonic() > deadline:
            break
        steps: list[float] = []
        plain = tell(stopping_criteria=[_Clock(steps)])
        told.setdefault("unpatched", []).append(plain)
        if run:
            spans = [after - before for before, after in pairwise(steps)]
            taken.setdefault("unpatched", {}).setdefault(1, []).append(1e3 * median(spans))
        for way, reproducible in WAYS.items():
            for width in WIDTHS:
                options = dict(draft_length=width - 1, reproducible=reproducible, top_k_keys=64)
                try:
                    std_decode.patch(model, **options)
                except NotImplementedError:
                    continue
                try:
                    told.setdefault(way, []).append(tell())
                    stats = std_decode.last_stats(model)
                finally:
                    std_decode.unpatch(model)
                assert stats is not None and stats.fallback is None, stats
                stage = "verify" if width > 1 else "dense"
                if run and stats.calls[stage]:
                    seconds = stats.seconds[stage] / stats.calls[stage]
                    taken.setdefault(way, {}).setdefault(width, []).append(1e3 * seconds)
    milliseconds = {
        way: {str(width): median(values) for width, values in widths.items()}
        for way, widths in taken.items()
    }
    expected = {"one shape": "one shape", "unpatched bits": "unpatched"}
    kept = {
        way: all(torch.equal(text, told[other][0]) for text in told[way])
        for way, other in expected.items()
        if way in told
    }
    return {"milliseconds": milliseconds, "kept": kept, "note": ""}


class _Clock:
    """A stopping criterion that stops nothing, and notes when it was asked."""

    def __init__(self, steps: list[float]):
        self.steps = steps

    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
        self.steps.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def _text(journal: Journal) -> str:
    about = journal.about
    head = ("model", "type", "tokens of a row", "unpatched step, ms",
            *(f"{way}, ms (unpatched steps)" for way in WAYS), "kept")  # fmt: skip
    rows = [row for record in journal.records[1:] for row in _rows(record)]
    return "\n".join(
        [
            "# What a promise costs",
            "",
            f"`python -m bench promises`, {about['runs']} runs of {about['new']} tokens "
            f"({in_words(about)}). Greedy, batch 1; medians. What the words mean: "
            "`python -m bench promises --help`.",
            "",
            *markdown_table(head, rows),
        ]
    )


def _rows(record: Record) -> list[tuple[str, ...]]:
    names = record["model"], record["dtype"]
    if "milliseconds" not in record:
        return [(*names, "", "", *("" for _ in WAYS), record["note"])]
    took = record["milliseconds"]
    plain = took["unpatched"]["1"]
    broken = ", ".join(way for way, same in record["kept"].items() if not same)
    rows = []
    for width in map(str, WIDTHS):
        cells = [took.get(way, {}).get(width) for way in WAYS]
        said = ("-" if cell is None else f"{cell:.1f} ({cell / plain:.2f}x)" for cell in cells)
        first = width == "1"
        kept = (f"NOT: {broken}" if broken else "yes") if first else ""
        rows.append((*names, width, f"{plain:.1f}" if first else "", *said, kept))
    return rows

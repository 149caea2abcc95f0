"""Time to the first token, patched beside unpatched: what scoring and selecting keys cost."""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from bench.arguments import between, new_parser
from bench.environment import in_words
from bench.models.dimensions import SHAPES
from bench.records import markdown_table
from std_decode.app.output import replace_file

_HELP = """\
Times generate with one new token, patched and unpatched: reading the prompt and choosing the
first token. Patched, each layer also scores the prompt's keys by how much the text after the video
attends to them, and those that drafts will read are selected. That is to cost at most 5%.

By default the model is the trained demo model, which watches a clip (4 video tokens a second; its
vision tower is part of the time). --shape takes a real model's dimensions instead, with random
weights and a prompt of random text, whose last 64 tokens ask.

HOW IT IS TIMED. Both sides take turns in one process, so that a busy machine disturbs both
alike. Each pair of runs gives one ratio, and who goes first alternates; "ratio" is the median of
these, with the 20th and 80th percentile. "CPU ratio" is the same of processor time, which a busy
machine disturbs less (on the CPU only). The milliseconds are medians too. "scoring" and
"selecting" are what all calls of these two ops took in patched runs of their own, in which every
call was waited for; "of unpatched" is what they come to together. The rest of the ratio is Python,
writing keys and values into larger buffers, and noise. "same" is whether both sides chose the same
first token in every run.

Writes into DIR as it goes: prefill-DEVICE.jsonl (a record per length) and .md (a table). --resume
keeps the lengths that an earlier run of the same sources, device and options has written there.
Exit status: 0, 1 if a first token differed in float32, 2 if it cannot run here. Being slow is no
error: look at the table."""
_EXAMPLES = """\
examples:
  python -m bench prefill                         the demo model, 1k, 4k and 16k video tokens
  python -m bench prefill --tokens 500 --pairs 5  a few seconds
  python -m bench prefill --shape qwen2-vl-7b --tokens 25000 --out round1   on a GPU"""
WATCHED_RUNS = 3
_HEAD = ("tokens", "pairs", "unpatched ms", "patched ms", "ratio", "p20-p80", "CPU ratio",
         "scoring ms", "selecting ms", "of unpatched", "same", "note")  # fmt: skip


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "prefill",
        "time to the first token, patched beside unpatched, on a CPU or a GPU",
        _HELP,
        _EXAMPLES,
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, metavar="NAME",
        help=f"of {', '.join(SHAPES)} (default: the demo model)")  # fmt: skip
    add("--tokens", type=between(int, 100, 2**31), nargs="+", metavar="N",
        default=[1024, 4096, 16384], help="video tokens (with --shape: text) of a prompt, at "
        "least 100 (default 1024 4096 16384)")  # fmt: skip
    add("--pairs", type=between(int, 1, 2**31), default=15, metavar="R",
        help="pairs of runs per length (default 15)")  # fmt: skip
    add("--top-k-keys", type=between(int, 1, 2**31), default=1024, metavar="K",
        help="keys to select per layer and KV head (default 1024)")  # fmt: skip
    add("--device", choices=["cuda", "cpu"], help="default: a GPU if there is one")
    add("--seconds", type=between(float, 0, 2**31), default=600.0, metavar="T",
        help="time box; what does not fit is listed as skipped (default 600)")  # fmt: skip
    add("--seed", type=int, default=0, help="of clip, weights and prompt (default 0)")
    add("--resume", action="store_true", help="go on where a run into DIR was cut off")
    add("--out", type=Path, metavar="DIR", help="where to write (default: only print)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from bench.environment import environment
    from bench.records import Journal, file_of

    deadline = time.monotonic() + options.seconds
    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        print("bench prefill: --device is cuda, but torch finds no GPU here; use cpu",
              file=sys.stderr)  # fmt: skip
        return 2
    device = torch.device(kind)
    dtype = torch.bfloat16 if kind == "cuda" and options.shape else torch.float32
    about = environment(
        device,
        shape=options.shape or "demo model",
        dtype=str(dtype).removeprefix("torch."),
        pairs=options.pairs,
        top_k_keys=options.top_k_keys,
        seed=options.seed,
    )
    path = None if options.out is None else file_of(options.out, "prefill", about["device"])
    complete = (lambda record: "ratio" in record) if options.resume else None
    journal = Journal(path, about, complete)
    known = {record["tokens"] for record in journal.records[1:]}
    console = Console(width=None if sys.stdout.isatty() else 160)
    model, prompt = _demo(device, options.seed) if options.shape is None else _random(
        options.shape, dtype, device, options.seed
    )  # fmt: skip
    for tokens in sorted({*options.tokens} - known):
        with console.status(f"{tokens} tokens"):
            journal.keep(_length(model, prompt, tokens, options, device, deadline))
        _write(path, journal)
    console.print(_headline(journal.about))
    console.print(_table(journal.records[1:]))
    wrong = any(record.get("same") is False for record in journal.records[1:])
    return 1 if wrong and dtype == torch.float32 else 0


def _demo(device: Any, seed: int) -> tuple[Any, Callable[[int], dict[str, Any]]]:
    import numpy as np
    from transformers.utils.logging import disable_progress_bar

    from std_decode.demo import camera
    from std_decode.demo.model import (
        TEMPORAL,
        TOKENS_PER_SECOND,
        generate_inputs,
        load_model,
        load_tokenizer,
    )  # fmt: skip

    disable_progress_bar()
    model, tokenizer = load_model().to(device), load_tokenizer()

    def prompt(tokens: int) -> dict[str, Any]:
        seconds = tokens // TOKENS_PER_SECOND
        clip = camera.random_clip(seconds, 8, np.random.default_rng(seed))
        pictures = (255 * camera.draw_seconds(clip)).round().astype(np.uint8)
        frames = pictures.transpose(0, 2, 3, 1).repeat(TEMPORAL, axis=0)
        inputs = generate_inputs(frames, clip.first_tag, tokenizer)
        return {name: value.to(device) for name, value in inputs.items()}

    return model, prompt


def _random(
    name: str, dtype: Any, device: Any, seed: int
) -> tuple[Any, Callable[[int], dict[str, Any]]]:
    import torch

    from bench.models import build, prompts

    model = build.random_model(SHAPES[name], dtype, device, seed)
    most = SHAPES[name].vocabulary - prompts.SPECIAL

    def prompt(tokens: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, most, (1, tokens), generator=generator).to(device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return model, prompt


def _length(
    model: Any,
    prompt: Callable[[int], dict[str, Any]],
    tokens: int,
    options: argparse.Namespace,
    device: Any,
    deadline: float,
) -> dict[str, Any]:
    """The record of one length of prompt."""
    import torch

    import std_decode
    from bench.probes import seconds

    inputs = prompt(tokens)
    first: dict[str, Any] = {}
    spans: dict[str, list[float]] = {"unpatched": [], "patched": []}
    work: dict[str, list[float]] = {"unpatched": [], "patched": []}

    def read(side: str, one: Any) -> None:
        def call() -> None:
            first[side] = one.generate(**inputs, max_new_tokens=1, do_sample=False)

        before = time.process_time()
        spans[side].append(seconds(call, device))
        work[side].append(time.process_time() - before)

    # The same weights in two objects, one of them patched: neither has to set up anew each time.
    ours = std_decode.patch(copy.copy(model), draft_length=4, top_k_keys=options.top_k_keys)
    sides = [("unpatched", model), ("patched", ours)]
    same = True
    try:
        for side, one in 2 * sides:  # what is done once, not to be timed
            read(side, one)
        for times in (*spans.values(), *work.values()):
            times.clear()
        for pair in range(options.pairs):
            if time.monotonic() > deadline:
                break
            for side, one in sides[:: -1 if pair % 2 else 1]:
                read(side, one)
            same &= torch.equal(first["unpatched"], first["patched"])
        if not spans["patched"]:
            return {"tokens": tokens, "note": "skipped: out of time"}
        stats = std_decode.last_stats(ours)
        assert stats is not None
        figures = _figures(spans, work if device.type == "cpu" else None)
        parts = [_parts(lambda: read("patched", ours), device) for _ in range(WATCHED_RUNS)]
    finally:
        std_decode.unpatch(ours)
    figures |= {f"{name}_ms": median(part[name] for part in parts) for name in parts[0]}
    return {**figures, "tokens": tokens, "same": same,
            "note": f"fell back: {stats.fallback}" if stats.fallback else ""}  # fmt: skip


def _figures(spans: dict[str, list[float]], work: dict[str, list[float]] | None) -> dict[str, Any]:
    """Of seconds by the clock, and of the processor (None: it only waits for a GPU), by side."""
    import numpy as np

    ratios = np.divide(spans["patched"], spans["unpatched"])
    middle, low, high = np.percentile(ratios, [50, 20, 80]).tolist()
    return {
        "pairs": len(ratios),
        **{f"{side}_ms": 1e3 * median(values) for side, values in spans.items()},
        **{"ratio": middle, "ratio_p20": low, "ratio_p80": high},
        "cpu_ratio": work and median(np.divide(work["patched"], work["unpatched"]).tolist()),
    }


def _parts(call: Callable[[], Any], device: Any) -> dict[str, float]:
    """Milliseconds that `call` spends in scoring and in selecting."""
    from bench.probes import replaced, seconds
    from std_decode.model import attention
    from std_decode.passes import engine

    spent = {"scoring": 0.0, "selecting": 0.0}

    def watched(name: str) -> Callable[[Any], Any]:
        def make(op: Any) -> Any:
            def timed(*args: Any, **kwargs: Any) -> Any:
                kept = []
                took = seconds(lambda: kept.append(op(*args, **kwargs)), device)
                spent[name] += 1e3 * took
                return kept[0]

            return timed

        return make

    with ExitStack() as stack:
        stack.enter_context(replaced(attention, "score_keys", watched("scoring")))
        stack.enter_context(replaced(engine, "select_topk", watched("selecting")))
        call()
    return spent


def _cells(record: dict[str, Any]) -> list[str]:
    if "ratio" not in record:
        return [str(record["tokens"]), *["-"] * (len(_HEAD) - 2), record["note"]]
    return [
        str(record["tokens"]),
        str(record["pairs"]),
        *(f"{record[f'{side}_ms']:.1f}" for side in ("unpatched", "patched")),
        f"{record['ratio']:.3f}",
        f"{record['ratio_p20']:.3f}-{record['ratio_p80']:.3f}",
        "-" if record["cpu_ratio"] is None else f"{record['cpu_ratio']:.3f}",
        *(f"{record[f'{part}_ms']:.2f}" for part in ("scoring", "selecting")),
        f"{(record['scoring_ms'] + record['selecting_ms']) / record['unpatched_ms']:.1%}",
        "yes" if record["same"] else "NO",
        record["note"],
    ]


def _headline(about: dict[str, Any]) -> str:
    return f"{about['shape']}, {about['dtype']}, batch 1, on {in_words(about)}."


def _table(records: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    shown = Table(*_HEAD, title="Time to the first token")
    for record in records:
        shown.add_row(*_cells(record))
    return shown


def _write(path: Path | None, journal: Any) -> None:
    if path is None:
        return
    text = [
        "# Time to the first token, patched beside unpatched", "", _headline(journal.about),
        "How it is timed: `python -m bench prefill --help`.", "",
        *markdown_table(_HEAD, map(_cells, journal.records[1:])),
    ]  # fmt: skip
    replace_file(path.with_suffix(".md"), ("\n".join(text) + "\n").encode())

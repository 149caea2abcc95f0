"""A pretrained model's texts in half precision, with every kind of draft: bit for bit the same."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

# What is drafted; of the last, beside other work on the machine.
DRAFTS: dict[str, dict[str, Any]] = {
    "1 draft a round": dict(draft_length=1),
    "4": dict(draft_length=4),
    "8": dict(draft_length=8),
    "auto": dict(draft_length="auto"),
    "4, by 4-bit weights": dict(draft_length=4, draft_weights="int4"),
    "4, of 16 keys": dict(draft_length=4, top_k_keys=16),
    "4, of all keys": dict(draft_length=4, top_k_keys=100_000),
    "auto, beside a busy machine": dict(draft_length="auto"),
}
BUSY = 10  # every so many prompts, the machine is made busy for that one
KEYS = 64
REFERENCE = "none"  # drafted

_HELP = """\
Has SmolLM2-135M-Instruct, from packages, summarise English texts, greedily, unpatched and then
patched with drafts of different lengths, keys and weights, and by "auto", whose choices follow the
clock; every tenth prompt (of batches the first) by "auto" once more, beside two busy processes.
The tokens are compared with those of the unpatched model, or with --one-shape with those of
draft_length=0 in passes of as many tokens (reproducible=16). No token may differ, whatever its
margin.

With --state what is done is kept in FILE, and a run that was interrupted goes on from there.
Exit status: 0, 1 if any token differs."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "pretrained",
        help="a pretrained model's texts in half precision",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--prompts", type=int, default=100, metavar="N", help="texts, each another (100)")
    add("--tokens", type=int, default=400, metavar="N", help="of a text (400)")
    add("--new", type=int, default=64, metavar="N", help="tokens of an answer at most (64)")
    add("--batch", type=int, default=1, metavar="N", help="texts at a time, padded (1)")
    add("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="(bfloat16)")
    add("--one-shape", action="store_true", help="against draft_length=0 in passes of one shape")
    add("--shard", default="1/1", metavar="I/N", help="every N-th batch, from the I-th (1/1)")
    add("--state", type=Path, metavar="FILE", help="keep what is done here, and go on from it")
    add("--out", type=Path, metavar="DIR", help="write a section of DIR/reliability.md")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from rich.progress import Progress

    from bench.models import pretrained
    from bench.sections import about
    from tests.reliability import report
    from tests.reliability.lossless import quiet

    if not pretrained.installed():
        print(f"no pretrained model; {pretrained.INSTALL}", file=sys.stderr)
        return 2
    quiet()
    here, of = map(int, options.shard.split("/"))
    numbers = range((here - 1) * options.batch, options.prompts, of * options.batch)
    done: list[dict[str, Any]] = []
    if options.state is not None and options.state.exists():
        done = [json.loads(line) for line in options.state.read_text().splitlines()]
    with Progress(disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("texts", total=len(numbers) * (len(DRAFTS) + 1))
        for record in texts(options, numbers, done):
            progress.advance(task)
            if record in done:
                continue
            done.append(record)
            if options.state is not None:
                with options.state.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    text = section(options, done, about())
    print(text)
    title = f"Bit for bit, {pretrained.NAME}, {options.dtype}"
    if options.batch > 1:
        title += f", batches of {options.batch}"
    if options.one_shape:
        title += ", passes of one shape"
    report.write(options.out, title, text)
    return int(bool(differing(done)))


def texts(
    options: argparse.Namespace, numbers: range, done: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Each prompt's text by each way, those that are done as they were."""
    import std_decode
    from bench.models import pretrained

    known = {(record["way"], record["prompt"]): record for record in done}
    tokenizer, model = pretrained.load(getattr(torch, options.dtype))
    promise = "reproducible" if options.one_shape else "unpatched"
    mode: dict[str, Any] = {"reproducible": 16 if options.one_shape else "unpatched"}

    def tell(first: int) -> list[list[int]]:
        together = range(first, min(first + options.batch, options.prompts))
        inputs = side_by_side([pretrained.prompt(tokenizer, options.tokens, n) for n in together])
        told = model.generate(**inputs, max_new_tokens=options.new, do_sample=False)
        return told[:, inputs["input_ids"].shape[1] :].tolist()

    for way, drafts in {REFERENCE: dict(draft_length=0), **DRAFTS}.items():
        busy = 2 if way.endswith("busy machine") else 0
        here = numbers[:: BUSY if options.batch == 1 else 1 << 30] if busy else numbers
        plain = way == REFERENCE and not options.one_shape
        patch = {"top_k_keys": KEYS, **mode, **drafts}
        with nullcontext() if plain else std_decode.patched(model, **patch), beside(busy):
            for number in here:
                if (way, number) in known:
                    yield known[way, number]
                    continue
                start = time.perf_counter()
                record = {"way": way, "prompt": number, "told": tell(number)}
                record["seconds"] = round(time.perf_counter() - start, 1)
                if not plain:
                    stats = std_decode.last_stats(model)
                    assert stats is not None and stats.fallback is None
                    assert stats.promise == promise, stats.promise_because
                    record |= {"drafted": stats.drafted, "accepted": stats.accepted}
                yield record


def side_by_side(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch, padded on the left."""
    from torch.nn.functional import pad

    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    return {
        name: torch.cat([pad(x[name], (longest - x[name].shape[1], 0)) for x in prompts])
        for name in ("input_ids", "attention_mask")
    }


def differing(records: list[dict[str, Any]]) -> list[str]:
    expected = {r["prompt"]: r["told"] for r in records if r["way"] == REFERENCE}
    return [
        f"prompt {r['prompt']}, {r['way']}" for r in records if r["told"] != expected[r["prompt"]]
    ]


@contextmanager
def beside(count: int) -> Iterator[None]:
    """Within, so many processes compute."""
    command = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def section(options: argparse.Namespace, records: list[dict[str, Any]], about: str) -> str:
    drafted = [record for record in records if record["way"] != REFERENCE]
    total: Counter = Counter()
    for record in drafted:
        total.update({name: record[name] for name in ("drafted", "accepted")})
        total.update(texts=len(record["told"]), tokens=sum(map(len, record["told"])))
    wrong = differing(records)
    more = f" --batch {options.batch}" if options.batch > 1 else ""
    more += " --one-shape" if options.one_shape else ""
    often = "one batch" if options.batch > 1 else f"every {BUSY}th prompt"
    against = (
        "draft_length=0 in passes of 16 tokens" if options.one_shape else "the unpatched model"
    )
    return "\n".join(
        [
            f"`python -m tests.reliability pretrained --prompts {options.prompts} --tokens "
            f"{options.tokens} --new {options.new} --dtype {options.dtype}{more}` ({about}). "
            f"Greedy, {KEYS} keys where no other number is said, against {against}. Drafts: "
            f"{'; '.join(DRAFTS)} ({often}).",
            "",
            f"{options.prompts} prompts, {total['texts']:,} texts, "
            f"{total['tokens']:,} tokens, {total['drafted']:,} drafted, "
            f"{total['accepted']:,} accepted, {len(wrong)} texts that differ.",
            *(["", *(f"- {line}" for line in wrong)] if wrong else []),
        ]
    )

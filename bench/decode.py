"""Decoding at a real model's shape with random weights, beside transformers' own ways."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

from bench.models import SHAPES

_HELP = """\
Times decoding over a KV cache of --context tokens a row, on a model of real dimensions whose
weights are random. Side by side in one run: transformers generate (sdpa, growing cache), the same
over a static cache (compiled as transformers does by itself on a GPU), our dense path
(draft_length=0), and drafting at each forced acceptance; on a GPU the last two also with
patch(compile=True) and with cuda_graphs=False. --ways picks some of these.

--draft-weights int4 drafts with 4-bit copies of the weights; how long making them took is noted.

FORCED ACCEPTANCE. Random weights say nothing about how many drafts a model accepts, so that is an
input, --acceptance: the chance that a draft agrees, given that those before it did. The draft pass
runs and costs what it costs; then its token is replaced by the one that verification is going to
choose or, as often as asked, by a wrong one (which drafts are wrong depends on --seed alone). What
verification is going to choose is known from a run before. "tokens/pass" and "accepted" (of all
drafted) are what came of it, "asked" the tokens a pass that the input comes to in the long run. No
row of such a table says what a trained model gains; it says what it gains if it accepts that many.

HOW IT IS TIMED. The prompt is read once. Every run goes on from its cache, reads one token more
and generates: decoding time is that of a call with --new-tokens tokens less the median call with
one. Each figure is the median of --runs runs, with the 20th and 80th percentile. Ratios are to
transformers generate of the same batch and context in the same run. Single passes are timed in a
run of their own, by CUDA events (on the CPU by the clock). "kernel ms" and "kernels" come from
torch.profiler; "idle" is what is left of a pass: the device waits for launches. On the CPU there
are no kernels: calls of operators are counted and idle time is left out. "GB" are the weights and
the keys and values a pass has to read once, "of copy" is what that takes at the bandwidth of a
large copy, measured in the same run, over what the pass took.

The static cache stays where it is between runs, which spares transformers a new CUDA graph per
call. First use (compiling, capturing graphs) is not in the times; it has a column of its own.

Tokens are compared with transformers' and with our dense path's, up to each row's first
difference. In float32 a difference that is no near tie is an error: nothing is timed. In bfloat16
rounding decides now and then and random texts part for good, so it is counted only; "behind" says
by how much log-probability our choice was behind at worst, where they part.

Writes into DIR as it goes: decode.jsonl (a record per figure) and decode.md (tables).
Exit status: 0, 1 if something was wrong or failed, 2 if it cannot run here."""
_EXAMPLES = """\
examples:
  python -m bench decode --quick                       a tiny model on the CPU, under a minute
  python -m bench decode --shape qwen2-vl-7b --batch 1 --context 25000 --out round1
  python -m bench decode --shape qwen2-vl-7b --draft-weights own int4 --out weights
  python -m bench decode --shape llama-3-8b --batch 1 8 32 --context 8000 25000 \\
      --acceptance 0.48 0.82 0.9 --draft-length 2 4 --seconds 550 --out grid"""
WAYS = ["dense", "forced", "static", "compiled", "no-graphs"]
_DEFAULTS: dict[str, Any] = dict(
    shape="qwen2-vl-7b",
    batch=[1],
    context=[25000],
    top_k_keys=[1024],
    new_tokens=64,
    seconds=300.0,
)
_QUICK: dict[str, Any] = dict(
    shape="tiny", batch=[1], context=[384], top_k_keys=[64], new_tokens=32, seconds=50.0
)


def between(kind: Callable[[str], Any], least: float, most: float) -> Callable[[str], Any]:
    """The type of an argument that is a number in a range."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            wanted = f"{least:g} to {most:g}" if most < 2**31 else f"at least {least:g}"
            raise argparse.ArgumentTypeError(f"is {text}, expected {wanted}")
        return value

    return parse


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "decode",
        help="time decoding at a real model's shape, random weights, forced acceptance",
        description=_HELP,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    count = between(int, 1, 2**31)
    add("--shape", metavar="NAME", help=f"of {', '.join(SHAPES)} (default qwen2-vl-7b)")
    add("--batch", type=count, nargs="+", metavar="B", help="rows (default 1)")
    add("--context", type=between(int, 16, 2**31), nargs="+", metavar="S",
        help="tokens a row has in the cache (default 25000)")  # fmt: skip
    add("--acceptance", type=between(float, 0, 1), nargs="+", metavar="P", default=[0.9],
        help="forced: the chance that a draft agrees (default 0.9)")  # fmt: skip
    add("--draft-length", type=between(int, 1, 63), nargs="+", metavar="G", default=[4],
        help="tokens drafted a round (default 4)")  # fmt: skip
    add("--top-k-keys", type=count, nargs="+", metavar="K",
        help="keys a draft reads per layer and KV head (default 1024)")  # fmt: skip
    add("--draft-weights", choices=["own", "int4"], nargs="+", metavar="W", default=["own"],
        help="own or int4 or both: what drafts read, the model's weights or 4-bit copies of them "
        "(patch(draft_weights=\"int4\")) (default own)")  # fmt: skip
    add("--new-tokens", type=between(int, 2, 2**31), metavar="N",
        help="tokens per row and run (default 64)")  # fmt: skip
    add("--runs", type=count, default=5, metavar="R", help="runs per figure (default 5)")
    add("--dtype", choices=["bfloat16", "float16", "float32"],
        help="default: bfloat16 on a GPU, float32 on the CPU")  # fmt: skip
    add("--device", metavar="DEVICE", help="cuda or cpu (default: a GPU if there is one)")
    add("--seconds", type=between(float, 0, 2**31), metavar="T",
        help="time box; what does not fit is listed as skipped (default 300)")  # fmt: skip
    add("--ways", choices=WAYS, nargs="+", default=WAYS, metavar="WAY",
        help=f"of {', '.join(WAYS)}; transformers generate always is (default: all)")  # fmt: skip
    add("--seed", type=int, default=0, help="of weights, prompt and wrong drafts (default 0)")
    add("--quick", action="store_true", help="defaults that take less than a minute on a CPU: "
        "the tiny shape, 384 tokens of context, 64 keys, 32 new tokens")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="where to write (default: only print)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, clock: Callable[[], float] = time.monotonic) -> int:
    """The command; `clock` tells the seconds that the time box is of."""
    started = clock()
    # torch's profiler reports each start and stop; it reads this when torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    for name, value in (_QUICK if options.quick else _DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    try:
        return _run(options, clock, started + options.seconds)
    except _Refused as error:
        print(f"bench decode: {error}", file=sys.stderr)
        return 2


class _Refused(Exception):
    """Why nothing was run, in one line."""


def _run(options: argparse.Namespace, clock: Callable[[], float], deadline: float) -> int:
    from rich.console import Console

    from bench import probes, shapes, tables
    from bench.cell import Cell

    device, dtype, shape = _setting(options)
    cells = sorted(product(options.context, options.batch))
    results = tables.Results(options.out, shape.layers)
    twins = "int4" in options.draft_weights
    fitting = _that_fit(cells, shape, dtype, device, options.new_tokens, results, twins)
    probes.prepare_profiler(device)
    bandwidth = copy_bandwidth(device)
    results.keep(environment(options, device, dtype, bandwidth))
    model = shapes.build(shape, dtype, device, options.seed)
    prompt: Any = None
    for context, batch in fitting:
        if clock() >= deadline:
            results.skip("everything", "out of time", batch=batch, context=context)
            continue
        try:
            if prompt is None or prompt.context != context:
                prompt = None  # before the next is made
                prompt = shapes.Prompt(model, context, options.seed)
            prompt.repeat(batch)
            Cell(prompt, options, results, device, bandwidth, clock, deadline).run()
        except Exception as error:  # out of memory, whatever was estimated
            prompt = None
            results.fail("the prompt", error, True, batch=batch, context=context)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in tables.rich_tables(results):
        console.print(table)
    return 1 if results.bad else 0


def _setting(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    import torch

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise _Refused(f"--device is {name}, expected cuda or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise _Refused(f"--device is {name}, expected cuda or cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise _Refused(f"--device is {name}, but torch finds no GPU on this machine; use cpu")
    if options.shape not in SHAPES:
        raise _Refused(f"--shape is {options.shape}, expected one of {', '.join(SHAPES)}")
    kind = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    return device, getattr(torch, kind), SHAPES[options.shape]


def _that_fit(
    cells: list[tuple[int, int]],
    shape: Any,
    dtype: Any,
    device: Any,
    new: int,
    results: Any,
    twins: bool,
) -> list[tuple[int, int]]:
    from bench.shapes import needs

    fitting, refused = [], []
    for context, batch in cells:
        needed = needs(shape, dtype, device, batch, context + new, twins)
        if needed.total <= needed.free:
            fitting.append((context, batch))
            continue
        why = f"batch {batch} at context {context} needs {needed}"
        refused.append(why)
        if len(refused) < len(cells):
            results.skip("everything", f"does not fit: {needed}", batch=batch, context=context)
    if not fitting:
        raise _Refused(f"{refused[0]}; lower --batch or --context")
    return fitting


def copy_bandwidth(device: Any) -> float:
    """GB/s of a large copy, read and written bytes together."""
    from bench import gpu, ops

    copy = ops.copy_case(device, 1 << (24 if device.type == "cpu" else 29))
    copy.run()
    return copy.bytes / gpu.measure(copy.run, device)["cold"][0] / 1e6


def environment(
    options: argparse.Namespace, device: Any, dtype: Any, bandwidth: float | None
) -> dict[str, Any]:
    import torch
    import transformers

    from bench.gpu import output

    cuda = device.type == "cuda"
    return {
        "kind": "environment",
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "CPU",
        "threads": None if cuda else torch.get_num_threads(),
        "shape": options.shape,
        "dtype": str(dtype).removeprefix("torch."),
        "new_tokens": options.new_tokens,
        "seed": options.seed,
        "copy_gb_per_s": bandwidth,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": output("git", "rev-parse", "HEAD"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }

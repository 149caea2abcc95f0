"""Decoding at a real model's shape with random weights, beside transformers' own ways."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from bench.arguments import between, new_parser
from bench.decode.grid import Plan, Refused, fill, model_of, plan_of, prompt_of, where_of
from bench.models.dimensions import SHAPES

_HELP = """\
Times decoding over a KV cache of --context tokens a row, side by side in one run:

  transformers generate (sdpa, growing cache), what all others are compared with
  static        the same over a static cache, compiled as transformers does by itself on a GPU
  lookup        the same with prompt_lookup_num_tokens=10 (the demo model at batch 1 only)
  dense         our dense path, draft_length=0
  drafts        drafting, with each --draft-length, --top-k-keys and --draft-weights
  compiled, no-graphs   on a GPU the last two also with patch(compile=True), cuda_graphs=False
--ways picks some of these.

WHOSE MODEL. --shape NAME is a model of real dimensions with random weights. --shape demo is the
tiny trained model that comes with the package, in float32; there --context counts video tokens,
each row is a clip of its own, and --new-tokens is 5 for each of its events, and one.

ACCEPTANCE IS MEASURED on the demo model: its drafts are its own. On random weights it is FORCED:
they say nothing about how many drafts a model accepts, so that is an input, --acceptance: the
chance that a draft agrees, given that those before it did. The draft pass runs and costs what it
costs; then its token is replaced by the one that verification is going to choose or, as often as
asked, by a wrong one (which drafts are wrong depends on --seed alone). What verification is going
to choose is known from a run before. "tokens/pass" (each a dense pass) and "accepted" (of all
drafted) are what came of it, "asked" the tokens a pass that the input comes to in the long run. No
row with forced acceptance says what a trained model gains; it says what it gains if it accepts
that many. Prompt lookup is left out on random weights for the same reason: what it finds in random
text means nothing, and its drafts cost nothing, so any acceptance forced on it would decide alone.

--draft-weights int4 drafts with 4-bit copies of the weights; how long making them took is noted.

HOW IT IS TIMED. The prompt is read once. Every run goes on from its cache, reads one token more
(the demo model: the question) and generates: decoding time is that of a call with --new-tokens
tokens less the median call with one. Prompt lookup cannot go on from a cache; it reads the prompt
anew, and is timed from the end of that pass. Each figure is the median of --runs runs, with the
20th and 80th percentile. Ratios are to transformers generate of the same batch and context in the
same run. "first token s" is the time to the first token of one row read from nothing, by the clock
(after one call that is not timed; prompt lookup's is transformers', which reads the same). "draft
+ verify + select ms" are the stages of the last run, a token of a row, by last_stats. Single
passes are timed in a run of their own, by CUDA events (on the CPU by the clock). "kernel ms" and
"kernels" come from torch.profiler; "idle" is the rest of a pass: the device waits for launches. On
the CPU there are no kernels: calls of operators are counted and idle time is left out. "GB" are
the weights and the keys and values a pass has to read once, "of copy" is what that takes at the
bandwidth of a large copy, measured in the same run, over what the pass took. "peak GB" is what
PyTorch held at most, less the prompt's cache that is kept for the next run; the CPU has no such
figure.

The static cache stays where it is between runs, which spares transformers a new CUDA graph per
call. First use (compiling, capturing graphs) is not in the times; it has a column of its own.

Tokens are compared with transformers' and with our dense path's, up to each row's first
difference. In float32 a difference that is no near tie is an error: nothing is timed. In bfloat16
rounding decides now and then and random texts part for good, so it is counted only; "behind" says
by how much log-probability our choice was behind at worst, where they part.

A batch and context that do not fit into memory are skipped, and the table says what they need.
Several shapes share the time box, the demo model a quarter of another's share; what one does not
use is for the next. Batches and contexts are timed in the order given: transformers generate,
dense and drafts of every batch, then the static cache and lookup of every batch, then the rest.

Writes into DIR as it goes: decode-DEVICE.jsonl (a record per figure) and .md (tables), at the end
.png (plots; needs matplotlib). --resume keeps what an earlier run of the same sources, device,
--runs and --seed has written there, and goes on with the rest.
Exit status: 0, 1 if something was wrong or failed, 2 if it cannot run here."""
_EXAMPLES = """\
examples:
  python -m bench decode --quick                       a tiny model and the demo model, on the CPU
  python -m bench decode --shape demo --batch 1 8 --context 1024 4096 --top-k-keys 16 64 256
  python -m bench decode --shape qwen2-vl-7b --batch 1 --context 25000 --out round1
  python -m bench decode --shape qwen2-vl-7b --draft-weights own int4 --out weights
  python -m bench decode --shape qwen2-vl-7b llava-onevision-7b qwen2.5-vl-32b --batch 1 8 32 \\
      --context 8000 32000 128000 256000 --acceptance 0.48 0.82 0.9 --draft-length 2 4 \\
      --seconds 3000 --out grid --resume"""
WAYS = ["dense", "drafts", "static", "lookup", "compiled", "no-graphs"]
_QUICK_RUN: dict[str, Any] = dict(shape=["tiny", "demo"], runs=3, seconds=120.0, out="bench-quick")
_RUN: dict[str, Any] = dict(shape=["qwen2-vl-7b"], runs=5, seconds=300.0, out=None)


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "decode",
        "time decoding at a real model's shape, and of the demo model, beside transformers'",
        _HELP,
        _EXAMPLES,
    )
    add = parser.add_argument
    count = between(int, 1, 2**31)
    add("--shape", nargs="+", metavar="NAME",
        help=f"of demo, {', '.join(SHAPES)} (default qwen2-vl-7b)")  # fmt: skip
    add("--batch", type=count, nargs="+", metavar="B", help="rows (default 1)")
    add("--context", type=between(int, 16, 2**31), nargs="+", metavar="S",
        help="tokens a row has in the cache (default 25000; demo: 1024 4096)")  # fmt: skip
    add("--acceptance", type=between(float, 0, 1), nargs="+", metavar="P", default=[0.9],
        help="forced on random weights: the chance that a draft agrees (default 0.9)")  # fmt: skip
    add("--draft-length", type=between(int, 1, 63), nargs="+", metavar="G", default=[4],
        help="tokens drafted a round (default 4)")  # fmt: skip
    add("--top-k-keys", type=count, nargs="+", metavar="K",
        help="keys a draft reads per layer and KV head (default 1024; demo: 64)")  # fmt: skip
    add("--draft-weights", choices=["own", "int4"], nargs="+", metavar="W", default=["own"],
        help="own or int4 or both: what drafts read, the model's weights or 4-bit copies of them "
        "(patch(draft_weights=\"int4\")) (default own)")  # fmt: skip
    add("--new-tokens", type=between(int, 2, 2**31), metavar="N",
        help="tokens per row and run (default 64; demo: 61, which are 12 events)")  # fmt: skip
    add("--runs", type=count, metavar="R", help="runs per figure (default 5)")
    add("--dtype", choices=["bfloat16", "float16", "float32"],
        help="default: bfloat16 on a GPU, float32 on the CPU and of the demo model")  # fmt: skip
    add("--device", metavar="DEVICE", help="cuda or cpu (default: a GPU if there is one)")
    add("--seconds", type=between(float, 0, 2**31), metavar="T",
        help="time box; what does not fit is listed as skipped (default 300)")  # fmt: skip
    add("--ways", choices=WAYS, nargs="+", default=WAYS, metavar="WAY",
        help=f"of {', '.join(WAYS)}; transformers generate always is (default: all)")  # fmt: skip
    add("--seed", type=int, default=0,
        help="of weights, prompts, clips and wrong drafts (default 0)")  # fmt: skip
    add("--quick", action="store_true", help="defaults that take two minutes on a CPU: the shapes "
        "tiny and demo, short contexts, 3 runs, --seconds 120 --out bench-quick")  # fmt: skip
    add("--resume", action="store_true", help="go on where a run into DIR was cut off")
    add("--out", type=Path, metavar="DIR", help="where to write (default: only print)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, clock: Callable[[], float] = time.monotonic) -> int:
    """The command; `clock` tells the seconds that the time box is of."""
    started = clock()
    # torch's profiler reports each start and stop; it reads this when torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    fill(options, _QUICK_RUN if options.quick else _RUN)
    options.out = options.out and Path(options.out)
    try:
        return _run(options, clock, started + options.seconds)
    except Refused as error:
        print(f"bench decode: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, clock: Callable[[], float], deadline: float) -> int:
    from rich.console import Console

    from bench import probes
    from bench.decode import tables
    from bench.environment import checkpoint, environment

    device = _device(options)
    plans = [plan_of(name, options, device) for name in options.shape]
    if not any(plan.cells for plan in plans):
        record, why = plans[0].refused[0]
        where = f"batch {record['batch']} at context {record['context']}"
        raise Refused(f"{where}: {why}; change --batch or --context")
    probes.prepare_profiler(device)
    bandwidth = copy_bandwidth(device)
    about = environment(
        device,
        seed=options.seed,
        runs=options.runs,
        checkpoint=checkpoint(),
        copy_gb_per_s=bandwidth,
    )
    again = {(plan.name, *cell) for plan in plans for cell in plan.cells}
    again |= {(r["shape"], r["context"], r["batch"]) for plan in plans for r, _ in plan.refused}
    again |= {(name, context, 1) for name, context, _ in again}  # the first token is of one row
    results = tables.Results(options.out, about, options.resume, again)
    for number, plan in enumerate(plans):
        for record, why in plan.refused:
            results.skip(record, why)
        weights = [1 if plan.name == "demo" else 4 for plan in plans[number:]]
        share = (deadline - clock()) * weights[0] / sum(weights)
        _time(plan, results, device, bandwidth, clock, clock() + share)
    console = Console(width=None if sys.stdout.isatty() else 240)
    for table in tables.rich_tables(results):
        console.print(table)
    if results.path is not None:
        console.print(f"written to {results.path} and .md{plotted(results.path)}", soft_wrap=True)
    return 1 if results.bad else 0


def _time(
    plan: Plan, results: Any, device: Any, bandwidth: float,
    clock: Callable[[], float], deadline: float,
) -> None:  # fmt: skip
    """All cells of a model that begin before the deadline."""
    from bench.decode.first_token import first_tokens

    model: Any = None
    for context in dict.fromkeys(context for context, _ in plan.cells):
        batches = [batch for at, batch in plan.cells if at == context]
        if clock() >= deadline:
            for batch in batches:
                where = where_of(plan, batch, context)
                results.skip({"kind": "decode", "what": "everything", **where}, "out of time")
            continue
        one = where_of(plan, 1, context)
        try:
            model = model_of(plan, device) if model is None else model
            prompt = prompt_of(plan, model, context)
            given = (plan.name, plan.options, results, device, bandwidth, clock, deadline)
            _time_batches(plan, prompt, batches, given)
            first_tokens(prompt, plan.options, results, one, lambda: clock() >= deadline)
        except Exception as error:  # out of memory, whatever was estimated
            results.fail({"kind": "decode", "what": "the prompt", **one}, error, True)
        prompt = None  # before the next is made


def _time_batches(plan: Plan, prompt: Any, batches: list[int], given: tuple[Any, ...]) -> None:
    """A stage of every batch, then the next stage: what is the question comes first."""
    from bench.decode.cell import STAGES, Cell

    cells: dict[int, Cell] = {}
    results = given[2]
    for stage, batch in product(STAGES, batches):
        try:
            prompt.repeat(batch)
            cells[batch] = cells.get(batch) or Cell(prompt, *given)
            cells[batch].run(stage)
        except Exception as error:
            where = where_of(plan, batch, prompt.context)
            results.fail({"kind": "decode", "what": "the prompt", **where}, error, True)


def plotted(path: Path) -> str:
    """Draws the plots of a results file; what to tell of it."""
    from bench.report import plots

    return ", .png" if plots.write(path) else "; no plots: they need matplotlib"


def _device(options: argparse.Namespace) -> Any:
    import torch

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Refused(f"--device is {name}, expected cuda or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise Refused(f"--device is {name}, expected cuda or cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Refused(f"--device is {name}, but torch finds no GPU on this machine; use cpu")
    return device


def copy_bandwidth(device: Any) -> float:
    """GB/s of a large copy, read and written bytes together."""
    from bench.kernels import ops
    from bench.kernels.timing import measure

    copy = ops.copy_case(device, 1 << (24 if device.type == "cpu" else 29))
    copy.run()
    return copy.bytes / measure(copy.run, device)["cold"][0] / 1e6

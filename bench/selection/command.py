"""Which keys drafts read: rules of re-selection on the demo model, in tokens per dense pass."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from bench.arguments import between, new_parser
from bench.selection.rules import RULES, YARDSTICKS, in_words
from std_decode.app.output import replace_file

_HELP = """\
Measures how far each rule of re-selection carries drafts on the demo model: tokens per dense pass
(mean accepted length, 1 to --draft-length + 1), the share of drafts accepted, and whether the
tokens are those of the unpatched model, for clips of each length and for each number of keys.

RULES. "static" keeps the prompt's selection, "library" is patch(reselect=True) as it is; nothing
of either is replaced. The other rules replace one thing each in "rows", "every round" (which is
spelled out below) and need a host read or a second pass over the keys where they are so named:
they are here to be compared with, for one row on the CPU.
{rules}
"exact" is the yardstick: the softmax of the verified rows themselves, from a second pass over the
keys that would know each row's log-sum-exp.

WHAT IS RUN. Clips are drawn, not filmed: --events events at random seconds, sensor noise and a
codec's shift of colours as in training, seeds 0, 1, ... A clip's video is read once; every run
goes on from a copy of that cache, reads the text behind the video, selects, and narrates. Scores
of prefill come from that text alone, so the selection is that of the whole prompt. "static",
"library" and "exact" run with every number of keys, the others with --rules-at (--full: all).

COST. Milliseconds of a pass and of a selection are this machine's, by the host's clock, medians
over clips, of "static" and "library"; the other rules are not written to be fast. On a GPU scores
come out of the same pass over the keys, so re-selecting costs less there.

Writes into DIR as it goes: selection.jsonl (a record per run; the same command goes on from it),
and in the end selection.md (tables) and selection.png. Exit status: 0, 1 if a run's tokens were
not identical, 2 if it cannot run here."""
_EXAMPLES = """\
examples:
  python -m bench selection --video-tokens 1024 --clips 2 --top-k-keys 64 256
  python -m bench selection --out bench/results          the published table: 15 minutes
  python -m bench selection --checkpoint FOLDER --rules static library --out trial"""
CLIPS = {1024: 6, 4096: 6, 16384: 2}  # where --clips does not tell


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "selection",
        "compare rules of re-selection on the demo model",
        _HELP.format(rules=in_words()),
        _EXAMPLES,
    )
    add = parser.add_argument
    count = between(int, 1, 2**31)
    add("--video-tokens", type=between(int, 64, 16384), nargs="+", metavar="V",
        default=list(CLIPS), help="of a clip, 4 a second (default 1024 4096 16384)")  # fmt: skip
    add("--top-k-keys", type=count, nargs="+", metavar="K",
        default=[16, 32, 64, 128, 256, 512, 1024],
        help="keys a draft reads per layer and KV head (default 16 to 1024)")  # fmt: skip
    add("--rules", nargs="+", metavar="RULE", choices=list(RULES),
        default=list(RULES), help="of those above (default: all)")  # fmt: skip
    add("--rules-at", type=count, nargs="+", metavar="K", default=[64, 256],
        help="keys at which rules other than the three are run (default 64 256)")  # fmt: skip
    add("--full", action="store_true", help="run every rule with every number of keys")
    add("--clips", type=count, metavar="N", help="per length (default 6, at 16384 tokens 2)")
    add("--events", type=between(int, 1, 64), metavar="E", default=16,
        help="in a clip, narrated in 5 tokens each (default 16)")  # fmt: skip
    add("--draft-length", type=between(int, 1, 63), metavar="G", default=4,
        help="tokens drafted a round (default 4)")  # fmt: skip
    add("--checkpoint", type=Path, metavar="FOLDER", help="of the demo model (default: its own)")
    add("--threads", type=count, metavar="N", default=1, help="of torch (default 1)")
    add("--out", type=Path, metavar="DIR", help="where to write (default: only print)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        return _run(options)
    except (_Refused, OSError) as error:
        print(f"bench selection: {error}", file=sys.stderr)
        return 2


class _Refused(Exception):
    """Why nothing was run, in one line."""


def cells(options: argparse.Namespace) -> Iterator[tuple[int, int, str, int]]:
    """What is to be run: video tokens, clip, rule, keys."""
    for tokens in options.video_tokens:
        for clip in range(options.clips or CLIPS.get(tokens, 6)):
            for rule, keys in product(options.rules, options.top_k_keys):
                if options.full or rule in YARDSTICKS or keys in options.rules_at:
                    yield tokens, clip, rule, keys


def _run(options: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining
    from transformers.utils.logging import disable_progress_bar

    from bench.selection import tables
    from bench.selection.clips import Narrator
    from std_decode.demo.model import FOLDER

    folder = options.checkpoint or FOLDER
    if not (folder / "model.safetensors").is_file():
        raise _Refused(
            f"--checkpoint: {folder} holds no model.safetensors, expected a saved model"
        )
    seconds = min(options.video_tokens) // 4
    if options.events > seconds:
        raise _Refused(
            f"--events is {options.events}, expected at most one a second of the shortest clip, "
            f"{seconds}; ask for fewer or raise --video-tokens"
        )
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    records = Records(options, environment(options, folder))
    todo = [cell for cell in cells(options) if cell not in records]
    narrator = Narrator(folder, options.events, options.draft_length)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(todo))
        for tokens, clip, rule, keys in todo:
            where = f"{tokens:,} video tokens, clip {clip}"
            if narrator.at != (tokens, clip):
                progress.update(task, description=f"{where}: reading")
                narrator.read(tokens, clip)
            progress.update(task, description=f"{where}: {rule}, {keys} keys")
            records.keep((tokens, clip, rule, keys), narrator.narrate(rule, keys))
            progress.advance(task)
    found = records.of(cells(options))
    out = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables.rich_tables(options, found):
        out.print(table)
    if options.out is not None:
        for path in tables.publish(options, records.environment, found, command(options)):
            out.print(f"written to {path}", soft_wrap=True)
    return 0 if all(one["identical"] for one in found) else 1


class Records:
    """What was measured, a line of ``selection.jsonl`` for each run behind one that tells how."""

    def __init__(self, options: argparse.Namespace, environment: dict[str, Any]):
        self.environment, self.path = environment, None
        self.kept: dict[tuple, dict[str, Any]] = {}
        if options.out is None:
            return
        self.path = options.out / "selection.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        if lines and _same(json.loads(lines[0]), environment):
            self.environment = json.loads(lines[0])
            for line in lines[1:]:
                if line.endswith("}"):  # else the run was interrupted
                    record = json.loads(line)
                    self.kept[tuple(record[name] for name in _KEY)] = record
        options.out.mkdir(parents=True, exist_ok=True)
        text = [json.dumps(one) + "\n" for one in (self.environment, *self.kept.values())]
        replace_file(self.path, "".join(text).encode())

    def __contains__(self, cell: tuple) -> bool:
        return cell in self.kept

    def keep(self, cell: tuple, figures: dict[str, Any]) -> None:
        record = self.kept[cell] = dict(zip(_KEY, cell)) | figures
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def of(self, wanted: Iterator[tuple]) -> list[dict[str, Any]]:
        return [self.kept[cell] for cell in wanted]


_KEY = ("video_tokens", "clip", "rule", "top_k_keys")


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    free = {"date": None, "commit": None}  # the code that counts has a figure of its own
    return {**one, **free} == {**other, **free}


def environment(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What a figure depends on besides its cell. Records of another one are not gone on from."""
    import platform
    from datetime import datetime, timezone

    import torch
    import transformers

    import std_decode
    from bench.environment import output

    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]
    library = Path(std_decode.__file__).parent
    rooms = ("model", "passes", "rounds")
    sources = sorted(path for room in rooms for path in (library / room).glob("*.py"))
    sources += [Path(__file__).parent / f"{part}.py" for part in ("clips", "rules", "trials")]
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    return {
        "checkpoint": weights,
        "code": code,
        "commit": output("git", "rev-parse", "--short=12", "HEAD"),
        "events": options.events,
        "draft_length": options.draft_length,
        "threads": options.threads,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def command(options: argparse.Namespace) -> str:
    """The command line that writes the same again."""
    words = ["python", "-m", "bench", "selection"]
    defaults = argparse.Namespace(**_defaults())
    for name in ("video_tokens", "top_k_keys", "rules", "rules_at"):
        if getattr(options, name) != getattr(defaults, name):
            words += ["--" + name.replace("_", "-"), *map(str, getattr(options, name))]
    for name in ("clips", "events", "draft_length", "threads"):
        if getattr(options, name) != getattr(defaults, name):
            words += ["--" + name.replace("_", "-"), str(getattr(options, name))]
    words += ["--full"] * options.full
    words += ["--checkpoint", "FOLDER"] * (options.checkpoint is not None)
    return shlex.join([*words, "--out", str(options.out)])


def _defaults() -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return vars(parser.parse_args(["selection"]))

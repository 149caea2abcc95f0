"""The measured tables of the documentation, and the plots, from the results files."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from pathlib import Path
from typing import Any

from bench.arguments import new_parser
from bench.environment import ROOT
from bench.report import gpu_notes, tables

PAGES = ("README.md", "docs/pays.md", "docs/cards.md", "docs/measured.md")
_HELP = f"""\
Rewrites the tables of README.md, docs/pays.md, docs/cards.md and docs/measured.md that come from
results files, and draws each file's plots. A table stands between the lines

  <!-- table: NAME -->
  <!-- end -->

where NAME is one of {", ".join(tables.TABLES)}. Each results file is of one device, and
its first record says which, with versions, driver, commit and date:

  demo      demo-DEVICE.jsonl, by python -m bench demo
  decode    decode-DEVICE.jsonl, by python -m bench decode; plots beside it
  kernels   kernels-DEVICE.jsonl, by python -m bench kernels; a plot beside it
  prefill   prefill-DEVICE.jsonl, by python -m bench prefill
  promises  promises-DEVICE.jsonl, by python -m bench promises
  real      real-PART-DEVICE.jsonl, by python -m bench real; real-short is the gist of them
  offload   offload-DEVICE.jsonl, by python -m bench offload
  ceiling   roofline.md, by python -m bench roofline: predicted, not measured
  cards     roofline-link.md, by python -m bench roofline --link: likewise
  pays      rows of demo and of ceiling

gpu-notes.md, beside the results, sets what a GPU showed of Qwen2-VL-7B beside what was predicted.
Of what has no file yet there is no table. To publish a GPU's results copy the files that
python -m bench gpu has written into the folder, whatever they say, and run this.

--check writes nothing and fails where a page and results disagree. Needs no matplotlib, no torch.
Exit status: 0, 1 if --check finds a difference, 2 if a page or a file cannot be understood."""


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "report",
        "write the measured tables and plots from the results files, or check them",
        _HELP,
    )
    add = parser.add_argument
    add("--check", action="store_true", help="only say whether pages and results agree")
    add("--results", type=Path, default=ROOT / "bench/results", metavar="DIR",
        help="where the files are (default bench/results)")  # fmt: skip
    add("--readme", type=Path, nargs="+", metavar="FILE",
        default=[ROOT / name for name in PAGES],
        help=f"what to rewrite (default {', '.join(PAGES)})")  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        pages = {path: path.read_text(encoding="utf-8") for path in options.readme}
        wanted = {path: rewritten(text, options.results) for path, text in pages.items()}
        notes = options.results / gpu_notes.NAME
        beside = gpu_notes.page(options.results)
        if beside is not None:
            wanted[notes] = beside
            pages[notes] = notes.read_text(encoding="utf-8") if notes.exists() else ""
    except (tables.Unclear, OSError) as error:
        print(f"bench report: {error}", file=sys.stderr)
        return 2
    if options.check:
        return max(_check(path.name, pages[path], wanted[path]) for path in pages)
    for path, found in pages.items():
        if wanted[path] != found:
            from std_decode.app.output import replace_file

            replace_file(path, wanted[path].encode())
        print(f"{path}: {'rewritten' if wanted[path] != found else 'unchanged'}")
    for path in sorted(options.results.glob("*.jsonl")):
        if path.name.startswith(("decode-", "kernels-")):
            from bench.report import plots

            drawn = plots.write(path)
            told = f"plots in {drawn}" if drawn else "no plots: nothing timed, or no matplotlib"
            print(f"{path}: {told}")
    return 0


def rewritten(text: str, results: Path) -> str:
    """A page with its tables as the results have them.

    Raises:
        Unclear: a mark that is not closed, an unknown table, a file that cannot be understood.
    """

    def table(found: re.Match[str]) -> str:
        name = found[1]
        if name not in tables.TABLES:
            known = ", ".join(tables.TABLES)
            raise tables.Unclear(f"a page has a table {name}, expected one of {known}")
        lines = tables.TABLES[name](results)
        inside = "\n" + "\n".join(lines) + "\n\n" if lines else ""
        return f"<!-- table: {name} -->\n{inside}<!-- end -->"

    mark = re.compile(r"<!-- table: (\S+) -->\n((?!<!-- table).*\n)*?<!-- end -->")
    if len(mark.findall(text)) != text.count("<!-- table:"):
        raise tables.Unclear('a page has a "<!-- table: NAME -->" without "<!-- end -->"')
    return mark.sub(table, text)


def _check(name: str, found: str, wanted: str) -> int:
    if found == wanted:
        return 0
    old, new = (text.splitlines(keepends=True) for text in (found, wanted))
    sys.stdout.writelines(difflib.unified_diff(old, new, name, f"{name}, by the results"))
    print(
        f"bench report: {name} and results disagree; run python -m bench report", file=sys.stderr
    )
    return 1

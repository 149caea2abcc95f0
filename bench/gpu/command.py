"""One whole round on a GPU, what matters most first. All is on disk once it is known."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from bench.arguments import between, new_parser

_HELP = """\
Runs one round on a GPU, in the order of what one would know if it ended there:

  identity   tokens with the patch and without, with graphs and without; bits of one shape
  one        a 7B model at 1 x 25,000: dense steps, drafts and verifications, with the model's
             weights and with 4-bit drafts, captured, compiled and neither, beside transformers'
  promises   whose bits depend on how many tokens a pass feeds, and what one shape costs
  tests      the rest of the GPU test suite
  kernels    each op at a few real sizes beside its rivals
  many       the 7B at 8 and 32 rows, and the demo model
  prefill    time to the first token
  memcheck   every op under compute-sanitizer, where that is installed

The first three have about four minutes of the nine (see --help of bench decode, kernels, prefill
and promises). Nobody needs to watch: each part has its share of --seconds, what a part does not
use is for those after it, and a part that fails or hangs costs the others nothing. What computes
something wrong is reported and not timed. What did not fit is listed as out of time. A few lines
about each part are printed when it ends, and no more. It needs no network, no PyAV, and 78 GiB do.

Writes into DIR as it goes, so that a run that is cut off still counts:

  round-DEVICE.jsonl     GPU, driver, versions, commit, date; each test; how each part ended, and
                         the GPU's clocks and temperature meanwhile
  round.log              all that the parts said: tables, tracebacks
  decode-DEVICE.jsonl, .png    decoding, whole models
  kernels-DEVICE.jsonl, .png   each op beside its rivals
  prefill-DEVICE.jsonl         time to the first token, patched beside unpatched
  promises-DEVICE.jsonl        passes that round, and passes of one shape

RESUME. --resume goes on where a run into DIR was cut off or ran out of time, given the same
sources, versions and GPU. --resume EARLIER takes the files of EARLIER into DIR first, for a
machine on which DIR begins empty: put what came back from the run before into a folder that
travels with the repository (git must not ignore it), and name it. Tests that passed are not run
again, parts that are complete are left out, and figures that are there are kept; the time is for
the rest. Run it until nothing is out of time; of 15 minutes a first run leaves 240 seconds for a
second. To publish, copy the .jsonl files but the first to bench/results and run python -m bench
report.

Exit status: 0 if everything passed, 1 if something failed or is wrong, 2 without a GPU."""
_EXAMPLES = """\
examples:
  python -m bench gpu --out round1
  python -m bench gpu --out round1 --resume             go on in the same folder
  python -m bench gpu --out "$OUT" --resume round1 --seconds 240
                                                        go on from files brought along
  python -m bench gpu --out round1 --part one --seconds 300"""
DEVICE_FILES = ("round", "decode", "kernels", "prefill", "promises")  # NAME-DEVICE.jsonl


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "gpu",
        "test and time decoding and ops on the GPU of this machine, in under 10 minutes",
        _HELP,
        _EXAMPLES,
    )
    from bench.gpu.parts import PARTS

    names = [part.name for part in PARTS]
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where to write")
    add("--seconds", type=between(float, 1, 2**31), default=540.0, metavar="S",
        help="time box of all, which ends at most 20 seconds later (default 540)")  # fmt: skip
    add("--part", choices=names, nargs="+", default=names, metavar="PART",
        help=f"of {', '.join(names)} (default: all)")  # fmt: skip
    add("--resume", nargs="?", type=Path, const=True, metavar="EARLIER",
        help="go on where a run into DIR, or the one that wrote EARLIER, was cut off")  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """The command."""
    started = time.monotonic()
    import torch

    from bench.environment import environment
    from bench.gpu.parts import PARTS, run_parts

    if not torch.cuda.is_available():
        print("bench gpu: torch finds no GPU on this machine; nothing was run", file=sys.stderr)
        return 2
    about = environment(torch.device("cuda"))
    earlier = None if options.resume is True else options.resume
    if earlier is not None and not bring(earlier, options.out, about["device"]):
        found = f"{earlier} has no round-*.jsonl of {about['device']}"
        print(f"bench gpu: --resume: {found}; nothing was run", file=sys.stderr)
        return 2
    # As Ctrl-C does: what a part has started must not outlive this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parts = [part for part in PARTS if part.name in options.part]
    deadline = started + options.seconds
    return run_parts(options.out, about, parts, deadline, options.resume is not None)


def bring(earlier: Path, out: Path, device: str) -> bool:
    """Copy an earlier run's files of this device into `out`, where it has none of its own.

    Returns:
        Whether there is a run to go on from.
    """
    from bench.records import file_of

    for name in DEVICE_FILES:
        source, target = (file_of(folder, name, device) for folder in (earlier, out))
        if source.exists() and not target.exists():
            out.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    return file_of(out, "round", device).exists()

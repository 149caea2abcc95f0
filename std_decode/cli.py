"""The command line: ``std-decode demo``.

Exit status: 0 if all went well and the tokens were identical, 1 if they were not, 2 for bad input
(one line on stderr says what), 130 when interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from std_decode import __version__
from std_decode.demo.camera import TAGS
from std_decode.demo.video import MOST_SECONDS

DEMO = """\
Show sparse-to-dense decoding at work, with nothing to download.

A camera clip is rendered to an mp4 file, read back, and narrated by a tiny trained video LLM (a
Qwen2-VL of 2.5M parameters that comes with the package): once patched, once unpatched. The table
compares them; the tokens must be identical. On a CPU and at this size a draft step costs nearly as
much as a dense one until the video is long (--seconds 1024), so see the method, not its speed."""


class BadInput(Exception):
    """What the user gave cannot be used; the message is one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        expected = f"at least {least}" if most is None else f"{least} to {most}"
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no whole number, expected {expected}"
            ) from None
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"is {value}, expected {expected}")
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="std-decode",
        description="Lossless faster decoding for video LLMs: draft sparsely, verify densely.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="narrate a camera clip, patched and unpatched, side by side",
        description=DEMO,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = demo.add_argument
    add("--video", type=Path, metavar="FILE", help="narrate this video instead of a new clip")
    add("--keep", type=Path, metavar="FILE", help="keep the rendered clip here (a new file)")
    add(
        "--seconds",
        type=_whole_number(1, MOST_SECONDS),
        default=256,
        metavar="N",
        help="length of the clip, 4 video tokens each (default: %(default)s)",
    )
    add(
        "--events",
        type=_whole_number(1, TAGS),
        default=12,
        metavar="N",
        help="events in the clip (default: %(default)s)",
    )
    add(
        "--seed",
        type=_whole_number(0),
        default=0,
        metavar="N",
        help="of the clip and of sampling (default: %(default)s)",
    )
    add("--sample", action="store_true", help="sample at temperature 1 instead of greedy")
    add(
        "--top-k-keys",
        type=_whole_number(1),
        default=64,
        metavar="K",
        help="video keys a draft reads per layer and KV head (default: %(default)s)",
    )
    add(
        "--draft-length",
        type=_whole_number(0, 63),
        default=4,
        metavar="G",
        help="tokens drafted a round; 0 decodes densely (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own). Returns the exit status."""
    options = _parser().parse_args(argv)
    # Importing torch and transformers takes seconds: first see whether the request makes sense.
    from std_decode.demo.run import demo
    from std_decode.demo.video import VideoError

    try:
        return demo(options)
    except (BadInput, VideoError) as error:
        print(f"std-decode: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("std-decode: interrupted", file=sys.stderr)
        return 130

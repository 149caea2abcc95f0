"""The command line: ``std-decode demo``, ``std-decode batch`` and ``std-decode sparsity``.

Exit status: 0 if all went well and the tokens were identical, 1 if they were not, 2 for bad input
(one line on stderr says what), 130 when interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from std_decode import __version__
from std_decode.demo.camera import TAGS
from std_decode.demo.video import MOST_SECONDS

DEMO = """\
Show sparse-to-dense decoding at work, with nothing to download.

A camera clip is rendered to an mp4 file, read back, and narrated by a tiny trained video LLM (a
Qwen2-VL of 2.5M parameters that comes with the package): patched, unpatched, and patched without
drafts (the dense path). The table compares them; the tokens must be identical. On a CPU, at this
size, a draft step costs nearly as much as a dense one until the video is long, so by itself the
patch hardly drafts: see the method with --draft-length 4 and --picture, not its speed."""

SPARSITY = """\
Show how sparse a model's attention is on a video of yours, what drafts that rely on it come to,
and which options of std_decode.patch that speaks for. Writes one page of plots and a JSON file.

The model answers once, densely. Along that answer, for each number of keys K:
  attention kept   share of the attention of the answer's tokens, by layer and KV head, that falls
                   on the keys a draft would read; beside it that of the K best keys in hindsight
  next tokens      how many the sparse model chooses as the dense one does, after the right ones
The smallest K is kept that comes close to the most, and with it the answer is generated again with
each draft length: acceptance, tokens per dense pass, and the time of a round on this machine.

Without --model the demo model narrates a rendered clip (under a minute). With --model M --video
FILE, M is a folder or hub id of an image-text-to-text model, and needs the extra [hub]
(torchvision, pillow, jinja2). The answer is generated some 20 times over: begin with few --frames.
Needs matplotlib: pip install "sparse-to-dense[bench]"."""
SPARSITY_EXAMPLES = """\
examples:
  std-decode sparsity
  std-decode sparsity --seconds 1024 --picture long.png
  std-decode sparsity --model Qwen/Qwen2-VL-2B-Instruct --video clip.mp4 --frames 16
  std-decode sparsity --model ./mine --video clip.mp4 --prompt "What is sold?" --dtype bfloat16"""


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


def _draft_length(text: str) -> int | str:
    return text if text == "auto" else _whole_number(0, 63)(text)


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
        type=_draft_length,
        default="auto",
        metavar="G",
        help="tokens drafted a round, 0 to 63; 0 decodes densely, auto drafts where that pays, "
        "which it does not before some thousand video tokens (default: %(default)s)",
    )
    add(
        "--repeat",
        type=_whole_number(1, 1000),
        default=1,
        metavar="N",
        help="narrate so often each way, in turns, and compare medians (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    add("--picture", type=Path, metavar="FILE.png",
        help="draw which seconds of the clip the drafts read, round by round")  # fmt: skip
    _add_sparsity(commands)
    from std_decode.batch.arguments import add_parser as add_batch  # which imports from here

    add_batch(commands)
    return parser


def _add_sparsity(commands: Any) -> None:
    sparsity = commands.add_parser(
        "sparsity",
        help="measure how sparse a model's attention is, and suggest options for patch",
        description=SPARSITY,
        epilog=SPARSITY_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = sparsity.add_argument
    add("--picture", type=Path, metavar="FILE.png", default=Path("sparsity.png"),
        help="the page of plots (default: %(default)s)")  # fmt: skip
    add("--json", type=Path, metavar="FILE",
        help="the figures (default: the picture's name with .json)")  # fmt: skip
    add(
        "--video", type=Path, metavar="FILE", help="of any length; without --model a rendered clip"
    )
    add("--max-new-tokens", type=_whole_number(3), metavar="N",
        help="of the answer (default: 128; of the demo model all it tells)")  # fmt: skip
    add("--top-k-keys", type=_whole_number(1), nargs="+", metavar="K",
        default=[2**i for i in range(4, 13)],
        help="numbers of keys to compare, besides all (default: 16 32 64 ... 4096)")  # fmt: skip
    add("--draft-lengths", type=_whole_number(1, 63), nargs="+", metavar="G",
        default=[1, 2, 4, 8], help="to compare, besides none (default: 1 2 4 8)")  # fmt: skip
    own = sparsity.add_argument_group("a model of yours")
    add = own.add_argument
    add("--model", metavar="M", help="folder or hub id; needs --video")
    add("--prompt", metavar="TEXT", help="(default: Describe the video in detail.)")
    add("--frames", type=_whole_number(1, 4096), metavar="N",
        help="to sample from the video, evenly in time (default: 32)")  # fmt: skip
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights (default: auto, as saved)")  # fmt: skip
    add("--device", metavar="DEVICE", help="such as cpu, cuda:1 (default: cuda, else cpu)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    clip = sparsity.add_argument_group("a clip for the demo model")
    add = clip.add_argument
    add("--seconds", type=_whole_number(1, MOST_SECONDS), metavar="N",
        help="4 video tokens each (default: 256)")  # fmt: skip
    add("--events", type=_whole_number(1, TAGS), metavar="N", help="(default: 12)")
    add("--seed", type=_whole_number(0), metavar="N", help="of the clip (default: 0)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own). Returns the exit status."""
    options = _parser().parse_args(argv)
    # Importing torch and transformers takes seconds: first see whether the request makes sense.
    from std_decode.demo.video import VideoError
    from std_decode.inputs import InputError

    try:
        if options.command == "demo":
            from std_decode.demo.run import demo

            return demo(options)
        if options.command == "batch":
            from std_decode.batch.run import batch

            return batch(options)
        from std_decode.sparsity.run import sparsity

        return sparsity(options)
    except (BadInput, InputError, VideoError) as error:
        print(f"std-decode: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("std-decode: interrupted", file=sys.stderr)
        return 130

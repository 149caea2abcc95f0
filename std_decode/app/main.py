"""The command line: ``std-decode demo``, ``generate``, ``compare``, ``batch``, ``sparsity``.

Exit status: 0 if all went well and the tokens were identical, 1 if they were not, 2 for bad input
and for output that cannot be written (one line on stderr says what), 130 when interrupted, 141
when nobody read a table to its end.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from std_decode import __version__
from std_decode.app.arguments import (
    add_compare,
    add_generate,
    add_own_model,
    add_prompt_lookup,
    draft_length,
    seed,
    whole_number,
)
from std_decode.app.batch.arguments import add_parser as add_batch
from std_decode.demo.camera import TAGS
from std_decode.demo.video import MOST_SECONDS
from std_decode.errors import BadInput, InputError, drop_output

DEMO = """\
Show sparse-to-dense decoding at work, with nothing to download.

A camera clip is rendered to an mp4 file, read back, and narrated by a tiny trained video LLM (a
Qwen2-VL of 2.9M parameters that comes with the package): patched, unpatched, and patched without
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
(torchvision, pillow, jinja2); with --prompt-file FILE instead of --video it may be a text model,
and what competes is the text. The answer is generated some 20 times over: begin with few --frames.
Needs matplotlib: pip install "sparse-to-dense[bench]"."""
SPARSITY_EXAMPLES = """\
examples:
  std-decode sparsity
  std-decode sparsity --seconds 1024 --picture long.png
  std-decode sparsity --model Qwen/Qwen2-VL-2B-Instruct --video clip.mp4 --frames 16
  std-decode sparsity --model ./mine --video clip.mp4 --prompt "What is sold?" --dtype bfloat16"""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


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
        type=whole_number(1, MOST_SECONDS),
        default=256,
        metavar="N",
        help="length of the clip, 4 video tokens each (default: %(default)s)",
    )
    add(
        "--events",
        type=whole_number(1, TAGS),
        default=12,
        metavar="N",
        help="events in the clip (default: %(default)s)",
    )
    add(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="of the clip and of sampling (default: %(default)s)",
    )
    add("--sample", action="store_true", help="sample at temperature 1 instead of greedy")
    add(
        "--top-k-keys",
        type=whole_number(1),
        default=64,
        metavar="K",
        help="video keys a draft reads per layer and KV head (default: %(default)s)",
    )
    add(
        "--draft-length",
        type=draft_length,
        default="auto",
        metavar="G",
        help="tokens drafted a round, 0 to 63; 0 decodes densely, auto drafts where that pays, "
        "which it does not before some thousand video tokens (default: %(default)s)",
    )
    add_prompt_lookup(add)
    add(
        "--repeat",
        type=whole_number(1, 1000),
        default=1,
        metavar="N",
        help="narrate so often each way, in turns, and compare medians (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    add("--picture", type=Path, metavar="FILE.png",
        help="draw which seconds of the clip the drafts read, round by round")  # fmt: skip
    add_generate(commands)
    add_compare(commands)
    _add_sparsity(commands)
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
    add("--max-new-tokens", type=whole_number(3), metavar="N",
        help="of the answer (default: 128; of the demo model all it tells)")  # fmt: skip
    add("--top-k-keys", type=whole_number(1), nargs="+", metavar="K",
        default=[2**i for i in range(4, 13)],
        help="numbers of keys to compare, besides all (default: 16 32 64 ... 4096)")  # fmt: skip
    add("--draft-lengths", type=whole_number(1, 63), nargs="+", metavar="G",
        default=[1, 2, 4, 8], help="to compare, besides none (default: 1 2 4 8)")  # fmt: skip
    own = sparsity.add_argument_group("a model of yours")
    own.add_argument(
        "--model", metavar="M", help="folder or hub id; needs --video or --prompt-file"
    )
    add_own_model(own)
    clip = sparsity.add_argument_group("a clip for the demo model")
    add = clip.add_argument
    add("--seconds", type=whole_number(1, MOST_SECONDS), metavar="N",
        help="4 video tokens each (default: 256)")  # fmt: skip
    add("--events", type=whole_number(1, TAGS), metavar="N", help="(default: 12)")
    add("--seed", type=seed, metavar="N", help="of the clip (default: 0)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own). Returns the exit status."""
    if sys.stdout is None:  # closed, as by `>&-`
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    options = _parser().parse_args(argv)
    # Importing torch and transformers takes seconds: first see whether the request makes sense.
    from std_decode.inputs import check_packages

    try:
        try:
            command = _command(options.command)
        except ImportError:  # transformers does not import beside a torchvision for another torch
            if find_spec("torchvision") is not None:
                check_packages("torchvision")
            raise
        return command(options)
    except (BadInput, InputError) as error:
        print(f"std-decode: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("std-decode: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `std-decode generate | head -1`
        drop_output()
        return 0
    except SystemExit:  # rich's way to end where nobody reads on: `std-decode demo | head -1`
        return 141
    except OSError as error:
        if error.errno not in _FULL:
            raise
        print(f"std-decode: the output cannot be written: {error.strerror}", file=sys.stderr)
        drop_output()
        return 2


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    if name == "demo":
        from std_decode.app.demo import demo as command
    elif name == "generate":
        from std_decode.app.generate import generate as command
    elif name == "compare":
        from std_decode.app.compare import compare as command
    elif name == "batch":
        from std_decode.app.batch.run import batch as command
    else:
        from std_decode.app.sparsity.run import sparsity as command
    return command

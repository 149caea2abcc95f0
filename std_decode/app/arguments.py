"""Options of ``std-decode generate`` and ``compare``. Imports nothing that takes long."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

GENERATE = """\
Answer a question about a video or an image with a model of yours, sooner and in the same words.

The model drafts with sparse attention and verifies densely (std_decode.patch). The answer is
written to stdout as it comes, everything else to stderr.

--model is a folder or hub id of an image-text-to-text model; its processor and chat template make
the prompt. That needs the extra [hub]: pip install "sparse-to-dense[hub]". Without --video and
--image the question is text only, and --model may be a text model too; --prompt-file takes one of
any length. Without --model the demo model that comes with the package narrates the video, or a
rendered clip."""
GENERATE_EXAMPLES = """\
examples:
  std-decode generate
  std-decode generate --model Qwen/Qwen2-VL-2B-Instruct --video clip.mp4 --prompt "What is sold?"
  std-decode generate --model ./mine --image photo.jpg --prompt "Read the sign." --dtype bfloat16
  std-decode generate --model ./mine --prompt "Write a poem." --sample --seed 7 --stats
  std-decode generate --model ./mine --prompt "Say it again." --draft-length 0 --prompt-lookup yes
  torchrun --nproc-per-node 4 -m std_decode generate --tp --model Qwen/Qwen2-VL-72B-Instruct \\
    --prompt "What is sold?" --video clip.mp4 --dtype bfloat16"""

COMPARE = """\
See on your own model and video whether the patch keeps its promise, and whether it pays.

The same question is answered in turns: unpatched; patched, a first time, which pays for setting
up; patched again, which is what is compared. Then the table:
  identical     whether all answers have the same tokens. Where not: the first difference, and how
                far apart the two best tokens were there. In float32 a difference of less than 1e-4
                in log-probability may fall either way, nothing else. In bfloat16 and float16
                rounding is coarser: what it does to this model is measured, and told beside it
  speed         of decoding (after the first token) and in all, unpatched against patched
  acceptance    of drafts, tokens per dense pass, memory
and advice, from the measurements of `std-decode sparsity` on the greedy answer: how many keys a
draft should read, which draft length that speaks for, and whether drafting pays here. That
generates the answer some 20 times more, as a rule without reading the video again; --no-advice
leaves it out.

The options are those of `std-decode generate`. The exit status is 1 if tokens differ."""
COMPARE_EXAMPLES = """\
examples:
  std-decode compare
  std-decode compare --model Qwen/Qwen2-VL-2B-Instruct --video clip.mp4 --repeat 3
  std-decode compare --model ./mine --video clip.mp4 --frames 128 --dtype bfloat16 --json out.json
  std-decode compare --model ./mine --video clip.mp4 --draft-weights int4 --draft-length 4"""


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
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


seed = whole_number(0, 2**63 - 1)  # what torch takes


def question(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty, expected a question")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no UTF-8, expected a question") from None
    return text


def question_file(name: str) -> str:
    """The question in a file, or, where `name` is "-", in what is piped in."""
    if name == "-" and sys.stdin is None:
        raise argparse.ArgumentTypeError("stdin is closed, expected text from it")
    if name == "-" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise argparse.ArgumentTypeError("torchrun's processes share one stdin; give a file")
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except KeyboardInterrupt:  # while it was typed in
        print("std-decode: interrupted", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise argparse.ArgumentTypeError(f"{name}: {why}, expected a file of text") from None
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"{name} is no UTF-8, expected a file of text") from None
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{name} is empty, expected a file with a question")
    return text


def draft_length(text: str) -> int | str:
    return text if text == "auto" else whole_number(0, 63)(text)


def _positive(text: str, most: float = float("inf")) -> float:
    expected = "more than 0" + (f", at most {most:g}" if most < float("inf") else "")
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, expected {expected}") from None
    if not 0 < value <= most or value == float("inf"):
        raise argparse.ArgumentTypeError(f"is {value:g}, expected {expected}")
    return value


def prompt_lookup(text: str) -> bool | str:
    """As `patch` takes it."""
    words: dict[str, bool | str] = {"no": False, "yes": True, "auto": "auto"}
    if text not in words:
        raise argparse.ArgumentTypeError(f"{text!r}, expected auto, yes or no")
    return words[text]


def add_prompt_lookup(add: Callable[..., Any]) -> None:
    add("--prompt-lookup", type=prompt_lookup, default="auto", metavar="L",
        help="draft what followed the newest tokens where they stood before, in prompt or answer: "
        "auto (default: where --draft-length is auto, whenever that promises more), yes (with any "
        "--draft-length; with 0 nothing else is drafted), no")  # fmt: skip


def add_own_model(group: Any) -> None:
    """Options of every command that takes a model of the user's."""
    add = group.add_mutually_exclusive_group().add_argument
    add("--prompt", type=question, metavar="TEXT", help="(default: Describe the video in detail.)")
    add("--prompt-file", type=question_file, dest="prompt", metavar="FILE",
        help="the prompt from a file, or - for stdin; as long as you like")  # fmt: skip
    add_loading(group)


def add_loading(group: Any) -> None:
    """How a model of the user's and its videos are loaded."""
    add = group.add_argument
    add("--frames", type=whole_number(1, 4096), metavar="N",
        help="to sample from a video, evenly in time (default: 32)")  # fmt: skip
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights (default: auto, as saved)")  # fmt: skip
    add("--device", metavar="DEVICE", help="such as cpu, cuda:1 (default: cuda, else cpu)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")


def add_generate(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="answer a question about a video with a model of yours",
        description=GENERATE,
        epilog=GENERATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_question(generate)
    add = generate.add_argument
    add("--stats", action="store_true",
        help="tell on stderr what drafting came to (last_stats)")  # fmt: skip
    add("--tp", action="store_true",
        help="share the model among the processes of torchrun, a GPU each: tensor "
        "parallelism; our error is one line, then torchrun's report follows")  # fmt: skip


def add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="unpatched and patched on your model and video: identical, faster, worth it?",
        description=COMPARE,
        epilog=COMPARE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_question(compare)
    add = compare.add_argument
    add("--repeat", type=whole_number(1, 1000), default=1, metavar="N",
        help="answer so often each way, in turns, and compare medians "
        "(default: %(default)s)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    add("--no-advice", dest="advice", action="store_false",
        help="do not measure what the advice is derived from")  # fmt: skip


def reproducible(text: str) -> bool | int | str:
    """As `patch` takes it."""
    words: dict[str, bool | int | str] = {
        "no": False, "yes": True, "auto": "auto", "unpatched": "unpatched",
    }  # fmt: skip
    if text in words:
        return words[text]
    if text.isdigit() and 2 <= int(text) <= 64:
        return int(text)
    raise argparse.ArgumentTypeError(
        f"{text!r}, expected no, yes, auto, unpatched or 2 to 64 tokens a pass"
    )


def _add_question(command: Any) -> None:
    add = command.add_argument
    add("--model", metavar="M", help="folder or hub id (default: the demo model)")
    add("--video", type=Path, metavar="FILE", help="of any length")
    add("--image", type=Path, metavar="FILE", help="besides the video or instead of it")
    add_own_model(command)
    add = command.add_argument_group("the answer").add_argument
    add("--max-new-tokens", type=whole_number(1), metavar="N",
        help="at most so long (default: 128; of the demo model all it tells)")  # fmt: skip
    add("--sample", action="store_true",
        help="sample, by the model's own generation config, instead of greedy")  # fmt: skip
    add("--temperature", type=_positive, metavar="T", help="of --sample")
    add("--top-p", type=lambda text: _positive(text, 1), metavar="P", help="of --sample")
    add("--seed", type=seed, default=0, metavar="N",
        help="of sampling, and of the demo's clip (default: %(default)s)")  # fmt: skip
    add = command.add_argument_group("the patch").add_argument
    add("--top-k-keys", type=whole_number(1), default=1024, metavar="K",
        help="video keys a draft reads per layer and KV head (default: %(default)s)")  # fmt: skip
    add("--draft-length", type=draft_length, default="auto", metavar="G",
        help="tokens drafted a round, 0 to 63; 0 decodes densely, auto drafts where that pays "
        "(default: %(default)s)")  # fmt: skip
    add_prompt_lookup(add)
    add("--draft-weights", choices=["int4", "auto"],
        help="draft with 4-bit copies of the weights (default: the model's own)")  # fmt: skip
    add("--draft-weights-cache", type=Path, metavar="FILE",
        help="keep the 4-bit copies here for the next time")  # fmt: skip
    add("--kv-cache", choices=["offloaded"],
        help="keep the prompt's keys and values in the host's memory, for what fits no GPU "
        "(default: on the device)")  # fmt: skip
    add("--no-reselect", dest="reselect", action="store_false",
        help="keep the keys that the prompt selected")  # fmt: skip
    add("--reproducible", type=reproducible, default="auto", metavar="R",
        help="which bits drafts may change: no (the last few), yes (none, passes are of one "
        "shape), a number (so many tokens a pass), unpatched (none, and the tokens are the "
        "unpatched model's), auto (default: in half precision on a CPU the strongest that "
        "the model can have, else no)")  # fmt: skip
    add("--compile", action="store_true",
        help="compile captured passes on a GPU; the first answer then takes long")  # fmt: skip

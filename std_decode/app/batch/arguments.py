"""The arguments of ``std-decode batch``; imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from std_decode.app.arguments import add_loading, draft_length, question, whole_number

BATCH = """\
Ask the same question about many videos, and write one JSON line a video as the answers come.

VIDEOS are files, folders (all videos in them and below, by their names' endings), and lists: text
files (.txt) with a path a line, as seen from the current folder. Each video is answered once,
however often it is named.

A run that was interrupted or killed goes on where it was when the same command is given again:
what is in the file is not asked again, and a line that was cut off is. A video that cannot be read
or answered does not stop the rest; its line has an "error" instead of an "answer". The file is
refused if its answers came by another --model, --frames, --max-new-tokens or --dtype. Another
--prompt adds lines to it, and all else may change: no answer depends on it.

Videos of similar length are answered together, --batch-size at a time, the shorter ones padded on
the left. In float32 the answers are those of one at a time, as far as rounding allows
(docs/promises.md); decoding is greedy. A line is
  {"video": PATH, "prompt": ..., "answer": ..., "prompt_tokens": ..., "tokens": N, "settings": {}}

Without --model the demo model narrates camera clips, from the tag in --prompt "narrate from #07."
(octal) or from each clip's own first tag.

With --ray (extra [ray]) the batches go to workers on Ray Data, which hold a model each: on this
machine, or on the cluster that RAY_ADDRESS names (auto: begun here by `ray start --head`). All its
machines need this package, and the videos under the same paths. A worker that dies is replaced and
its videos are asked again; one that takes down each of its workers gets a line with an error.

Exit status: 0 if each video has an answer, 1 if some have an error, 2 for bad input, 130 when
interrupted."""
EXAMPLES = """\
examples:
  std-decode demo --seconds 64 --keep clip.mp4 && std-decode batch clip.mp4 --out answers.jsonl
  std-decode batch clips/ more.txt --prompt "What is sold?" --out answers.jsonl \\
      --model Qwen/Qwen2-VL-7B-Instruct --frames 64 --batch-size 16 --dtype bfloat16
  the same with --ray                    one worker for each GPU of the cluster
  the same with --retry-errors           ask again where there is an error"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "batch",
        help="ask one question about many videos; resumable, on one machine or many",
        description=BATCH,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("videos", type=Path, nargs="+", metavar="VIDEOS", help="files, folders, .txt lists")
    add(
        "--prompt",
        type=question,
        metavar="TEXT",
        help="the question; only the demo model has one of its own",
    )
    add("--out", type=Path, metavar="FILE.jsonl", required=True,
        help="where the answers go; gone on from if it is there")  # fmt: skip
    add("--batch-size", type=whole_number(1, 1024), default=4, metavar="B",
        help="videos to answer together, at most (default: %(default)s)")  # fmt: skip
    add("--retry-errors", action="store_true",
        help="drop the lines with errors from the file first, and ask again")  # fmt: skip
    add("--max-new-tokens", type=whole_number(1), metavar="N",
        help="of an answer (default: 128; of the demo model all it tells)")  # fmt: skip
    add("--draft-length", type=draft_length, default="auto", metavar="G",
        help="tokens drafted a round, 0 to 63, or auto (default: %(default)s)")  # fmt: skip
    add("--top-k-keys", type=whole_number(1), default=1024, metavar="K",
        help="video keys a draft reads per layer and KV head (default: %(default)s)")  # fmt: skip
    own = parser.add_argument_group("a model of yours")
    add = own.add_argument
    add("--model", metavar="M", help="folder or hub id; needs --prompt and the extra [hub]")
    add_loading(own)
    ray = parser.add_argument_group("many GPUs and machines")
    add = ray.add_argument
    add("--ray", action="store_true", help="answer on Ray Data, by several workers")
    add("--workers", type=whole_number(1), metavar="N",
        help="with --ray (default: one for each GPU, without GPUs one)")  # fmt: skip

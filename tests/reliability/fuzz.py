"""Damaged video files, read in a process with little memory and little time."""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEMORY = 4 << 30  # bytes of address space
SECONDS = 20  # for one file
KINDS = ("a.mp4", "b.mkv", "c.avi", "d.ts")

_HELP = """\
Makes small video files (mp4, mkv, avi, mpegts), damages each copy in one of eight ways (bytes
changed, numbers in headers made extreme, pieces dropped, doubled, swapped, zeroed, cut off, put
in) and has both readers of std_decode read it, in a process of its own with 4 GiB of address
space and 20 seconds for a file. A file must give a clip, or an error of one line; a crash, a hang,
memory that ends or any other exception is a failure.
Exit status: 0, 1 if any case failed."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "fuzz",
        help="damaged video files",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cases", type=int, default=500, metavar="N", help="(500)")
    add("--first", type=int, default=0, metavar="N", help="number of the first (0)")
    add("--out", type=Path, metavar="DIR", help="write a section of DIR/reliability.md")
    parser.set_defaults(run=run)


def make_files(folder: Path) -> None:
    """A file of each kind: 40 frames of 96 x 64 that change, B frames, two key frames or more."""
    import av
    import numpy as np

    noise = np.random.default_rng(0).integers(0, 256, (64, 136, 3), dtype=np.uint8)
    for name in KINDS:
        codec = "mpeg4" if name.endswith("avi") else "libx264"
        with av.open(str(folder / name), "w") as container:
            container.metadata["comment"] = "{}"
            stream: Any = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt, stream.gop_size = 96, 64, "yuv420p", 15
            for i in range(40):
                picture = np.ascontiguousarray(noise[:, i : i + 96])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())


BOXES = (b"moov", b"mvhd", b"tkhd", b"mdhd", b"stsd", b"avc1", b"avcC", b"stts", b"ctts", b"stss",
         b"stsc", b"stsz", b"stco", b"elst", b"udta", b"hdlr")  # fmt: skip
EXTREME = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


def damaged(data: bytes, draw: random.Random) -> bytes:
    how = draw.randrange(8)
    out = bytearray(data)
    a, b = sorted(draw.randrange(len(out)) for _ in range(2))
    b = min(b, a + draw.choice((4, 64, 1024)))
    if how == 0:
        for _ in range(draw.randint(1, 30)):
            out[draw.randrange(len(out))] = draw.randrange(256)
    elif how == 1:  # a number near the beginning of a box, or anywhere
        places = [place for box in BOXES if (place := data.find(box)) >= 0]
        for _ in range(draw.randint(1, 4)):
            at = draw.choice(places) + draw.randrange(-4, 80) if places else draw.randrange(512)
            at = max(0, min(len(out) - 4, at))
            out[at : at + 4] = draw.choice(EXTREME).to_bytes(4, "big")
    elif how == 2:
        del out[a:b]
    elif how == 3:
        out[a:a] = out[a:b] * draw.randint(1, 50)
    elif how == 4:
        out = out[b:] + out[:b]
    elif how == 5:
        out[a:b] = bytes(b - a)
    elif how == 6:
        del out[draw.randrange(len(out)) :]
    else:
        out[a:a] = draw.randbytes(draw.choice((1, 16, 4096)))
    return bytes(out)


def read(path: Path) -> dict[str, str]:
    """What each reader makes of it: "clip", "error: ...", or "bug: ..."."""
    from std_decode.demo import video
    from std_decode.errors import InputError
    from std_decode.frames import read_video

    found = {}
    for name, reader in (("inputs", lambda: read_video(path, 8).frames),
                         ("demo", lambda: video.read(path)[0])):  # fmt: skip
        try:
            frames = reader()
            right = frames.ndim == 4 and frames.dtype == "uint8" and len(frames) > 0
            found[name] = "clip" if right else f"bug: frames {frames.shape}"
        except InputError as error:
            line = str(error)
            bad = "\n" in line or str(path) not in line or len(line) > 300 + len(str(path))
            found[name] = f"bug: not one line: {line}" if bad else f"error: {line}"
        except BaseException as error:
            found[name] = f"bug: {type(error).__name__}: {error}"
    return found


def worker(folder: Path, first: int, last: int, seconds: int) -> None:
    """Read the cases from `first` on, a JSON line for each."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for case in range(first, last):
        draw = random.Random(case)
        name = KINDS[case % len(KINDS)] if case % 2 else KINDS[0]  # every other an mp4
        path = folder / f"case{Path(name).suffix}"
        path.write_bytes(damaged((folder / name).read_bytes(), draw))
        signal.alarm(seconds)  # ends this process
        found = read(path)
        signal.alarm(0)
        # Not getrusage: there a process begins with the peak of the one that started it.
        status = Path("/proc/self/status").read_text()
        peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1])
        print(json.dumps({"case": case, "peak_kib": peak, **found}), flush=True)


def fuzz(first: int, count: int, each: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Run the cases in processes of their own.

    Returns:
        `outcomes`: how often each came; `failures` in words; `peak_mib` of a process.
    """
    outcomes: Counter = Counter()
    failures: list[str] = []
    peak, case = 0, first
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_files(folder)
        while case < first + count:
            command = [sys.executable, "-m", "tests.reliability.fuzz", folder, case, first + count,
                       SECONDS]  # fmt: skip
            done = subprocess.run(
                list(map(str, command)), cwd=Path(__file__).parents[2], capture_output=True,
                text=True, errors="replace",
            )  # fmt: skip
            lines = [json.loads(line) for line in done.stdout.splitlines()]
            for line in lines:
                peak = max(peak, line["peak_kib"])
                for reader in ("inputs", "demo"):
                    outcomes[line[reader].partition(":")[0]] += 1
                    if line[reader].startswith("bug"):
                        failures.append(f"case {line['case']}, {reader}: {line[reader]}")
                each()
            case += len(lines)
            if case < first + count:  # the process ended in this one
                how = "takes too long" if done.returncode == -signal.SIGALRM else "crashes"
                last = done.stderr.strip().splitlines()[-1:]
                failures.append(f"case {case} {how} (status {done.returncode}) {' '.join(last)}")
                case += 1
    return {"outcomes": dict(outcomes), "failures": failures, "peak_mib": peak / 1024}


def run(options: argparse.Namespace) -> int:
    from rich.progress import Progress

    from bench.sections import about
    from tests.reliability import report

    step, found = 50, []
    with Progress(disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("damaged files", total=options.cases)
        for first in range(options.first, options.first + options.cases, step):
            count = min(step, options.first + options.cases - first)
            found.append(fuzz(first, count, lambda: progress.advance(task)))
    outcomes = sum((Counter(one["outcomes"]) for one in found), Counter())
    failures = [line for one in found for line in one["failures"]]
    text = "\n".join([
        f"`python -m tests.reliability fuzz --cases {options.cases}` ({about()}): damaged mp4, "
        f"mkv, avi and mpegts files, each read by both readers: {outcomes['clip']:,} gave a clip, "
        f"{outcomes['error']:,} an error of one line, {len(failures)} failed. Peak resident "
        f"memory of a process {max(one['peak_mib'] for one in found):.0f} MiB.",
        *(f"- {line}" for line in failures),
    ])  # fmt: skip
    print(text)
    report.write(options.out, "Damaged video files", text)
    return int(bool(failures))


if __name__ == "__main__":
    worker(Path(sys.argv[1]), *map(int, sys.argv[2:]))

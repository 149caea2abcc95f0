"""Thousands of rounds in one process: what grows?"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch._subclasses import FakeTensor

WINDOWS = 20  # in which growth is looked for

_HELP = """\
Generates from one patched model, a tiny Qwen2-VL, until N rounds of draft and verification have
gone by, each call with another prompt: batch 1 to 3, video of 1 to 6 frames, 1 to 80 tokens of
text, other draft lengths each round, greedy and sampled in turns, some calls broken off by an
exception, some by way of returned scores. Looks 20 times at what may grow: memory of the process
and of the device, live tensors, captured passes, time per round.

Passes run as they are, and once more captured and replayed (on a GPU as CUDA graphs, on the CPU by
the stand-in of tests/decode/recorder.py). Memory and time of the last quarter are compared with
those of the second; the first pays for setting up.
Exit status: 0, 1 if live tensors, captured passes or memory grew. Time is only told."""


@dataclass
class Look:
    """What there was after so many `rounds`.

    Attributes:
        resident, device: bytes of the process, and allocated on the GPU (0 without one).
        tensors, tensor_bytes: live ones that Python knows of, but for the waiting engine's.
        passes: captured, and with inputs of their own.
        milliseconds: of processor time for a round, prefill included; median of the calls since
            the last look.
    """

    rounds: int
    resident: int
    device: int
    tensors: int
    tensor_bytes: int
    passes: int
    milliseconds: float


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "soak",
        help="what grows over thousands of rounds",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rounds", type=int, default=10_000, metavar="N", help="of each kind (10000)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--seed", type=int, default=0, help="(0)")
    add("--out", type=Path, metavar="DIR", help="write a section of DIR/reliability.md")
    parser.set_defaults(run=run)


def soak(
    rounds: int,
    captured: bool,
    device: str = "cpu",
    seed: int = 0,
    each: Callable[[int], None] = lambda done: None,
    windows: int = WINDOWS,
) -> list[Look]:
    """Generate for so many rounds. `each` is told how many have gone by."""
    import std_decode
    from tests.decode.families import FAMILIES
    from tests.reliability.trials import BASE, Schedule, prompt_of

    torch.manual_seed(seed)
    model = FAMILIES["qwen2_vl"].build(1)[0].float().eval().to(device)
    draw = random.Random(seed)
    looks: list[Look] = []
    done, next_look, times, batch = 0, 0, [], 1
    with ExitStack() as stack:
        if device == "cpu" and captured:
            _stand_in(stack)
        patch = dict(draft_length=7, top_k_keys=6, cuda_graphs="auto" if captured else False)
        stack.enter_context(std_decode.patched(model, **patch))
        model._std_decode.policy = Schedule(seed, 7, looks_up=True)
        while done < rounds:
            if draw.random() < 0.1:  # seldom, so that a captured pass lives for a while
                batch = draw.randint(1, 3)
            rows = tuple(_row(draw) for _ in range(batch))
            inputs = prompt_of(replace(BASE, rows=rows), draw.randrange(2**31))
            model._std_decode.stats = None
            start = time.process_time()
            _call(model, {name: value.to(device) for name, value in inputs.items()}, draw)
            stats = std_decode.last_stats(model)
            if stats is None:
                continue  # broken off
            passed = stats.rounds + stats.calls["dense"]
            done += passed
            times.append((time.process_time() - start) / max(1, passed))
            each(min(done, rounds))
            if done >= min(next_look, rounds):
                looks.append(_look(model, done, 1e3 * median(times)))
                times.clear()
                next_look = done + rounds // windows
    return looks


def _row(draw: random.Random) -> tuple:
    return (
        ("text", draw.randint(1, 40)),
        ("video", draw.randint(1, 6), draw.randint(1, 3), draw.randint(1, 3)),
        ("text", draw.randint(1, 40)),
    )


def _call(model: Any, inputs: dict, draw: random.Random) -> None:
    from tests.reliability.trials import Listens, StoppingCriteriaList

    class Ends(Listens):
        def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
            if len(self.calls) == 9:
                raise KeyboardInterrupt
            return super().__call__(input_ids, scores, **more)

    options: dict[str, Any] = dict(max_new_tokens=draw.randint(8, 40), pad_token_id=0)
    options["do_sample"] = draw.random() < 0.5
    how = draw.random()
    if how < 0.1:
        options |= dict(return_dict_in_generate=True, output_scores=True)
    elif how < 0.15:
        options["stopping_criteria"] = StoppingCriteriaList([Ends()])
    try:
        model.generate(**inputs, **options)
    except KeyboardInterrupt:
        pass


def _stand_in(stack: ExitStack) -> None:
    from std_decode.passes import graphs, pool
    from tests.decode.recorder import Recording

    patched = mock.patch.object
    stack.enter_context(patched(graphs, "unavailable", lambda devices: None))
    stack.enter_context(patched(graphs, "capture", Recording()))
    stack.enter_context(patched(pool, "bucket", lambda tokens: tokens))


def _look(model: Any, rounds: int, milliseconds: float) -> Look:
    idle = model._std_decode.engines.idle
    passes = 0 if idle is None else max(len(idle.graphs.captured), len(idle.inputs))
    model._std_decode.engines.clear()  # its buffers are of the newest call's size
    del idle
    gc.collect()
    # Those of a test that compiled something have no memory.
    tensors = [
        x
        for x in gc.get_objects()
        if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)
    ]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    device = torch.cuda.memory_allocated(model.device) if model.device.type == "cuda" else 0
    return Look(
        rounds, resident(), device, len(tensors), sum(storages.values()), passes, milliseconds
    )


def resident() -> int:
    """Bytes of this process in memory; 0 where that cannot be told."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def quarters(looks: list[Look], name: str) -> tuple[float, float]:
    """Medians of the second and of the last quarter."""
    values = [getattr(look, name) for look in looks]
    quarter = max(1, len(values) // 4)
    return median(values[quarter : 2 * quarter] or values), median(values[-quarter:])


def grown(looks: list[Look]) -> list[str]:
    """What grew that must not, in words."""
    from std_decode.passes.graphs import MOST_GRAPHS

    found = []
    for name, allowed in (("resident", 24 << 20), ("device", 1 << 20), ("tensors", 4),
                          ("tensor_bytes", 256 << 10)):  # fmt: skip
        before, after = quarters(looks, name)
        if after - before > allowed:
            found.append(f"{name} grew from {before:,.0f} to {after:,.0f}")
    most = max(look.passes for look in looks)
    if most > MOST_GRAPHS + 1:
        found.append(f"{most} captured passes are kept, expected at most {MOST_GRAPHS}")
    return found


def run(options: argparse.Namespace) -> int:
    from rich.progress import Progress

    from bench.sections import about
    from tests.reliability import report
    from tests.reliability.lossless import quiet

    quiet()
    lines, wrong = [], []
    with Progress(disable=not sys.stderr.isatty()) as progress:
        for captured in (False, True):
            name = "captured" if captured else "as they are"
            task = progress.add_task(f"passes {name}", total=options.rounds)
            looks = soak(
                options.rounds, captured, options.device, options.seed,
                lambda done: progress.update(task, completed=done),
            )  # fmt: skip
            wrong += grown(looks)
            lines.append(_row_of(name, looks))
            print(*(asdict(look) for look in looks), sep="\n", file=sys.stderr)
    cuda = options.device.startswith("cuda")
    device = torch.cuda.get_device_name(options.device) if cuda else "CPU, 1 process"
    text = "\n".join([
        f"`python -m tests.reliability soak --rounds {options.rounds}` ({about()}; {device}). "
        "Medians of the second and the last quarter; the time per round is of the processor, "
        "prefill included.",
        "",
        "| passes | rounds | resident, MiB | on the device, MiB | live tensors | their MiB | "
        "captured passes at most | CPU ms a round |",
        "|---|---|---|---|---|---|---|---|",
        *lines,
        *(f"\n**{line}**" for line in wrong),
    ])  # fmt: skip
    print(text)
    report.write(options.out, "Soak", text)
    return int(bool(wrong))


def _row_of(name: str, looks: list[Look]) -> str:
    def two(field: str, unit: float, digits: int) -> str:
        return " -> ".join(f"{value / unit:,.{digits}f}" for value in quarters(looks, field))

    cells = [name, f"{looks[-1].rounds:,}", two("resident", 2**20, 1), two("device", 2**20, 1),
             two("tensors", 1, 0), two("tensor_bytes", 2**20, 2),
             str(max(look.passes for look in looks)), two("milliseconds", 1, 2)]  # fmt: skip
    return f"| {' | '.join(cells)} |"

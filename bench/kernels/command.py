"""Each op of std_kernels beside everything else that computes the same, right ones only."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.arguments import between, new_parser
from bench.kernels.points import (
    CPU_GRID,
    GPU_GRID,
    HYBRIDS,
    KNOWN_SHAPES,
    OPS,
    PRESETS,
    QUICK_CPU,
    QUICK_GPU,
    grid,
)

_HELP = f"""\
Times each op of std_kernels at the head shapes of real models, beside its rivals:

  verify_attention, and with scores   SDPA (flash, efficient, cuDNN; math on the CPU; as is),
                                      FlexAttention (compiled), flash-attn, flashinfer, xformers
  sparse_attention                    gather + SDPA, FlexAttention over a block mask, flashinfer
                                      over pages of one key
  select_topk                         torch.topk, and with the sort that our op does; flashinfer,
                                      and with our rule for ties
  score_keys                          the same in eager PyTorch
  int4_linear                         whole weights, PyTorch's 4-bit matmul (on a GPU), gemlite;
                                      and ours without the launch that adds the parts of K
  gated_delta_rule                    transformers' loop over the tokens, flash-linear-attention's
                                      fused recurrent kernel; of {HYBRIDS[0]} where no model that
                                      was asked for keeps states
  causal_conv1d                       PyTorch's convolution, causal-conv1d

Libraries are timed where they are installed; the table names those that are not. They read the
same tensors through views: planning, compiling and layouts are not in the times, copies would be.

RIGHT FIRST. Before anything is timed, our op is compared with std_kernels.reference in float64,
a head at a time, on the first, the middle and the last row of the batch (select_topk: exactly, on
every row). What is wrong is a row "wrong", is not timed, and makes the exit status 1. So are
rivals, with four times the tolerance; one that computes something else is named, not timed. SDPA
without a mask sees all keys from all T tokens, which is less work than the op's: only its last
token is compared.

HOW IT IS TIMED. "cold": median, 20th and 80th percentile. On a GPU the call is captured as a CUDA
graph, as decoding captures it, and the graph's replay is timed by events right before and after:
its start (a few us) is in the time, Python and clearing the L2 cache before each run are not.
What cannot be captured is launched from Python, and the note says so: small sizes then come out
slower than the GPU is. On the CPU 64 MiB of other memory are written before each run, and all of
a size take turns. "graph" (GPU): ten calls in one graph, so that small inputs come from the
cache; a tenth of what that takes. GB/s counts every input and output once, over the cold
median; "of copy" is its share of what a large copy reaches in the same run. "ours takes" is our
time over the rival's: above 1x we lose. Sizes that do not fit are listed, with the reason.

Writes into DIR as it goes: NAME.jsonl (the first record says where and with what; a record per
figure), NAME.md (a table), and at the end NAME.png (time against N, if matplotlib is there).
Exit status: 0, 1 if an op of ours was wrong or failed, 2 if it cannot run here."""
_EXAMPLES = """\
examples:
  python -m bench kernels --quick --out quick            under 3 minutes, also without a GPU
  python -m bench kernels --out results --resume         the whole grid; go on if interrupted
  python -m bench kernels --op sparse_attention --shape llama-3-8b --batch 8 --rival gather+sdpa
  python -m bench kernels --preset round --seconds 90    what bench gpu runs"""


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "kernels",
        "time each op beside its rivals, on a GPU or the CPU",
        _HELP,
        _EXAMPLES,
    )
    add = parser.add_argument
    count = between(int, 1, 2**31)
    add("--op", choices=OPS, nargs="+", default=list(OPS), metavar="OP",
        help=f"of {', '.join(OPS)} (default: all)")  # fmt: skip
    add("--shape", nargs="+", metavar="NAME",
        help="models whose heads to take: see bench/models/dimensions.py (default: a 7B and a 72B "
        "video LLM, Llama-3-8B, and a 7B with as many KV heads as query heads)")  # fmt: skip
    add("--batch", type=count, nargs="+", metavar="B", help="rows (default 1 8 32; CPU 1 8)")
    add("--context", type=count, nargs="+", metavar="N",
        help="keys in the cache (default 8192 32768 131072 524288; CPU 8192 32768)")  # fmt: skip
    add("--tokens", type=between(int, 1, 64), nargs="+", metavar="T",
        help="query tokens (default 1 4 10)")  # fmt: skip
    add("--top-k-keys", type=between(int, 1, 16384), nargs="+", metavar="K",
        help="selected keys (default 256 1024 4096)")  # fmt: skip
    add("--rival", nargs="+", metavar="R", help="only these, or none (default: all present)")
    add("--preset", choices=PRESETS, help="a named list of sizes instead of the grid")
    add("--quick", action="store_true", help="a small grid, for whatever is not given")
    add("--device", metavar="DEVICE", help="cuda or cpu (default: a GPU if there is one)")
    add("--dtype", choices=["bfloat16", "float16", "float32"],
        help="default: bfloat16 on a GPU, float32 on the CPU")  # fmt: skip
    add("--memory", type=between(float, 0.01, 2**31), metavar="GB",
        help="what a size may take (default: 0.9 of a GPU's free memory, "
        "0.6 of the CPU's)")  # fmt: skip
    add("--seconds", type=between(float, 0, 2**31), metavar="S",
        help="time box; what does not fit is listed as skipped (default: none)")  # fmt: skip
    add("--resume", action="store_true",
        help="keep what DIR has of the same commit, device and versions")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="where to write (default: only print)")
    add("--name", default="kernels", metavar="NAME", help="of the files (default kernels)")
    parser.set_defaults(run=run)


class _Refused(Exception):
    """Why nothing was run, in one line."""


def run(options: argparse.Namespace, clock: Callable[[], float] = time.monotonic) -> int:
    """The command; `clock` tells the seconds that the time box is of."""
    started = clock()
    try:
        if options.resume and options.out is None:
            raise _Refused("--resume goes on from files, expected --out DIR to find them in")
        for name in options.shape or ():
            if name not in KNOWN_SHAPES:
                raise _Refused(f"--shape is {name}, expected of {', '.join(KNOWN_SHAPES)}")
        return _run(options, clock, None if options.seconds is None else started + options.seconds)
    except _Refused as error:
        print(f"bench kernels: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, clock: Callable[[], float], deadline: float | None) -> int:
    import torch

    from bench.environment import environment
    from bench.kernels import libraries, ops, rivals, tables
    from bench.kernels.results import Results
    from bench.kernels.runner import Runner
    from std_decode.costs.memory import free_memory

    device = _device(options)
    kind = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    wanted = options.rival
    for name in wanted or ():
        if name not in (*rivals.NAMES, "none"):
            known = ", ".join(rivals.NAMES)
            raise _Refused(f"--rival is {name}, expected none or of {known}")
    share = 0.6 if device.type == "cpu" else 0.9
    limit = options.memory * 1e9 if options.memory else share * free_memory(device)
    about = environment(
        device,
        dtype=kind,
        absent=libraries.absent(),
        command=" ".join(sys.argv[1:]) if sys.argv[0].endswith("__main__.py") else None,
    )
    path = None if options.out is None else options.out / f"{options.name}.jsonl"
    results = Results(path, about, options.resume)
    inputs = ops.Inputs(device, getattr(torch, kind))
    with torch.inference_mode():
        Runner(inputs, results, limit, clock, deadline).run(list(_jobs(options, device)), wanted)
    tables.show(results, path)
    return 1 if results.wrong else 0


def _device(options: argparse.Namespace) -> Any:
    import torch

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cuda", "cpu"):
        raise _Refused(f"--device is {name}, expected cuda or cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise _Refused(f"--device is {name}, but torch finds no GPU on this machine; use cpu")
    return torch.device(name)


def _jobs(options: argparse.Namespace, device: Any) -> Any:
    if options.preset:
        return (job for job in PRESETS[options.preset]() if job.point.op in options.op)
    cpu = device.type == "cpu"
    sizes = (QUICK_CPU if cpu else QUICK_GPU) if options.quick else CPU_GRID if cpu else GPU_GRID
    given = dict(
        shapes=options.shape,
        batches=options.batch,
        contexts=options.context,
        tokens=options.tokens,
        keys=options.top_k_keys,
    )
    return grid(sizes._replace(**{k: v for k, v in given.items() if v}), options.op)

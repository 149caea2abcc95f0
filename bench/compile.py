"""Compiles every kernel that the launch table can launch, for GPUs that need not be there."""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from bench.assembly import WIDE, Report, _tool, inspect
from bench.compiled_by import differences, version
from std_decode.app.output import replace_file
from std_kernels import _tuning

RESULTS = Path(__file__).parent / "results" / "compile.md"
OTHERWISE = RESULTS.with_name("compile-newest.md")
# 120 fills no tile, and rows of it begin at multiples of 8 only
HEAD_DIMS = (64, 120, 128, 256, 512)
# How many of the bytes loaded in loops may come in pieces of less than 16, by part of the kernel's
# name. A row's lse and masks take some; a gather takes a 4-byte index or two for every 16-byte
# piece; a merge reads little. A tile in 2-byte loads is half of the bytes or all of them, and
# beside a gather's indices over 60%. rope_write has no loop: on gfx942 masked loads stand behind
# a jump back. A sample is of single keys. A state's loop is over tokens, whose rows a warp reads
# at once; most bytes come before it. Where 16 warps read a row again, a thread has 8 keys, and 8
# bytes of each mask of them.
# What a product is multiplied with is short: its weights are judged by `judge_product`.
MAX_NARROW = {
    **{"merge": 1.0, "rope": 1.0, "delta": 1.0, "sample": 1.0},
    **{"list": 0.4, "sparse": 0.6, "int4": 0.7, "": 0.25},
}
# Of the product with 4-bit weights: an H200 issues 3.7 instructions in the time that it takes to
# read a weight, and has to have 32 KiB on their way to an SM to read at full speed.
MOST_INSTRUCTIONS = 4.0  # for a weight, of the kernel without tensor cores
LEAST_IN_FLIGHT = 64 << 10  # bytes an SM
SM_REGISTERS = 65536
_HELP = """\
Compiles each kernel as the launch table would launch it, for sm_80, sm_90, sm_100, sm_120 and
gfx942. No GPU is needed. The exit status is 1 if a kernel

  spills registers,
  needs more shared memory than the target has,
  loads the keys, values or scores in pieces of less than 16 bytes,
  runs an fp16 or bf16 matrix product without tensor cores,
  has its wgmma instructions wait for one another, or
  verifies at head dim 128 on sm_90 and leaves no room for a second program on its SM,

or, of the product with 4-bit weights on NVIDIA GPUs, if it takes more than 4 instructions for a
weight (without tensor cores), reads the weights in anything but asynchronous loads of 16 bytes,
or has less than 64 KiB on their way to an SM.

float32 products run on plain multiply-adds by intent (tf32 would round their inputs), and are
only reported, as are spills and loads of the kernels that merge partial results.
"""


class Case(NamedTuple):
    """One kernel of one row, for one target."""

    target: str
    dtype: str
    row: _tuning.Row
    spec: int  # which of the row's


class Result(NamedTuple):
    case: Case
    kernel: str
    report: Report | None
    problems: tuple[str, ...]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "compile",
        help="compile every kernel for five GPU targets, without a GPU, and judge the result",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ops = sorted({row.op for row in _tuning.TABLE})
    parser.add_argument("--arch", choices=_tuning.TARGETS, action="append", help="only this one")
    parser.add_argument("--op", choices=ops, action="append", help="only this one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, default all")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"where to write; default {RESULTS.name}, or, with another Triton than wrote that, "
        f"{OTHERWISE.name}: what is otherwise",
    )
    parser.set_defaults(run=run)


def reachable_rows(target: str) -> Iterator[_tuning.Row]:
    """The rows that a launch on `target` finds, each once per head dim it is found for."""
    kinds = {(row.op, row.kernel, row.dtype): row.head_dim > 0 for row in _tuning.TABLE}
    for (op, kernel, dtype), has_head_dim in kinds.items():
        for head_dim in HEAD_DIMS if has_head_dim else (0,):
            rows = [
                row
                for name in (target, "default")
                for row in _tuning.TABLE
                if row[:4] == (op, kernel, name, dtype) and head_dim <= row.head_dim
            ]
            if rows:  # else the op takes no such head
                yield rows[0]._replace(head_dim=head_dim)


def cases(targets: list[str], ops: list[str]) -> Iterator[Case]:
    """Every different kernel that the rows launch."""
    for target in targets:
        # Rows share kernels: a merge does not depend on the tiles of what it merges.
        seen = set()
        for row in reachable_rows(target):
            if row.op not in ops:
                continue
            for dtype in row.dtypes:
                for index, spec in enumerate(specs_of(target, dtype, row)):
                    described = (spec.kernel.__name__, str(spec[1:]))
                    if described not in seen:
                        seen.add(described)
                        yield Case(target, dtype, row, index)


def specs_of(target: str, dtype: str, row: _tuning.Row) -> list[Any]:
    module = import_module(f"std_kernels._{row.op}_kernels")
    return module.aot_specs(target, dtype, row)


def compile_case(case: Case) -> Result:
    """Compiles one kernel and judges it."""
    spec = specs_of(case.target, case.dtype, case.row)[case.spec]
    name = spec.kernel.__name__.strip("_").removesuffix("_kernel").removeprefix(f"{case.row.op}_")
    try:
        compiled = compile_spec(spec, case.target)
        found = inspect(compiled)
    except Exception as error:  # a compiler's errors have no common base
        return Result(case, name, None, (f"does not compile: {_last_line(error)}",))
    limit = _tuning.TARGETS[case.target].shared_memory
    # A float32 product is unrolled into multiply-adds and never runs where speed counts.
    checked = case.dtype != "fp32" or found.dots == 0
    kernel = f"{case.row.op} {name}"
    narrow = next(share for part, share in MAX_NARROW.items() if part in kernel)
    problems = list(judge(found, limit, checked, narrow))
    if case.row.op == "int4_linear" and "merge" not in name and case.target.startswith("sm_"):
        problems += judge_product(found, case.row, limit)
    if case.target == "sm_90" and name == "verify_split" and spec.constexprs["D"] <= 128:
        problems += [] if two_fit(found.shared) else [f"{found.shared} bytes: one program an SM"]
    if found.matrix == "HGMMA" and serialized(sass_of(compiled)):
        problems.append("ptxas serialized its wgmma instructions")
    return Result(case, name, found, tuple(problems))


def _last_line(error: Exception) -> str:
    # Triton quotes the source first, and says what is wrong with it last.
    return (str(error).strip() or repr(error)).splitlines()[-1][:200]


def compile_spec(spec: Any, target: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, warp_size, _ = _tuning.TARGETS[target]
    source = ASTSource(spec.kernel, spec.signature, spec.constexprs, spec.attrs)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, **spec.options}
    return triton.compile(source, target=GPUTarget(backend, arch, warp_size), options=options)


def sass_of(compiled: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return _tool("nvdisasm", "-c", file.name)


def two_fit(shared: int) -> bool:
    """Whether an SM of an H100 has shared memory for two programs, 1 KiB more each for CUDA."""
    return 2 * (shared + 1024) <= 233472


def serialized(sass: str) -> bool:
    """Whether each wgmma waits for the one before: ptxas's C7515, which Triton does not show."""
    products, waits = sass.count("HGMMA"), sass.count("WARPGROUP.DEPBAR")
    return products > 2 and waits >= products


def judge(report: Report, shared_limit: int, checked: bool, max_narrow: float) -> Iterator[str]:
    """What is wrong with a kernel; shared memory alone if it is not `checked` for speed."""
    if report.shared > shared_limit:
        yield f"{report.shared} bytes of shared memory, the limit is {shared_limit}"
    if not checked:
        return
    if report.spills:
        yield f"{report.spills} spills"
    if report.narrow_share > max_narrow:
        yield f"{report.narrow_share:.0%} of the bytes in loops in loads under 16 bytes"
    if report.dots and (report.scalar_dots or not report.matrix):
        yield "a matrix product without tensor cores"


def judge_product(report: Report, row: _tuning.Row, shared_limit: int) -> Iterator[str]:
    """What would keep a product with 4-bit weights from the bandwidth of an NVIDIA GPU."""
    columns, threads = row.config().split, 32 * row.num_warps
    weights = row.block_n * columns
    each = report.loop_instructions * threads / weights
    if not report.dots and each > MOST_INSTRUCTIONS:
        yield f"{each:.2f} instructions for a weight"
    if report.async_loads.get(WIDE, 0) < weights // 2 // threads:
        yield "weights in other than asynchronous loads of 16 bytes"
    # An SM has as much shared memory as a program may take, and the 1 KiB that each program costs.
    by_registers = SM_REGISTERS // (-(-report.registers // 8) * 8 * threads)
    programs = min(by_registers, (shared_limit + 1024) // (report.shared + 1024))
    tile = weights // 2 + 2 * row.block_m * columns
    flying = programs * (row.num_stages - 1) * tile
    if flying < LEAST_IN_FLIGHT:
        yield f"{flying >> 10} KiB on their way to an SM, by {programs} programs"


def run(options: argparse.Namespace) -> int:
    targets = options.arch or list(_tuning.TARGETS)
    ops = options.op or sorted({row.op for row in _tuning.TABLE})
    results = compile_all(list(cases(targets, ops)), options.jobs)
    # A part must not replace the whole.
    whole = not (options.arch or options.op)
    return report(results, options.out or (_default() if whole else None))


def _default() -> Path:
    import triton

    same = version(RESULTS.read_text()) == triton.__version__
    return RESULTS if same else OTHERWISE


def _page(results: list[Result], out: Path) -> str:
    new = _markdown(results)
    return differences(RESULTS.read_text(), new) if out == OTHERWISE else new


def compile_all(todo: list[Case], jobs: int | None) -> list[Result]:
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    results: dict[Case, Result] = {}
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with ProcessPoolExecutor(jobs) as pool, Progress(*columns) as progress:
        task = progress.add_task("compiling", total=len(todo))
        for future in as_completed([pool.submit(compile_case, case) for case in todo]):
            result = future.result()
            case = result.case
            results[case] = result
            progress.update(task, advance=1, description=f"{case.target} {case.row.op}")
    return [results[case] for case in todo]


def report(results: list[Result], out: Path | None) -> int:
    """Prints the table, writes it to `out` and returns the exit status."""
    from rich.console import Console

    # As wide as the table: wrapped cells cannot be read.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(_table(results))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, _page(results, out).encode())
        console.print(f"written to {out}")
    bad = [result for result in results if result.problems]
    for result in bad:
        console.print(f"{' '.join(_cells(result)[:5])}: {'; '.join(result.problems)}", style="red")
    console.print(f"{len(results)} kernels, {len(bad)} with problems")
    return 1 if bad else 0


_HEADER = (
    "target",
    "op",
    "kernel",
    "dtype",
    "D",
    "tile",
    "warps, stages",
    "registers",
    "spills",
    "shared",
    "loop loads",
    "matrix",
    "verdict",
)


def _cells(result: Result) -> list[str]:
    target, dtype, row = result.case[:3]
    tile = f"{row.block_m}x{row.block_n}"
    launch = f"{row.num_warps}, {row.num_stages}"
    head = [target, row.op, result.kernel, dtype, str(row.head_dim or "-"), tile, launch]
    report = result.report
    if report is None:
        return [*head, "-", "-", "-", "-", "-", "fails"]
    loads = sorted(report.loop_loads, reverse=True)
    widths = " + ".join(f"{width} B" for width in loads) or "-"
    if 0 < report.narrow_share < 1:
        widths += f" ({report.narrow_share:.0%} narrow)"
    matrix = "FMA" if report.dots and report.scalar_dots == report.dots else report.matrix or "-"
    numbers = [str(report.registers), str(report.spills), f"{report.shared / 1024:.0f} K"]
    return [*head, *numbers, widths, matrix, "fails" if result.problems else "ok"]


def _table(results: list[Result]) -> Any:
    from rich.table import Table

    table = Table(*_HEADER)
    for result in results:
        table.add_row(*_cells(result), style="red" if result.problems else None)
    return table


def _markdown(results: list[Result]) -> str:
    import triton

    lines = [
        "# Kernels compiled ahead of time",
        "",
        "Written by `python -m bench compile`; no GPU took part. Registers, shared memory and",
        "instructions are the compiler's output, not estimates, and say nothing about time.",
        "A kernel that appears twice with the same tile is compiled with and without an option",
        "(a softcap, scores, masks) or for several passes. Float32 products use plain FMA.",
        "",
        f"triton {triton.__version__}, {len(results)} kernels,"
        f" {sum(bool(result.problems) for result in results)} with problems.",
    ]
    for target in dict.fromkeys(result.case.target for result in results):
        lines += ["", f"## {target}", "", "| " + " | ".join(_HEADER[1:]) + " |"]
        lines.append("|" + "---|" * (len(_HEADER) - 1))
        for result in results:
            if result.case.target == target:
                lines.append("| " + " | ".join(_cells(result)[1:]) + " |")
    return "\n".join(lines) + "\n"

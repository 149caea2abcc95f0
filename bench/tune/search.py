"""Which launch configuration of a kernel is the fastest: candidates, search, the row to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import product
from typing import Any, NamedTuple

from bench.kernels.points import Point
from std_kernels import _tuning
from std_kernels._tuning import ANY, FLOAT, HALF, Row

# Read and written once at the pace of memory, whatever the tile; of int4_linear no sizes are known
# here yet. Their rows are estimates.
NOT_SEARCHED = {
    *("add_rms_norm", "rope_write", "silu_mul", "causal_conv1d", "gated_delta_rule"),
    "int4_linear",
}
# A tile: block_m, block_n, num_warps, num_stages.
Tile = tuple[int, int, int, int]
KEPT = 6  # tiles that are timed at every size, of those that were timed at the first
# Timings of one kernel differ by about 1% from run to run: less is no reason to change a row.
LEAST_GAIN = 1.02


class Subject(NamedTuple):
    """One kernel at one precision and head dim.

    Attributes:
        ladder: what the split length depends on: pairs of the largest capacity and the sizes to
            time for it, ascending, the last one ANY. The first size of the last pair is where
            tiles are compared first.
        tiles: values of block_m, block_n, num_warps and num_stages.
        splits: split lengths to try; none where the kernel has no choice.
    """

    op: str
    kernel: str
    dtype: str  # HALF or FLOAT
    head_dim: int
    ladder: tuple[tuple[int, tuple[Point, ...]], ...]
    tiles: tuple[Sequence[int], ...]
    splits: Sequence[int] = ()

    @property
    def name(self) -> str:
        dim = f", head dim {self.head_dim}" if self.head_dim else ""
        return f"{self.op}, {self.kernel}, {self.dtype}{dim}"

    @property
    def points(self) -> list[Point]:
        """Every size, the one that tiles are compared at first."""
        return [point for _, points in reversed(self.ladder) for point in points]


_HALF_TILES = (16, 32, 64, 128), (16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4)
_FLOAT_TILES = (16, 32), (16, 32, 64), (4, 8), (1, 2)
_MODELS = {64: "llama-3.2-1b", 128: "qwen2-vl-7b", 256: "gemma-2-9b"}


def subjects(head_dim: int, precision: str) -> list[Subject]:
    """Every kernel of the launch table, at the sizes that a model of this head dim has."""
    tiles = _HALF_TILES if precision == HALF else _FLOAT_TILES
    model = _MODELS[head_dim]

    def verify(*sizes: tuple[int, int]) -> tuple[Point, ...]:
        return tuple(Point("verify_attention", model, B, N, T) for B, N in sizes for T in (5, 1))

    def sparse(T: int, *batches: int) -> tuple[Point, ...]:
        return tuple(
            Point("sparse_attention", model, B, 32768, T, K) for B in batches for K in (1024, 3072)
        )

    def score(*contexts: int) -> tuple[Point, ...]:
        return tuple(Point("score_keys", model, 1, N) for N in contexts)

    def select(*contexts: int, keys: int = 1024) -> tuple[Point, ...]:
        return tuple(
            Point("select_topk", model, B, N, keys=keys) for N in contexts for B in (1, 8)
        )

    blocks = (1,), (2048, 4096, 8192, 16384), (4, 8, 16), (1,)
    rows = dict(zip((16, 48, ANY), ((1, 4), (8,), (32,))))  # batches, by B * Hkv of 4 KV heads
    if head_dim != 128:
        rows = dict(zip((16, 48, ANY), ((1, 2), (4,), (16,))))  # of 8 KV heads
    heads = 4 if head_dim == 128 else 8
    lengths = [(x, verify((1, x // heads))) for x in (65536, 131072, 262144)]  # by B * Hkv * N
    lengths.append((1 << 20, verify((1, 131072), (32 // heads, 25088))))
    lengths.append((ANY, verify((128 // heads, 25088), (32 // heads, 131072))))
    few = tuple((limit, sparse(1, *batches)) for limit, batches in rows.items())
    many = tuple((limit, sparse(10, *batches)) for limit, batches in rows.items())
    found = [
        Subject("verify_attention", "split", precision, head_dim,
                tuple(lengths), tiles, (256, 512, 768, 1024, 2048, 4096, 8192)),
        Subject("sparse_attention", "few rows", precision, head_dim, few,
                ((16,), *tiles[1:]), (16, 32, 64, 128, 256)),
        Subject("sparse_attention", "many rows", precision, head_dim, many, tiles,
                (16, 32, 64, 128, 256)),
        Subject("score_keys", "lse", precision, head_dim,
                ((16384, score(16384)), (65536, score(65536)), (ANY, score(131072))), tiles,
                (256, 512, 1024, 2048, 4096)),
        Subject("score_keys", "column", precision, head_dim, ((ANY, score(131072, 32768)),),
                tiles),
    ]  # fmt: skip
    if head_dim == 128:  # scores have no head dim and are float32
        found += [
            Subject("select_topk", "sample", FLOAT, 0,
                    ((1 << 16, select(25088)), (1 << 18, select(131072)),
                     (ANY, select(1 << 20)[:1])), ((1,), (1,), *blocks[2:]),
                    (1024, 2048, 4096, 8192)),
            Subject("select_topk", "filter", FLOAT, 0, ((ANY, select(131072, 25088)),), blocks),
            Subject("select_topk", "few", FLOAT, 0, ((ANY, select(25088, 4096)),),
                    ((1,), (4096,), *blocks[2:])),
            Subject("select_topk", "many", FLOAT, 0, ((ANY, select(25088, 8192, keys=4096)),),
                    ((1,), (4096,), *blocks[2:])),
        ]  # fmt: skip
    return found


def present_row(subject: Subject, arch: str) -> Row:
    """The row that a launch finds now, as a row of this architecture and head dim."""
    key = subject.op, subject.kernel, subject.dtype
    for name in (arch, "default"):
        for row in _tuning.TABLE:
            if (row.op, row.kernel, row.dtype) == key and row.arch == name:
                if subject.head_dim > row.head_dim:
                    continue
                row = row._replace(arch=arch, head_dim=subject.head_dim)
                if subject.splits:  # by the limits that are searched
                    limits = [limit for limit, _ in subject.ladder]
                    row = row._replace(splits=tuple((x, row.config(x).split) for x in limits))
                return row
    raise LookupError(f"no row for {subject.name} on {arch}")


def tile_of(row: Row) -> Tile:
    return row.block_m, row.block_n, row.num_warps, row.num_stages


def with_tile(row: Row, tile: Tile) -> Row:
    """A row with another tile; splits are whole tiles, so that no two programs read a key."""
    block_m, block_n, num_warps, num_stages = tile
    splits = tuple((limit, -(-split // block_n) * block_n) for limit, split in row.splits)
    if row.op == "score_keys" and row.kernel == "column":
        splits = ((ANY, block_n),)  # a program is one tile of keys
    return row._replace(
        block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages, splits=splits
    )


def tiles(subject: Subject, row: Row) -> list[Tile]:
    """Every tile to try, the present one first."""
    every: list[Any] = list(product(*subject.tiles))
    return [tile_of(row), *(tile for tile in every if tile != tile_of(row))]


def with_split(row: Row, limit: int, split: int) -> Row:
    splits = tuple((top, split if top == limit else length) for top, length in row.splits)
    return row._replace(splits=splits)


@contextmanager
def launched_with(row: Row) -> Iterator[None]:
    """Have the kernel that a row is for launched with it, and no other."""
    table = _tuning.TABLE
    _forget()
    _tuning.TABLE = (row, *table)
    try:
        yield
    finally:
        _tuning.TABLE = table
        _forget()


def _forget() -> None:
    """Launchers keep what follows from the table for each shape."""
    _tuning.config.cache_clear()
    for op in {row.op for row in _tuning.TABLE}:
        plan = getattr(import_module(f"std_kernels._{op}_kernels"), "_plan", None)
        if plan is not None:
            plan.cache_clear()


class Choice(NamedTuple):
    """The fastest row found, and how much faster than the present one, over all sizes."""

    row: Row
    gain: float
    timed: int


Timer = Callable[[Row, Point], float]  # milliseconds; infinity for a row that is not right
Judge = Callable[[Sequence[Row]], list[Row]]  # those that compile well


def search(subject: Subject, present: Row, judge: Judge, timer: Timer) -> Choice:
    """Tiles at the first size, the best of them at every size, then its splits, one by one."""
    points, timed = subject.points, 0

    def time(row: Row, point: Point) -> float:
        nonlocal timed
        timed += 1
        return timer(row, point)

    rows = [with_tile(present, tile) for tile in tiles(subject, present)]
    rows[0] = present
    kept = {present, *judge(rows[1:])}
    first = {row: time(row, points[0]) for row in rows if row in kept}
    best = sorted((ms, index) for index, ms in enumerate(first.values()) if ms < math.inf)
    chosen = [list(first)[index] for _, index in best[:KEPT]]
    if present not in chosen:
        chosen.append(present)
    times = {row: [first[row], *(time(row, point) for point in points[1:])] for row in chosen}
    row = min(chosen, key=lambda row: _ratio(times[row], times[present]))
    for limit, sizes in subject.ladder if subject.splits else ():
        tried = {}
        for split in subject.splits:
            if split % row.block_n == 0 and row.config(min(limit, ANY)).split != split:
                other = with_split(row, limit, split)
                if judge([other]):
                    tried[other] = [time(other, point) for point in sizes]
        now = [time(row, point) for point in sizes]
        better = min(tried, key=lambda other: _ratio(tried[other], now), default=row)
        if better is not row and _ratio(tried[better], now) * LEAST_GAIN < 1:
            row = better
    if row == present:
        return Choice(present, 1.0, timed)
    ratio = _ratio([time(row, p) for p in points], [time(present, p) for p in points])
    gain = 1 / ratio if ratio else math.inf  # the present row is not right
    return Choice(row, gain, timed) if gain >= LEAST_GAIN else Choice(present, 1.0, timed)


def _ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Geometric mean of times over others; infinity if one is not right."""
    if math.inf in times:
        return math.inf
    if math.inf in others:
        return 0.0
    return math.exp(sum(math.log(a / b) for a, b in zip(times, others)) / len(times))


_NAMES = {HALF: "HALF", FLOAT: "FLOAT"}


def source_line(row: Row) -> str:
    """The row as it stands in std_kernels/_tuning.py."""
    limits = ", ".join(
        f"({'ANY' if limit == ANY else limit}, {split})" for limit, split in row.splits
    )
    splits = f"({limits},)" if len(row.splits) == 1 else f"({limits})"
    kernel = "" if row.op == "verify_attention" else f'"{row.kernel}", '
    numbers = f"{row.head_dim}, {row.block_m}, {row.block_n}, {row.num_warps}, {row.num_stages}"
    head = f'({kernel}"{row.arch}", {_NAMES[row.dtype]}, {numbers}, {splits},'
    return f'    {head}\n     "{row.source}"),'


def describe(row: Row) -> dict[str, Any]:
    """A row as a record has it."""
    return {"tile": list(tile_of(row)), "splits": [list(pair) for pair in row.splits]}

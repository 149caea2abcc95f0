"""The search for launch configurations, with made-up times; compilers are real, GPUs are not."""

import json
import math

import pytest
import torch

pytest.importorskip("triton")
from bench.__main__ import main  # noqa: E402
from bench.kernels.results import Results  # noqa: E402
from bench.tune import command as tune  # noqa: E402
from bench.tune import search  # noqa: E402
from bench.tune.search import ANY, FLOAT, HALF, Row  # noqa: E402
from std_kernels import _tuning  # noqa: E402

ABOUT = {"kind": "environment", "gpu": "NVIDIA X", "triton": "3.7.1"}


def subject_of(op, kernel, dim=128):
    return next(s for s in search.subjects(dim, HALF) if (s.op, s.kernel) == (op, kernel))


def sweep(subject, time, present=None, judge=list):
    present = present or search.present_row(subject, "sm_90")
    calls = []

    def timer(row, point):
        calls.append((row, point))
        return time(row, point)

    return search.search(subject, present, judge, timer), present, calls


def test_finds_the_best_tile_and_a_split_for_each_number_of_keys():
    subject = subject_of("verify_attention", "split")
    splits = ((65536, 512), (131072, 1024), (262144, 768), (1 << 20, 4096), (ANY, 256))
    wanted = search.present_row(subject, "sm_90")._replace(splits=splits)

    def time(row, point):
        tile = sum(abs(math.log2(a / b)) for a, b in zip(search.tile_of(row), (32, 64, 8, 2)))
        keys = 4 * point.batch * point.context
        split = abs(math.log2(row.config(keys).split / wanted.config(keys).split))
        return point.batch * (1 + 0.1 * tile + 0.1 * split)

    choice, present, calls = sweep(subject, time)
    assert search.tile_of(choice.row) == (32, 64, 8, 2)
    assert choice.row.splits == splits and choice.timed == len(calls)
    points = subject.points
    ratio = [time(present, p) / time(choice.row, p) for p in points]
    assert choice.gain == pytest.approx(math.prod(ratio) ** (1 / len(points)))
    # All tiles at one size only, a few at every size.
    assert len([1 for _, p in calls if p == points[0]]) >= len(search.tiles(subject, present))
    assert len({search.tile_of(row) for row, p in calls if p == points[1]}) <= search.KEPT + 1


def test_what_is_fast_at_the_first_size_only_is_not_taken():
    subject = subject_of("verify_attention", "split")
    tempting, steady = (16, 16, 2, 1), (32, 16, 2, 1)

    def time(row, point):
        if search.tile_of(row) == tempting:
            return 0.5 if point == subject.points[0] else 3.0
        return better if search.tile_of(row) == steady else 1.0

    better = 1.0
    choice, present, _ = sweep(subject, time)
    assert choice.row == present and choice.gain == 1
    better = 0.8
    choice, present, _ = sweep(subject, time)
    assert search.tile_of(choice.row) == steady and choice.gain == pytest.approx(1.25)


@pytest.mark.parametrize("gain, kept", [(1.019, True), (1.021, False)])
def test_a_gain_within_the_noise_is_none(gain, kept):
    subject = subject_of("score_keys", "column")
    tile = (64, 32, 4, 1)

    choice, present, _ = sweep(
        subject, lambda row, point: 1 / gain if search.tile_of(row) == tile else 1.0
    )
    assert (choice.row == present) == kept
    # Its splits are its tiles of keys.
    assert kept or choice.row.splits == ((ANY, 32),)


def test_what_is_not_right_or_does_not_compile_is_never_taken():
    subject = subject_of("sparse_attention", "few rows")
    wrong, spilling = (16, 16, 2, 1), (16, 16, 2, 2)
    judged = []

    def judge(rows):
        judged.extend(rows)
        return [row for row in rows if search.tile_of(row) != spilling]

    def time(row, point):
        tile = search.tile_of(row)
        assert tile != spilling
        return math.inf if tile == wrong else 0.5 if tile == (16, 32, 4, 1) else 1.0

    choice, _, _ = sweep(subject, time, judge=judge)
    assert search.tile_of(choice.row) == (16, 32, 4, 1) and choice.gain == pytest.approx(2)
    assert any(search.tile_of(row) == spilling for row in judged)
    # A present row that is wrong is replaced by any that is right.
    present = search.present_row(subject, "sm_90")
    choice, _, _ = sweep(subject, lambda row, p: math.inf if row == present else 1.0)
    assert choice.row != present and choice.gain == math.inf
    said, line = tune.report(choice, present, ABOUT)
    assert "is not right" in said and "the row before is not right" in line


def test_splits_are_whole_tiles():
    for subject in search.subjects(128, HALF) + search.subjects(64, FLOAT):
        seen = []
        choice, *_ = sweep(subject, lambda row, p: seen.append(row) or 1.0)
        assert choice.gain == 1
        for row in seen:
            assert all(split % row.block_n == 0 for _, split in row.splits)
        assert len({point for point in subject.points}) == len(subject.points)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [HALF, FLOAT])
@pytest.mark.parametrize("arch", [*_tuning.TARGETS, "default"])
def test_the_printed_row_stands_in_the_table_as_it_is(dim, dtype, arch, monkeypatch):
    for subject in search.subjects(dim, dtype):
        row = search.present_row(subject, arch)._replace(source="measured")
        (printed,) = eval(
            f"[{search.source_line(row)}]", {"HALF": HALF, "FLOAT": FLOAT, "ANY": ANY}
        )
        name = (row.op, row.kernel) if row.op == "verify_attention" else (row.op,)
        assert Row(*name, *printed) == row
        # And is what a launch finds, at every size of its subject.
        sizes = [limit for limit, _ in subject.ladder]
        before = [_tuning.config(*row[:2], arch, row.dtype, row.head_dim, size) for size in sizes]
        assert before == [row.config(size) for size in sizes]


def test_every_kernel_of_the_table_is_a_subject():
    named = {(s.op, s.kernel) for s in search.subjects(128, HALF)}
    others = {row.op for row in _tuning.TABLE} - {op for op, _ in named}
    assert others == search.NOT_SEARCHED
    assert named == {(row.op, row.kernel) for row in _tuning.TABLE if row.op not in others}


def test_the_table_is_as_it_was_afterwards():
    from std_kernels import _verify_attention_kernels as kernels

    def plan():
        sizes = 1, 8, 2, 1, 128, 4096
        return kernels._plan(torch.device("cpu"), torch.float32, *sizes, None, False)

    table, before = _tuning.TABLE, plan()
    row = next(r for r in table if r.arch == "interpreter" and r.op == "verify_attention")
    row = row._replace(dtype=FLOAT, splits=((ANY, 512),))
    with pytest.raises(KeyError), search.launched_with(row):
        assert plan()[0] == (1, 8, 2) and before[0] != plan()[0]
        raise KeyError
    assert _tuning.TABLE is table and plan() == before


class Case:
    promise = None

    def __init__(self, excess=0.5):
        self.excess = excess

    def check(self):
        if isinstance(self.excess, Exception):
            raise self.excess
        return self.excess


class Inputs:
    def __init__(self, case):
        self.made = case

    def case(self, point):
        return self.made


def lab(case, path=None, resume=False, late=lambda: False, timer=lambda row, point: 2.0):
    results = Results(path, ABOUT, resume, kept=lambda record: True)
    return tune.Lab(Inputs(case), results, late, timer)


def test_only_what_is_right_is_timed():
    subject = subject_of("verify_attention", "split")
    row, point = search.present_row(subject, "sm_90"), subject.points[0]
    broken = Case()
    broken.promise = lambda: False
    for case, status in (
        (Case(1.5), "wrong: error 1.5 times what is allowed"),
        (Case(math.nan), "wrong: error nan times what is allowed"),
        (broken, "wrong: a token's bits depend on T"),
        (Case(RuntimeError("out of resource: shared memory\nRequired")),
         "failed: RuntimeError: out of resource: shared memory"),
    ):  # fmt: skip
        bench = lab(case, timer=lambda row, point: pytest.fail("timed"))
        bench.begin(subject)
        assert bench.time(row, point) == math.inf
        assert [record["status"] for record in bench.results.rows] == [status]
        assert bench.bad_present(row) == [status]
    bench = lab(Case())
    bench.begin(subject)
    assert bench.time(row, point) == 2.0 and not bench.bad_present(row)


@pytest.fixture
def small(monkeypatch):
    """Few tiles and nothing to compile."""
    subject = subject_of("verify_attention", "split")
    subject = subject._replace(tiles=((32, 64), (32,), (4,), (2, 3)), splits=(256, 512))
    monkeypatch.setattr(tune.Lab, "compiling_well", lambda self, rows: list(rows))
    return subject


def test_goes_on_after_the_time_box(small, tmp_path, capsys):
    path, timed = tmp_path / "tune.jsonl", []

    def timer(row, point):
        timed.append(row)
        return 1.0 if row.block_m == 32 else 2.0

    first = lab(Case(), path, late=lambda: len(timed) >= 5, timer=timer)
    assert tune.tune([small], first, "sm_90") == 1
    assert len(timed) == 5 and "out of time" in capsys.readouterr().out
    assert tune.tune([small], lab(Case(), path, True, timer=timer), "sm_90") == 0
    printed = capsys.readouterr().out
    assert "verify_attention, split, half: 2.00x the speed of the present row" in printed
    assert '("sm_90", HALF, 128, 32, 32, 4, 2, ((65536, 256), ' in printed
    assert "measured on NVIDIA X, Triton 3.7.1: 2.00x the speed of the row before" in printed
    count = len(timed)
    about, *found = map(json.loads, path.read_text().splitlines())
    assert about == ABOUT and len(found) == count  # none was timed twice
    assert tune.tune([small], lab(Case(), path, True, timer=timer), "sm_90") == 0
    assert len(timed) == count


def test_a_present_row_that_is_wrong_is_said(small, capsys):
    assert tune.tune([small], lab(Case(7.0)), "sm_90") == 1
    printed = capsys.readouterr().out
    assert "keep the present row" in printed
    assert "the present row is wrong: error 7 times" in printed


@pytest.mark.aot
def test_what_spills_or_takes_too_much_is_dropped_untimed():
    """By the compiler itself, for a GPU that is not here."""
    subject = subject_of("score_keys", "column")
    bench = lab(Case())
    bench.begin(subject)
    present = search.present_row(subject, "sm_90")
    large = search.with_tile(present, (64, 64, 1, 2))
    assert bench.compiling_well([present, large]) == [present]
    good, bad = bench.results.rows
    assert good["status"] == "ok" and bad["status"].startswith("dropped: ")
    assert "spills" in bad["status"]


def test_without_a_gpu(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["tune", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "finds no GPU" in error
    assert not (tmp_path / "out").exists()

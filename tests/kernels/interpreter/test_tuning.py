"""`bench tune` on interpreted kernels: other configurations take effect, wrong ones are found."""

import math

import pytest
import torch

from bench.kernels.ops import Inputs
from bench.kernels.points import Point
from bench.kernels.results import Results
from bench.tune import command as tune
from bench.tune import search as tune_search
from bench.tune.search import ANY, FLOAT, HALF, Subject

POINTS = {
    "verify_attention": Point("verify_attention", "tiny", 1, 100, 3),
    "sparse_attention": Point("sparse_attention", "tiny", 1, 110, 1, 40),
    "score_keys": Point("score_keys", "tiny", 1, 70),
    "select_topk": Point("select_topk", "tiny", 1, 150, keys=20),
}
SUBJECTS = {
    "verify": Subject("verify_attention", "split", HALF, 16, (), ()),
    "sparse": Subject("sparse_attention", "few rows", HALF, 16, (), ()),
    "lse": Subject("score_keys", "lse", HALF, 16, (), ()),
    "column": Subject("score_keys", "column", HALF, 16, (), ()),
    "filter": Subject("select_topk", "filter", FLOAT, 0, (), ()),
    "few": Subject("select_topk", "few", FLOAT, 0, (), ()),
}


def lab_for(subject, timer=lambda row, point: 1.0):
    about = {"kind": "environment", "cpu": "interpreter", "triton": None}
    inputs = Inputs(torch.device("cpu"), torch.bfloat16)
    found = tune.Lab(inputs, Results(None, about), lambda: False, timer)
    found.begin(subject)
    return found


@pytest.mark.parametrize("name", SUBJECTS)
def test_other_configurations_are_right_too(name):
    subject = SUBJECTS[name]
    lab, point = lab_for(subject), POINTS[subject.op]
    row = tune_search.present_row(subject, "interpreter")
    others = [tune_search.with_tile(row, (16, 32, 2, 2))]
    others.append(others[0]._replace(splits=tuple((x, 2 * y) for x, y in others[0].splits)))
    for other in others[-1:] if name == "column" else others:
        assert lab.time(other, point) == 1.0, lab.results.rows[-1]["status"]


def test_one_that_reads_keys_twice_is_found():
    """A split that is no whole number of tiles; that rows are launched at all shows in it."""
    subject = SUBJECTS["verify"]
    lab = lab_for(subject, timer=lambda row, point: pytest.fail("timed"))
    row = tune_search.present_row(subject, "interpreter")
    bad = row._replace(block_n=32, splits=((ANY, 48),))
    assert lab.time(bad, POINTS["verify_attention"]) == math.inf
    assert lab.results.rows[-1]["status"].startswith("wrong: error")


def test_a_sweep():
    point = POINTS["sparse_attention"]
    ladder = ((2, (point,)), (ANY, (point._replace(batch=2),)))
    subject = Subject("sparse_attention", "few rows", HALF, 16, ladder,
                      ((16,), (16, 32), (1,), (1,)), (32, 64))  # fmt: skip
    times = {(32, 32): 1.0, (32, 64): 0.5}

    def timer(row, point):
        return times.get((row.block_n, row.config(2 * point.batch).split), 2.0)

    present = tune_search.present_row(subject, "interpreter")
    lab = lab_for(subject, timer)
    choice = tune_search.search(subject, present, lab.compiling_well, lab.time)
    assert choice.row.splits == ((2, 64), (ANY, 64)) and choice.row.block_n == 32
    assert choice.gain == pytest.approx(4)
    assert {record["status"] for record in lab.results.rows} == {"ok"}

"""`bench offload`, with a tiny model of random weights in the pretrained one's place."""

import pytest
import torch

from bench import offload, records
from bench.__main__ import main
from bench.models import pretrained
from bench.report.offload import tables
from tests.bench.test_real import load


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """``bench(*arguments)``: exit status, and the records, the environment first."""
    monkeypatch.setattr(pretrained, "installed", lambda: True)
    monkeypatch.setattr(pretrained, "load", load)

    def call(*arguments):
        few = ["--new", "12", "--prompt", "40", "--out", str(tmp_path)]
        status = main(["offload", *few, *arguments])
        (path,) = tmp_path.glob("offload-*.jsonl")
        return status, records.read(path)

    return call


def test_both_sides_over_links_of_every_kind(bench, capsys):
    status, (about, patch, *speeds) = bench("--links", "1", "disk", "--turns", "1")
    assert status == 0
    found = [(record["link"], record["sampled"]) for record in speeds]
    assert found == [(1.0, False), (1.0, True), ("disk", False), ("disk", True)]
    for record in speeds:
        assert record["status"] == "ok" and record["same"] and len(record["turns"]) == 1
        for turn in record["turns"]:
            # A pass for each token; prompt, dense steps and verifications. Drafts read nothing.
            calls, size = turn["calls"], patch["gb_dense_pass"]
            passes = calls["prefill"] + calls["dense"] + calls["verify"]
            assert turn["gb_read"]["unpatched"] == pytest.approx(12 * size)
            assert turn["gb_read"]["patched"] == pytest.approx(passes * size)
            assert turn["fallback"] is None
    assert patch["gb_kept"] < patch["gb_dense_pass"] < patch["gb_read"]
    told = "\n".join(tables(about, speeds + [patch]))
    assert "1.0 GB/s, a stand-in" in told and "BUG" not in told and told.count("| yes |") == 4
    assert "a stand-in" in capsys.readouterr().out


def test_other_tokens_are_told(bench, monkeypatch):
    plain = offload._call

    def call(model, *others):
        told = plain(model, *others)
        return told | {"tokens": [*told["tokens"][:-1], len(told["stats"])]}

    monkeypatch.setattr(offload, "_call", call)
    status, (about, *found) = bench("--links", "cached", "--turns", "1")
    assert status == 1 and "NO: A BUG" in "\n".join(tables(about, found))


def test_it_goes_on_with_other_links(bench):
    bench("--links", "cached", "--turns", "1", "--chosen", "greedy")
    _, (about, *found) = bench("--links", "cached", "1000", "--turns", "1", "--resume")
    speeds = [record for record in found if record["part"] == "speed"]
    cells = [(record["link"], record["sampled"]) for record in speeds]
    assert cells == [("cached", False), ("cached", True), (1000.0, False), (1000.0, True)]
    assert speeds[0]["turns"] and "| page cache | greedy |" in "\n".join(tables(about, found))


def test_what_does_not_fit_is_listed(bench):
    status, (about, *found) = bench("--links", "cached", "--turns", "1", "--seconds", "0")
    assert status == 0 and "| skipped: out of time |" in "\n".join(tables(about, found))


def test_the_stand_in_takes_as_long_as_the_link_that_it_says():
    link = offload.Link({"one": torch.zeros(1000), "two": torch.zeros(500)}, [])
    naps, now = [], [0.0]

    class Clock:
        @staticmethod
        def perf_counter():
            return now[0]

        @staticmethod
        def sleep(seconds):
            naps.append(seconds)
            now[0] += seconds

    offload_time, offload.time = offload.time, Clock
    try:
        link.kind = 1e-6  # GB/s: 1,000 bytes a second
        link["one"], link["two"]
        link.kind = "cached"
        link["one"]
    finally:
        offload.time = offload_time
    assert naps == pytest.approx([4.0, 2.0, 0.0]) and link.nbytes == 10_000

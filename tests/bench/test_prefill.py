"""`bench prefill` on the CPU: both sides run, take turns, are compared and tabled."""

import argparse

import pytest
import torch

import std_decode
from bench import prefill, records
from bench.__main__ import main

TINY = ["--shape", "tiny", "--device", "cpu"]


@pytest.fixture
def bench(tmp_path):
    """``bench(*arguments)``: the exit status and the records, the environment first."""

    def call(*arguments):
        status = main(["prefill", *arguments, "--out", str(tmp_path)])
        files = list(tmp_path.glob("prefill-*.jsonl"))
        return status, records.read(files[0]) if files else []

    return call


@pytest.mark.parametrize("model", [TINY, ["--device", "cpu"]], ids=["tiny", "demo"])
def test_lengths_from_end_to_end(bench, tmp_path, capsys, model):
    few = ("--tokens", "200", "320", "--pairs", "2", "--top-k-keys", "32")
    status, (about, *found) = bench(*model, *few)
    assert status == 0 and about["device"] != "cuda"
    assert [record["tokens"] for record in found] == [200, 320]
    for record in found:
        assert record["pairs"] == 2 and record["same"] and record["note"] == ""
        assert 0 < record["scoring_ms"] and 0 < record["selecting_ms"]
        assert record["ratio_p20"] <= record["ratio"] <= record["ratio_p80"]
    (path,) = tmp_path.glob("prefill-*.md")
    assert path.read_text().count("| 2 |") == 2
    assert "Time to the first token" in capsys.readouterr().out


def test_it_goes_on_where_it_was_cut_off(bench, monkeypatch):
    bench(*TINY, "--tokens", "120", "--pairs", "1")
    timed = []
    monkeypatch.setattr(
        prefill, "_length", lambda *given: timed.append(given[2]) or {"tokens": given[2]}
    )
    monkeypatch.setattr(prefill, "_cells", lambda record: [])
    _, (about, first, second) = bench(*TINY, "--tokens", "120", "140", "--pairs", "1", "--resume")
    assert timed == [140] and "ratio" in first and first["tokens"] == 120
    # Another number of pairs is another run; and without --resume all is done again.
    bench(*TINY, "--tokens", "120", "--pairs", "2", "--resume")
    assert timed == [140, 120]
    assert len(bench(*TINY, "--tokens", "120", "--pairs", "2")[1]) == 2
    assert timed == [140, 120, 120]


def test_the_sides_take_turns_and_the_model_is_left_alone(monkeypatch):
    model, prompt = prefill._random("tiny", torch.float32, "cpu", 0)
    sides, plain = [], type(model).generate

    def generate(self, **options):
        sides.append("patched" if std_decode.is_patched(self) else "unpatched")
        return plain(self, **options)

    monkeypatch.setattr(type(model), "generate", generate)
    options = argparse.Namespace(pairs=3, top_k_keys=32)
    record = prefill._length(
        model, prompt, 120, options, torch.device("cpu"), deadline=float("inf")
    )
    turns = ["unpatched", "patched"]
    assert sides[4:10] == [*turns, *turns[::-1], *turns] and record["pairs"] == 3
    assert sides[10:] == ["patched"] * prefill.WATCHED_RUNS
    assert not std_decode.is_patched(model)


def test_ratios_are_of_pairs():
    """Not of medians: a machine that is slow for a while is slow for both."""
    spans = {"unpatched": [1.0, 2.0, 9.0], "patched": [1.1, 2.2, 9.9]}
    figures = prefill._figures(spans, {"unpatched": [2, 2, 4], "patched": [2, 3, 5]})
    assert figures["ratio"] == pytest.approx(1.1) and figures["patched_ms"] == 2200
    assert figures["cpu_ratio"] == 1.25 and prefill._figures(spans, None)["cpu_ratio"] is None


def test_a_wrong_token_is_an_error(bench, monkeypatch):
    monkeypatch.setattr("torch.equal", lambda *_: False)
    status, (_, record) = bench(*TINY, "--tokens", "120", "--pairs", "1")
    assert status == 1 and record["same"] is False


def test_what_does_not_fit_the_time_box_is_listed(bench, capsys):
    status, (_, record) = bench(*TINY, "--tokens", "120", "--seconds", "0")
    assert status == 0 and record["note"] == "skipped: out of time"
    assert "skipped" in capsys.readouterr().out


def test_without_a_gpu_cuda_is_refused(bench, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bench("--device", "cuda") == (2, [])
    assert "use cpu" in capsys.readouterr().err

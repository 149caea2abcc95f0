"""`bench batch`: all ways run, take turns, are compared and tabled."""

import json

import pytest

from bench.__main__ import main
from bench.batch import _records
from std_decode.app.batch.worker import Worker

QUICK = ["batch", "--clips", "3", "--seconds", "6", "14", "--batch-sizes", "1", "3"]


def test_every_way_from_end_to_end(tmp_path, capsys):
    assert main([*QUICK, "--repeat", "2", "--out", str(tmp_path)]) == 0
    about, *records = map(json.loads, (tmp_path / "batch.jsonl").read_text().splitlines())
    ways = ["loop, unpatched", "loop, patched", "loop over compare", "batch, size 1"]
    ways += ["batch, size 3", "reading alone"]
    assert [record["way"] for record in records] == ways
    assert all(record["same"] == 3 and len(record["ratios"]) == 2 for record in records)
    assert records[0]["ratio"] == 1.0 and "24 to 56 video tokens" in about["conditions"]
    text = (tmp_path / "batch.md").read_text()
    assert text.count("3 of 3") == 5 and "Many videos" in capsys.readouterr().out


def test_an_answer_that_differs_is_an_error(monkeypatch, tmp_path):
    plain = Worker._generate

    def generate(self, group):
        told = plain(self, group)
        return told if len(group) == 1 else [tokens[:-3] for tokens in told]

    monkeypatch.setattr(Worker, "_generate", generate)  # the shortest is asked by itself
    assert main([*QUICK, "--repeat", "1", "--out", str(tmp_path)]) == 1
    assert "| 1 of 3 |" in (tmp_path / "batch.md").read_text()


def test_ratios_are_of_turns_and_every_turn_s_answers_count():
    told = {"a": {"answer": "x", "tokens": 4}, "b": {"answer": "y", "tokens": 2}}
    wrong = {**told, "b": {"error": "bad"}}
    spans = {"loop, unpatched": [2.0, 8.0, 3.0], "loop, patched": [1.0, 4.0, 3.0]}
    loop, patched = _records(
        "ab", spans, {"loop, unpatched": [told] * 3, "loop, patched": [told, wrong, told]}
    )
    assert loop["tokens_per_s"] == 2.0 and loop["same"] == 2
    assert patched["ratio"] == 2.0 and patched["same"] == 1


def test_lengths_in_the_wrong_order_are_refused(capsys):
    assert main(["batch", "--seconds", "9", "7"]) == 2
    assert "--seconds is 9 7, expected the least first" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["batch", "--help"])
    assert "take turns" in capsys.readouterr().out

"""`bench gpu` with tiny stand-ins for its parts, on the CPU: ends in time, goes on, tells."""

import argparse
from importlib import import_module

import pytest
import torch

from bench import environment, records
from bench.__main__ import COMMANDS, main
from bench.gpu import command as gpu

CPU = ["--device", "cpu"]
PREFILL = ["--shape", "tiny", *CPU, "--tokens", "120", "--pairs", "1"]
DECODE = ["--quick", "--shape", "tiny", *CPU, "--batch", "1", "--context", "150", "--runs", "1",
          "--new-tokens", "12", "--ways", "dense"]  # fmt: skip
FAILING = ["--collect-only", "-q", "-n0", "no_such_file.py"]


@pytest.fixture
def about():
    return environment.environment(torch.device("cpu"))


def test_the_parts_take_less_than_nine_minutes():
    assert sum(part.seconds + part.grace for part in gpu.PARTS) < 9 * 60


@pytest.mark.parametrize("part", gpu.PARTS[1:], ids=lambda part: part.name)
def test_the_commands_know_what_they_are_asked(part):
    parser = argparse.ArgumentParser()
    import_module(COMMANDS[part.name]).add_parser(parser.add_subparsers())
    more = ["--seconds", "9", "--out", "x", "--resume"]
    parser.parse_args([part.name, *part.options, *more])


def test_without_a_gpu_nothing_is_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["gpu", "--out", str(tmp_path / "out"), "--resume"]) == 2
    assert not (tmp_path / "out").exists() and "no GPU" in capsys.readouterr().err


def test_a_part_that_hangs_is_stopped_and_costs_nothing_else(tmp_path, capfd):
    part = gpu.Part("decode", 0.2, DECODE, grace=0)
    ended = gpu.time_part(part, tmp_path, tmp_path / "none.jsonl", 0.2)
    assert ended["exit_status"] is None and not ended["passed"] and not ended["complete"]
    assert "decode: stopped after 0 s" in capfd.readouterr().out


def test_it_goes_on_where_it_was_cut_off(tmp_path, about, capfd):
    """Decoding has no time at first; then its file is cut off in the middle of a line."""
    prefill, late = gpu.Part("prefill", 200, PREFILL), gpu.Part("decode", 0, DECODE, grace=200)
    assert gpu.run_parts(tmp_path, about, [prefill, late], resume=False) == 0
    path = records.file_of(tmp_path, "round", about["device"])
    first, second = records.read(path)[1:]
    assert first["complete"] and second["passed"] and not second["complete"]
    read = records.file_of(tmp_path, "prefill", about["device"]).read_text()
    decoded = records.file_of(tmp_path, "decode", about["device"])
    assert "out of time" in decoded.read_text()
    capfd.readouterr()

    parts = [prefill, gpu.Part("decode", 200, DECODE)]
    assert gpu.run_parts(tmp_path, about, parts, resume=True) == 0
    told = capfd.readouterr().out
    assert "prefill: complete since" in told and "prefill: exit" not in told
    assert records.file_of(tmp_path, "prefill", about["device"]).read_text() == read
    whole = decoded.read_text()
    assert "out of time" not in whole and '"ours, dense"' in whole

    # Cut off within the record of the dense path: transformers' figures stay, the rest comes anew.
    lines = whole.splitlines(keepends=True)
    cut = next(n for n, line in enumerate(lines) if '"decode", "what": "ours, dense"' in line)
    decoded.write_text("".join(lines[:cut]) + lines[cut][:50])
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert gpu.run_parts(tmp_path, about, parts, resume=True) == 0
    again = decoded.read_text().splitlines(keepends=True)
    assert again[:cut] == lines[:cut] and len(again) == len(lines)
    assert again[cut] != lines[cut]

    # Other sources: nothing is gone on from.
    other = {**about, "sources": "of another day"}
    assert gpu.run_parts(tmp_path, other, parts[:1], resume=True) == 0
    assert "prefill: exit status 0" in capfd.readouterr().out


def test_what_fails_is_remembered(tmp_path, about, capfd):
    parts = [gpu.Part("tests", 60, FAILING)]
    assert gpu.run_parts(tmp_path, about, parts, resume=False) == 1
    (record,) = records.read(records.file_of(tmp_path, "round", about["device"]))[1:]
    assert record["exit_status"] == 4 and not record["complete"]  # pytest could not begin
    done = {**record, "exit_status": 1, "complete": True}
    path = records.file_of(tmp_path, "round", about["device"])
    path.write_text("".join(map(records.line_of, [about, done])))
    assert gpu.run_parts(tmp_path, about, parts, resume=True) == 1
    assert "tests: complete since an earlier run" in capfd.readouterr().out
    assert records.read(path)[1:] == [done]

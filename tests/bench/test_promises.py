"""`bench promises` on the CPU: each way runs, is timed and has its promise looked after."""

import pytest
import torch

from bench import promises, records
from bench.__main__ import main
from std_decode.model import alone

TINY = ["promises", "--models", "tiny", "--device", "cpu", "--tokens", "40", "--new", "12"]


@pytest.fixture
def bench(tmp_path):
    def call(*arguments):
        status = main([*TINY, "--runs", "1", *arguments, "--out", str(tmp_path)])
        (path,) = tmp_path.glob("promises-*.jsonl")
        return status, records.read(path)[1:], path.with_suffix(".md").read_text()

    return call


def test_from_end_to_end(bench):
    status, (record,), text = bench("--dtypes", "bfloat16")
    took = record["milliseconds"]
    assert status == 0 and record["kept"] == {"one shape": True, "unpatched bits": True}
    assert set(took) == {"unpatched", *promises.WAYS} and set(took["unpatched"]) == {"1"}
    assert all(set(took[way]) == {"1", "2", "5", "8"} for way in promises.WAYS)
    assert text.count("| tiny, 40 tokens | bfloat16 |") == 4 and text.count("| yes |") == 1


def test_it_goes_on_and_ends_in_time(bench):
    bench("--dtypes", "bfloat16")
    status, found, _ = bench("--dtypes", "bfloat16", "float16", "--seconds", "0", "--resume")
    assert status == 0 and "milliseconds" in found[0]
    assert found[1]["note"] == "skipped: out of time" and found[1]["dtype"] == "float16"


def test_a_promise_that_is_not_kept_is_told(bench, monkeypatch):
    plain = alone._one

    def other(attending, rows, token, length):
        return plain(attending, rows, token, length).roll(token, -1)

    monkeypatch.setattr(alone, "_one", other)
    monkeypatch.setattr("std_decode.admission.bits.unlike_unpatched", lambda *_: None)
    torch.manual_seed(0)
    status, (record,), text = bench("--dtypes", "bfloat16")
    assert status == 1 and record["kept"] == {"one shape": True, "unpatched bits": False}
    assert "| NOT: unpatched bits |" in text

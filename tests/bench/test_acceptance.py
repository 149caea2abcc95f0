"""`bench acceptance`: what it counts, and that it fails where a text differs."""

import torch

from bench import acceptance
from bench.__main__ import main

QUICK = ["acceptance", "--seconds", "16", "--clips", "2", "--top-k-keys", "8", "64"]


def test_counts_and_bytes_from_end_to_end(tmp_path, capsys):
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "draft-weights.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| 64")]
    assert [[cell.strip() for cell in row[:3]] for row in rows] == [
        ["64", kind, keys] for kind in ("greedy", "sampled") for keys in ("8", "64")
    ]
    for row in rows:
        rates = [float(cell.split("%")[0]) for cell in row[3:5]]
        passes = [float(cell) for cell in row[5:7]]
        assert all(0 < rate <= 100 for rate in rates) and all(1 <= x <= 5 for x in passes)
        assert row[7].strip() == "0"
    # With every key a draft by its own weights is always right.
    assert rows[1][3].strip().startswith("100.0%") and rows[3][3].strip().startswith("100.0%")
    assert "| a draft reads | 1,422,848 | 1,422,848 |" in text
    assert "acceptance --top-k-keys 8 64 --seconds 16 --clips 2 --out bench/results" in text
    assert "a draft reads" in capsys.readouterr().out


def test_a_text_that_differs_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    assert main([*QUICK[:3], "--clips", "1", "--top-k-keys", "8", "--out", str(tmp_path)]) == 1
    lines = (tmp_path / "draft-weights.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| 64 |")]
    assert len(rows) == 2 and all(row.endswith("| 2 |") for row in rows)


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    assert main(["acceptance", "--checkpoint", str(tmp_path)]) == 2
    assert f"--checkpoint is {tmp_path}, expected a folder" in capsys.readouterr().err
    assert acceptance.WEIGHTS == {"own": None, "int4": "int4"}

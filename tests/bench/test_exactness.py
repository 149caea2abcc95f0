"""`python -m bench exactness`: where texts part, and by how little."""

import pytest
import torch

from bench.__main__ import main
from bench.exactness import measure as exactness
from bench.sections import write_section
from std_decode.rounds.rows import Rows

QUICK = ["exactness", "--prompts", "1", "--seconds", "16"]


def test_where_texts_part():
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]).log()
    expected, way = torch.tensor([0, 1, 2]), exactness.Way()
    exactness.compare(way, expected, expected, scores)
    assert way.tokens == 3 and way.lags == []
    exactness.compare(way, expected, torch.tensor([0, 2, 0, 0]), scores)
    assert way.tokens == 4 and way.lags == [pytest.approx(0.5108, abs=1e-4)]
    with pytest.raises(AssertionError, match="2 tokens, expected 3"):
        exactness.compare(way, expected, expected[:2], scores)


def test_both_types_are_told(tmp_path, capsys):
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "reliability.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| demo | float32")]
    told = {row[2]: row for row in rows}
    for way in ("drafts", "dense path", "batch of 4"):
        assert told[way][3] == "0 of 1" and int(told[way][4]) > 20
    assert (
        "| demo | bfloat16 | float32 |" in text
        and "| random | bfloat16 | drafts |" in text
        and "--seconds 16" in text
    )


def test_a_text_that_parts_without_need_is_a_failure(monkeypatch):
    plain = Rows.keep

    def keep(self, tokens, agreed, limit):
        return plain(self, tokens, agreed * 0 + tokens.shape[1] - 1, limit)

    monkeypatch.setattr(Rows, "keep", keep)
    more = ["--dtypes", "float32", "--top-k-keys", "1", "--prompts", "2"]
    assert main([*QUICK, *more]) == 1


def test_sections_are_replaced_one_by_one(tmp_path):
    path = tmp_path / "a" / "b.md"
    for title, text in (("One", "1"), ("Two", "2\n\n| a |"), ("One", "3")):
        write_section(path, "# Head\n\nwords", title, text)
    assert path.read_text() == "# Head\n\nwords\n\n## One\n\n3\n\n## Two\n\n2\n\n| a |\n"
    assert [file.name for file in path.parent.iterdir()] == ["b.md"]

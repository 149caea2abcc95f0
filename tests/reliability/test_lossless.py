"""Whatever is asked, and however badly is drafted: the tokens of the unpatched model."""

import pytest

from std_decode.rounds.rows import Rows
from tests.reliability.lossless import SHARD, cases, quiet
from tests.reliability.trials import TEXTUAL, VISUAL


@pytest.fixture(autouse=True)
def quietly():
    quiet()


def test_random_calls():
    found = cases(12, SHARD)
    assert not found["failures"], found["failures"][0]
    # One token in 1e5 is a near tie, and here are some thousand: two would be no coincidence.
    assert len(found["ties"]) <= 1, found["ties"]
    # What the draw is supposed to reach; the twelfth hundred reaches all, and takes little time.
    assert found["cases"] == SHARD and len(found["families"]) > len({*VISUAL, *TEXTUAL}) / 2
    assert min(found[kind] for kind in ("lockstep", "captured", "sampled", "batches")) > 3
    assert found["tokens"] > 1000 and 0 < found["accepted"] < found["drafted"] / 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_random_calls_in_half_precision(dtype):
    """No token differs, however near a tie: from the unpatched model's, or where passes of one
    shape are promised from those without drafts."""
    found = cases(3, 40, dtype=dtype)
    assert not found["failures"], found["failures"][0]
    assert found["cases"] == 40 and not found["ties"]
    assert 5 < found["as_unpatched"] < 40
    assert found["tokens"] > 500 and 0 < found["accepted"] < found["drafted"] / 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard", range(20))
def test_random_calls_by_the_thousand(shard, dtype):
    """`python -m tests.reliability lossless --cases 2000` does the same, and goes on from where
    it was interrupted."""
    found = cases(shard, SHARD, dtype=dtype)
    print(found["ties"])
    assert not found["failures"], found["failures"][0]
    assert len(found["ties"]) <= 1, found["ties"]


def test_a_broken_accept_rule_would_be_seen(monkeypatch):
    plain = Rows.keep

    def keep_everything(self, tokens, agreed, limit):
        return plain(self, tokens, agreed * 0 + tokens.shape[1] - 1, limit)

    monkeypatch.setattr(Rows, "keep", keep_everything)
    found = cases(0, 15, shrink=False)
    assert any("AssertionError" in failure for failure in found["failures"])

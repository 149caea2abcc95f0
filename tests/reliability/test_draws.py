"""Sampled texts come as often as the dense model would have them."""

import pytest
import torch

import std_decode
from std_decode.rounds.loop import Decoding
from std_decode.rounds.noise import Noise
from std_decode.rounds.rows import Rows
from tests.reliability.draws import (
    DRAWS,
    KINDS,
    PATCH,
    VOCABULARY,
    believing,
    draw,
    exact,
    make_model,
    p_value,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    model, prompt = make_model()
    return model, prompt, exact(model, prompt)


def test_the_exact_distribution_is_one(tiny):
    _, _, wanted = tiny
    assert float(wanted.sum()) == pytest.approx(1)
    assert (wanted * DRAWS > 10).sum() > 50  # cells that the test below can tell apart


def test_p_values():
    wanted = torch.full((10,), 0.1, dtype=torch.float64)
    even = torch.full((10,), 1000)
    assert p_value(even, wanted) == pytest.approx(1)
    skewed = even.clone()
    skewed[0], skewed[1] = 1065, 935  # chi-square 8.45 with 9 degrees of freedom
    assert p_value(skewed, wanted) == pytest.approx(0.4896, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_come_as_often_as_they_should(tiny, kind):
    model, prompt, wanted = tiny
    with std_decode.patched(model, **PATCH):
        # In lockstep generate itself draws, so a few do.
        draws = DRAWS if kind == "ragged" else DRAWS // 4
        counts = draw(model, prompt, draws, 1, **KINDS[kind])
        stats = std_decode.last_stats(model)
    assert stats.mode == kind and 0 < stats.accepted < stats.drafted
    assert counts.sum() == draws and p_value(counts, wanted) > 1e-3


def same_noise(monkeypatch):
    """Each step divides by the random numbers of the first: right one by one, wrong together."""
    plain = Noise.at
    monkeypatch.setattr(Noise, "at", lambda self, steps: plain(self, steps * 0))


def every_draft(monkeypatch):
    monkeypatch.setattr(Rows, "keep", believing(Rows.keep))


def half_the_rejected(monkeypatch):
    """Takes a first draft as the dense choice in every other row."""
    plain = Decoding.accept

    def accept(self, drafts, logits):
        lucky = torch.arange(1, len(drafts), 2)
        if drafts.shape[1]:
            logits = logits.clone()
            logits[lucky, 0] = float("-inf")
            logits[lucky, 0, drafts[lucky, 0]] = 0
        return plain(self, drafts, logits)

    monkeypatch.setattr(Decoding, "accept", accept)


@pytest.mark.parametrize("fault", [same_noise, every_draft, half_the_rejected])
def test_a_wrong_rule_would_be_seen(tiny, monkeypatch, fault):
    model, prompt, wanted = tiny
    with std_decode.patched(model, **PATCH):
        fault(monkeypatch)
        counts = draw(model, prompt, DRAWS // 4, 1)
    assert len(counts) == VOCABULARY**3 and p_value(counts, wanted) < 1e-6

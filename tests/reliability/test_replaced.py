"""Attention that is somebody else's is never stood in for: the tokens of the unpatched model."""

from collections import Counter

import pytest

from std_decode.admission import changes, eligibility
from tests.reliability.lossless import quiet
from tests.reliability.replaced import CHANGES, case


@pytest.fixture(autouse=True)
def quietly():
    quiet()


def test_random_replacements():
    """`python -m tests.reliability replaced --cases 1000` goes on."""
    told: Counter = Counter()
    came: Counter = Counter()
    for number in range(2000, 2060):
        what, outcomes = case(number)
        told.update(line.partition(" ")[0] for line in what)
        came.update(outcomes)
    assert {way.__name__ for way in CHANGES} < set(told)
    assert min(came[kind] for kind in ("refused", "unpatched", "accelerated")) > 5


def test_without_a_look_at_whose_attention_it_is_tokens_are_wrong(monkeypatch):
    """A window of 30, which a trial of nine tokens cannot see."""
    monkeypatch.setattr(eligibility, "foreign_attention", lambda *_: None)
    with pytest.raises(AssertionError):
        case(2033)


def test_without_a_look_for_changes_tokens_are_wrong(monkeypatch):
    monkeypatch.setattr(changes, "attention_parts", lambda *_: ())
    wrong = 0
    for number in (2000, 2008, 2010):
        try:
            case(number)
        except AssertionError:
            wrong += 1
    assert wrong > 0

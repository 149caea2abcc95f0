"""What is looked up in a text, and what is thought of it."""

import math
import random
from itertools import islice
from statistics import mean

import pytest
import torch

from std_decode.rounds.lookup import (
    NONE,
    NOT_TEXT,
    RIGHT,
    SIZES,
    SUPPOSED,
    WRONG,
    Chances,
    Found,
    Lookup,
    Text,
)
from tests.decode.matches import Match


def by_hand(tokens, most):
    """Drafts by their definition, and the size of the n-gram: the longest that stood before, and
    of those the newest."""
    for size in SIZES:
        tail = tokens[-size:]
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tail and NOT_TEXT not in tail:
                break
        else:
            continue
        if tokens[end] == NOT_TEXT:
            continue
        longer = list(tokens)
        while len(longer) < len(tokens) + most:
            longer.append(longer[end + len(longer) - len(tokens)])
        drafts = longer[len(tokens) :]
        return size, drafts[: drafts.index(NOT_TEXT)] if NOT_TEXT in drafts else drafts
    return 0, []


@pytest.mark.parametrize("seed", range(30))
def test_every_text_is_looked_up_as_defined(seed):
    dice = random.Random(seed)
    letters = range(dice.choice((2, 3, 9)))
    prompt = [dice.choice((*letters, NOT_TEXT)) for _ in range(dice.randint(1, 40))]
    text, found = Text(list(prompt)), set()
    for _ in range(40):
        size, drafts = by_hand(text.tokens, 20)
        assert (text.size, text.drafts(20)) == (size, drafts)
        assert text.drafts(3) == drafts[:3]
        found.add(size)
        text.append(dice.choice(drafts or [0]) if dice.random() < 0.8 else dice.choice(letters))
    assert len(found) > 2


def test_the_longest_goes_before_the_newest_and_that_before_the_oldest():
    assert Text([1, 2, 3, 4, 5, 9, 4, 5, 8, 2, 3, 4, 5]).drafts(2) == [9, 4]  # four alike
    assert Text([4, 5, 9, 7, 4, 5, 8, 6, 4, 5]).drafts(2) == [8, 6]
    assert Text([5, 9, 5, 8, 1, 5]).drafts(2) == [8, 1]
    assert Text([1, 2, 3]).drafts(2) == [] == Text([1]).drafts(2)


def test_what_runs_into_the_end_of_the_text_goes_on_with_itself():
    assert Text([7, 1, 2, 3, 1]).drafts(8) == [2, 3, 1, 2, 3, 1, 2, 3]
    assert Text([7, 7]).drafts(3) == [7, 7, 7]


def test_pictures_and_padding_are_neither_looked_up_nor_drafted():
    ids = torch.tensor([[0, 0, 5, 99, 99, 5, 6, 99, 7, 6]])
    no_text = (ids == 99) | (ids == 0)
    lookup = Lookup(ids, no_text, Chances())
    assert lookup.drafts([0], 4) == [[]]  # after 6 came a picture
    lookup.extend(0, [5])
    assert lookup.drafts([0], 4) == [[6]]
    assert lookup.tensor([[6]], 3, ids.device).tolist() == [[6, 5, 5]]  # and what can be read
    lookup.extend(0, [0])
    assert lookup.drafts([0], 4) == [[]]


def test_each_row_looks_in_its_own_text():
    ids = torch.tensor([[1, 2, 3, 1], [1, 5, 6, 1], [1, 2, 3, 9]])
    lookup = Lookup(ids, ids < 0, Chances())
    assert lookup.drafts([0, 1, 2], 2) == [[2, 3], [5, 6], []]
    assert lookup.drafts([1], 1) == [[], [5], []]
    assert [text.size for text in lookup.found([0, 2]).texts] == [1, 0]
    assert lookup.found([2]) is None
    assert [text.size for text in lookup.found_together([0, 1], 2).texts] == [1, 1]
    assert lookup.found_together([0, 2], 2) is None
    lookup.extend(1, [5])
    assert lookup.drafts([0, 1, 2], 2) == [[2, 3], [6, 1], []]


def test_chances_are_learnt_from_every_token_by_the_size_of_the_match():
    chances = Chances()
    lookup = Lookup(torch.tensor([[1, 2, 3, 4, 5, 1]]), torch.zeros(1, 6).bool(), chances)
    lookup.extend(0, [2, 3, 4, 9])  # after 1, 12, 123 and 1234, which were followed by 2345
    seen = {size: round(chances.seen[size]) for size in SIZES}
    assert seen == {8: 4, 4: 5, 2: 6, 1: 5}
    right = {size: chances.right[size] / chances.seen[size] for size in SIZES}
    assert right[2] > 0.4 and right[1] > 0.2 and right[4] < SUPPOSED[4] and right[8] == SUPPOSED[8]
    other = chances.copy()
    other.observe(8, NONE, False)
    assert other.of(8, NONE) < chances.of(8, NONE)


def test_a_text_remembers_which_look_ups_were_right():
    text = Text([1, 2, 3, 4, 1])
    for token in (2, 9, 7, 1, 2):  # after 1 comes 2, after 12 not 3; 9 and 7 are new
        text.append(token)
    assert list(text.outcomes) == [NONE] * 5 + [RIGHT, WRONG, NONE, NONE, RIGHT]
    assert text.drafts(3) == [9, 7, 1]
    on_with_itself = [WRONG, NONE, NONE, RIGHT, WRONG, NONE]
    assert list(islice(text.before(), 6)) == on_with_itself
    assert list(Text([1, 2]).before()) == []
    assert list(Text([1, 2, NOT_TEXT, 1]).before()) == [NONE]  # no draft, hence nothing to expect


def test_what_was_right_once_is_likelier_than_what_was_wrong():
    """Before any such was seen; and what is seen is more than what is supposed."""
    chances = Chances()
    for size in SIZES:
        wrong, none, right = (chances.of(size, outcome) for outcome in (WRONG, NONE, RIGHT))
        assert 0 < wrong < none < right < 1 and none == pytest.approx(SUPPOSED[size])
    for _ in range(100):
        chances.observe(2, RIGHT, False)
        chances.observe(2, WRONG, True)
    assert chances.of(2, RIGHT) < 0.2 and chances.of(2, WRONG) > 0.8


def test_where_texts_have_a_form_what_it_gives_away_is_told_from_what_it_does_not():
    """Rows of a table: bars stand where they stood, and numbers are new. By the size of the
    n-gram alone a look-up after a bar would be as likely as one after a number."""
    dice = random.Random(0)
    chances, bar, dash = Chances(), 100, 101
    lookup = Lookup(torch.tensor([[bar, dash]]), torch.zeros(1, 2).bool(), chances)
    text, surprise, by_size = lookup.texts[0], 0.0, 0.0
    for _ in range(100):
        for token in (dice.randrange(10), dash, dice.randrange(10), bar):
            if text.size:
                told, right = chances.of(text.size, next(text.before())), text.drafts(1) == [token]
                surprise -= math.log(told if right else 1 - told)
                told = chances.right[text.size] / chances.seen[text.size]
                by_size -= math.log(told if right else 1 - told)
            lookup.extend(0, [token])
    assert surprise < 0.75 * by_size


def known(chance_by_size):
    """Chances that are known so well that nothing else is supposed."""
    chances = Chances()
    for size, chance in chance_by_size.items():
        chances.seen[size], chances.right[size] = 1.0, chance
    return chances


def test_what_a_round_may_expect():
    """The n-gram grows by one with each draft that is right: by 2 and more, by 4 and more."""
    chances = known({8: 0.9, 4: 0.8, 2: 0.5, 1: 0.3})
    table = [none for none, *_ in chances.table()[1:]]
    assert table == pytest.approx([0.3, 0.5, 0.5, 0.8, 0.8, 0.8, 0.8, 0.9])
    one = Found([Match(1)], chances).expected(2)
    assert one == pytest.approx([1, 1.3, 1.45])
    four = Found([Match(4)], chances).expected(2)
    assert four == pytest.approx([1, 1.8, 2.44])
    apart = Found([Match(1), Match(4), Match(0)], chances).expected(2)
    assert apart == pytest.approx([1, *(mean(x) for x in zip(one[1:], four[1:], (1, 1)))])
    both = Found([Match(1), Match(4)], chances, together=True)
    assert both.expected(1) == pytest.approx([1, 1.24])
    alike = Found([Match(4), Match(4)], chances, together=True)
    assert alike.expected(2)[2] == pytest.approx(1 + 0.64 + 0.64**2)


def test_what_is_unlikely_is_not_added_up():
    chances = known({8: 0.9, 4: 0.8, 2: 0.5, 1: 0.3})
    after = chances.of(2, WRONG)
    assert after == pytest.approx(0.25)
    expected = Found([Match(2, WRONG)], chances).expected(32)
    grown = [0.25, 0.25 * 0.25, 0.25 * 0.25 * (0.8 / 3) / (0.8 / 3 + 0.2)]  # 4 of them by then
    assert expected[:4] == pytest.approx([1, *(1 + sum(grown[: i + 1]) for i in range(3))])
    assert len(expected) == 33 and expected[-1] == expected[-20] > expected[6]

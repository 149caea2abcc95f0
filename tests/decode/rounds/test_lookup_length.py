"""What look-ups may lose and have to gain under draft_length="auto", on machines made up.

Time is in dense steps. Texts are tokens that are known beforehand: look-ups are right where they
are, drafts of the model's own by chance, drawn once for each token.
"""

import itertools
import random
from functools import lru_cache
from statistics import mean

import pytest
import torch

from std_decode.rounds import policy as policies
from std_decode.rounds.lookup import NONE, Found, Lookup
from std_decode.rounds.lookup_length import LOOKUP_LENGTHS
from std_decode.rounds.policy import LENGTHS, Policy
from tests.decode.matches import Match
from tests.decode.rounds.test_policy import workload

PROMPT, ANSWER = 400, 512
ACCEPTANCES = (0.0, 0.8, 0.95)
DRAFTS = (0.15, 0.5)  # a draft step
VERIFY = ((1.0, 0.01), (1.2, 0.05), (1.5, 0.1))  # of one token, and of each more
GRID = tuple(itertools.product(ACCEPTANCES, DRAFTS, VERIFY))
# How much of a text is copied, and how many words there are for the rest: a subtitle file, say;
# prose; few words in any order, where there is much to find and nothing of it is right.
TEXTS = {"repeats": (0.85, 900), "now and then": (0.3, 900), "new": (0.0, 900), "babble": (0.0, 4)}


def text_of(name, seed):
    copied, words = TEXTS[name]
    dice = random.Random(seed)
    text = [dice.randrange(words) for _ in range(PROMPT)]
    while len(text) < PROMPT + ANSWER + max(LENGTHS):
        length = dice.randint(12, 48)
        if dice.random() < copied:
            start = dice.randrange(len(text))
            text += text[start : start + length]
        else:
            text += [dice.randrange(words) for _ in range(length)]
    return text


class Run:
    """An answer by a policy's choices; `rows` of them, each with a text of its own.

    Attributes:
        ends: after each round, the tokens there are of a row on average, and the time they took.
        looked_up: rounds whose drafts were.
    """

    def __init__(self, name, policy, draft, verify, seed=0, rows=1):
        self.texts = [text_of(name, seed + 1000 * row) for row in range(rows)]
        self.length = policy.begin(workload(draft), rows)
        self.draft, self.verify = draft, verify
        self.dice = random.Random(seed)
        prompts = torch.tensor([text[:PROMPT] for text in self.texts])
        self.lookup = Lookup(prompts, prompts < 0, self.length.chances)
        self.at = [PROMPT] * rows
        self.seconds, self.looked_up, self.ends = 0.0, 0, []

    def go(self, acceptance, slowed=lambda: 1.0):
        """On to the end of the answer."""
        right = [[self.dice.random() < acceptance for _ in text] for text in self.texts]
        one, more = self.verify
        while going := [row for row, at in enumerate(self.at) if at < PROMPT + ANSWER]:
            found = self.lookup.found(going) if self.length.looks_up else None
            gamma = self.length.choose(going, found)
            count, agreed = abs(gamma), {}
            drafts = self.lookup.drafts(going, count)
            for row in going:
                agree = [token == text for token, text in zip(drafts[row], self.to_come(row))]
                agree = [*agree, False] if gamma < 0 else right[row][self.at[row] :]
                agreed[row] = next(i for i, fits in enumerate([*agree[:count], False]) if not fits)
            drafting = max(0, gamma) * self.draft
            rest = (one + more * count if gamma else 1.0) * slowed()
            tokens = mean(agreed.values()) + 1
            self.length.observe(gamma, agreed, drafting, rest, tokens)
            for row, kept in agreed.items():
                self.lookup.extend(row, self.to_come(row)[: kept + 1])
                self.at[row] += kept + 1
            self.seconds += drafting + rest
            self.looked_up += gamma < 0
            self.ends.append((mean(self.at) - PROMPT, self.seconds))
        return self

    def to_come(self, row):
        return self.texts[row][self.at[row] :]


@lru_cache(maxsize=None)
def runs(name, rows=1, grid=GRID):
    """Of the whole grid: with look-ups, and without."""
    return {
        cell: [
            Run(name, Policy(LENGTHS, lookups), *cell[1:], 0, rows).go(cell[0])
            for lookups in (LOOKUP_LENGTHS, ())
        ]
        for cell in grid
    }


def gains(name, rows=1, grid=GRID):
    """How many times faster than without look-ups."""
    speeds = {
        cell: [run.ends[-1][0] / run.seconds for run in both]
        for cell, both in runs(name, rows, grid).items()
    }
    return {cell: with_them / without for cell, (with_them, without) in speeds.items()}


@pytest.mark.parametrize("name", TEXTS)
def test_no_answer_is_slower_than_dense(name):
    """By more than 3%, wherever it ends after 256 tokens: what holds of other drafts, too."""
    for cell, (run, _) in runs(name).items():
        for tokens, seconds in run.ends:
            assert tokens < 256 or seconds <= 1.03 * tokens, (cell, tokens)


@pytest.mark.parametrize("name", TEXTS)
def test_look_ups_seldom_keep_better_drafts_from_being_found(name):
    """Where all that they find is wrong, trying them out costs a part of what may be lost."""
    told = gains(name)
    assert mean(told.values()) >= 0.99
    assert min(told.values()) >= 0.9, sorted(told.items(), key=lambda x: x[1])[:5]


def test_texts_that_repeat_are_at_least_1_3_times_as_fast():
    """As by drafts of the model's own, where a token more to verify costs little, as on a GPU;
    where it costs a tenth of a dense step, they gain too."""
    told = gains("repeats")
    assert min(told.values()) >= 1.1 and mean(told.values()) >= 1.8, told
    assert all(gain >= 1.3 for (*_, verify), gain in told.items() if verify == VERIFY[0]), told


def test_rows_that_repeat_gain_beside_rows_that_do_not():
    run = Run("repeats", Policy(), 0.5, VERIFY[0], rows=3)
    run.texts[1:] = [text_of("new", row) for row in (1, 2)]
    prompts = torch.tensor([text[:PROMPT] for text in run.texts])
    run.lookup = Lookup(prompts, prompts < 0, run.length.chances)
    tokens, seconds = next(end for end in run.go(0.0).ends if end[0] >= 200)
    assert run.looked_up > 20 and tokens > 1.05 * seconds


@pytest.mark.parametrize("name", TEXTS)
def test_look_ups_alone(name):
    """Nothing else is ever drafted, and no answer is slower than dense."""
    for cell in GRID[::5]:
        run = Run(name, Policy((), LOOKUP_LENGTHS), *cell[1:])
        choose, chosen = run.length.choose, []
        run.length.choose = lambda *given: chosen.append(choose(*given)) or chosen[-1]
        run.go(cell[0])
        assert max(chosen) == 0 and run.looked_up == sum(gamma < 0 for gamma in chosen)
        assert all(tokens < 256 or seconds <= 1.03 * tokens for tokens, seconds in run.ends)
        assert name != "repeats" or run.ends[-1][0] > 1.3 * run.seconds


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", TEXTS)
def test_more_machines_and_rows(name, rows):
    grid = tuple(itertools.product((0.0, 0.5, 0.8, 0.95), (0.15, 0.5, 0.9), VERIFY))
    told = gains(name, rows, grid)
    assert mean(told.values()) >= (1.8 if name == "repeats" else 0.99)
    assert min(told.values()) >= (1.1 if name == "repeats" else 0.9)
    for cell, (run, _) in runs(name, rows, grid).items():
        for tokens, seconds in run.ends:
            assert tokens < 256 or seconds <= 1.04 * tokens, (cell, tokens)


def taught():
    """A call that has timed dense steps and nothing else, and what 8 tokens find."""
    length = Policy().begin(workload(0.9), 1)
    for _ in range(30):
        length.observe(0, {0: 0}, 0.0, 1.0, 1.0)
    length.next_trial = float("inf")
    for _ in range(40):
        length.chances.observe(8, NONE, True)
    return length, Found([Match(8)], length.chances)


def test_a_round_that_something_slowed_speaks_for_nothing():
    length, found = taught()
    assert length.choose([0], found) == -LOOKUP_LENGTHS[0]  # no leap in the dark
    length.observe(-1, {0: 1}, 0.0, 30.0, 2.0)
    assert not length.times.looked_up and length.behind <= 0
    assert length.choose([0], found) == 0  # a dense step tells whether it is the machine
    length.observe(0, {0: 0}, 0.0, 1.0, 1.0)
    for _ in range(3):
        gamma = length.choose([0], found)
        assert gamma < 0
        length.observe(gamma, {0: -gamma}, 0.0, 1.1, 1.0 - gamma)
    assert list(length.times.looked_up) == [2, 7, 33]


def test_what_is_slow_twice_is_slow():
    length, found = taught()
    length.observe(-1, {0: 1}, 0.0, 30.0, 2.0)
    length.observe(0, {0: 0}, 0.0, 1.0, 1.0)
    length.observe(-1, {0: 1}, 0.0, 30.0, 2.0)
    assert list(length.times.looked_up[2]) == [30.0, 30.0] and length.behind > 10
    assert length.choose([0], found) >= 0


def test_a_first_use_tells_nothing_of_times():
    length, found = taught()
    behind = length.behind
    length.observe(-3, {0: 3}, 0.0, 1000.0, 4.0, first_use=True)
    assert not length.times.looked_up and length.lookup.doubted is None
    assert length.behind < behind


def test_dense_steps_are_timed_however_much_is_found():
    length, found = taught()
    chosen = []
    for _ in range(200):
        chosen.append(length.choose([0], found))
        length.observe(chosen[-1], {0: -chosen[-1]}, 0.0, 1.0, 1.0 - chosen[-1])
    assert set(chosen) == {0, -1, -6, -32}
    assert 200 / policies.REFRESH - 1 <= chosen.count(0) <= 12


def test_a_call_begins_with_what_others_learnt():
    policy = Policy()
    length = policy.begin(workload(0.5), 1)
    for _ in range(100):
        length.chances.observe(2, NONE, True)
    assert policy.chances.right[2] < 1  # until it ends
    length.end()
    following = policy.begin(workload(0.5), 1)
    assert following.chances.right[2] / following.chances.seen[2] > 0.9
    following.chances.observe(2, NONE, False)
    assert policy.chances.right[2] == length.chances.right[2]


def test_no_longer_than_a_pass_has_room_for():
    assert Policy().begin(workload(0.5), 1, most=7).lookup.lengths == [1, 3, 6]
    assert Policy(lookup_lengths=()).begin(workload(0.5), 1).looks_up is False

"""Drafts that are looked up: what followed the newest tokens where they stood before.

Where a text repeats its prompt or itself, that is what comes next, and it costs no pass to find
out (prompt lookup: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding). Each row looks in
its own text, on the host, which gets the tokens with the one read of each round.

How often a look-up is right is learnt without drafting: whatever a token was chosen by, it tells
whether the look-up before it would have been right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from itertools import count, islice
from math import prod

import torch
from torch import Tensor

# Of the n-grams that are looked up, longest first. After a long one the text is nearly sure to go
# on as it did; after a single token it is where texts have a form, as tables and records do.
SIZES = (8, 4, 2, 1)
NOT_TEXT = -1  # a token that is no draft: of a video or an image, or masked
# Chance that a look-up is right, before any was seen: low, for they show it without being used;
SUPPOSED = {8: 0.5, 4: 0.3, 2: 0.15, 1: 0.05}
SUPPOSED_TOKENS = 4.0  # how many tokens' worth that supposition is,
MEMORY = 0.99  # and the weight that is left to what was seen after one more token
# What the look-up before a token was, when the token came: none (in prompts none is tried),
# wrong or right. It tells of the next look-up that leads to that token.
NONE, WRONG, RIGHT = range(3)
ODDS = (1.0, 1 / 3, 3.0)  # factors on the odds of that, before any such was seen,
ODDS_TOKENS = 8.0  # and how many tokens' worth these are
UNLIKELY = 1e-3  # that so many drafts are right: what more of them add is not worth adding up


class Chances:
    """How often the token that was looked up came next.

    By the size of the n-gram before it, and by that and whether the look-up led to it before.
    Where a text has a form, the same look-ups are right and wrong again and again: of a table's
    row, those that lead to the bars and not those that lead to the numbers.
    """

    def __init__(self) -> None:
        self.right = {size: SUPPOSED_TOKENS * chance for size, chance in SUPPOSED.items()}
        self.seen = dict.fromkeys(SIZES, SUPPOSED_TOKENS)
        self.right_after = {size: [0.0, 0.0, 0.0] for size in SIZES}
        self.seen_after = {size: [0.0, 0.0, 0.0] for size in SIZES}

    def observe(self, size: int, before: int, right: bool) -> None:
        """That a look-up which was once `before` (NONE, WRONG, RIGHT) was right, or was not."""
        self.right[size] = MEMORY * self.right[size] + right
        self.seen[size] = MEMORY * self.seen[size] + 1
        after, seen = self.right_after[size], self.seen_after[size]
        after[before], seen[before] = MEMORY * after[before] + right, MEMORY * seen[before] + 1

    def of(self, size: int, before: int) -> float:
        """That such a look-up is right."""
        odds = ODDS[before] * self.right[size]
        supposed = ODDS_TOKENS * odds / (odds + self.seen[size] - self.right[size])
        seen = ODDS_TOKENS + self.seen_after[size][before]
        return (supposed + self.right_after[size][before]) / seen

    def table(self) -> list[list[float]]:
        """The same by the length of the n-gram, up to the longest that is looked up."""
        of_class = {size: [self.of(size, before) for before in range(3)] for size in SIZES}
        return [[], *(of_class[_class(length)] for length in range(1, SIZES[0] + 1))]

    def copy(self) -> Chances:
        return deepcopy(self)


def _class(length: int) -> int:
    return next(size for size in SIZES if size <= length)


class Text:
    """The text of one row, and where its n-grams stood last.

    Attributes:
        tokens: prompt and answer.
        outcomes: what the look-up before each was: NONE, WRONG or RIGHT.
        newest: by size, then by the hash of an n-gram, where its newest occurrence ended. The
            newest tokens themselves are in it as soon as it is known what follows.
        size, start: of the longest n-gram that the text ends with and that stood before, and
            where that ended; 0 where there is none.
    """

    def __init__(self, tokens: list[int]):
        self.tokens = tokens
        self.outcomes = bytearray(len(tokens))
        before = tokens[:-1]
        self.newest = {
            size: dict(
                zip(map(hash, zip(*(before[i:] for i in range(size)))), range(size, len(tokens)))
            )
            for size in SIZES
        }
        self._look_up()

    def append(self, token: int) -> int:
        """Take note of a token; returns what the look-up before it was."""
        for size, key in self.keys.items():
            self.newest[size][key] = len(self.tokens)
        outcome = NONE
        if self.size:
            outcome = RIGHT if self.tokens[self.start] == token else WRONG
        self.outcomes.append(outcome)
        self.tokens.append(token)
        self._look_up()
        return outcome

    def _look_up(self) -> None:
        tail = tuple(self.tokens[-SIZES[0] :])
        self.keys = {size: hash(tail[-size:]) for size in SIZES}
        self.size = self.start = 0
        for size, key in self.keys.items():
            start = self.newest[size].get(key)
            if start is None or self.tokens[start] == NOT_TEXT or NOT_TEXT in tail[-size:]:
                continue
            self.size, self.start = size, start
            return

    def drafts(self, most: int) -> list[int]:
        """What followed then, at most so many tokens; none where nothing was found."""
        return [self.tokens[at] for at in islice(self._onwards(), most)]

    def before(self) -> Iterator[int]:
        """What the look-up that led to each of these was: NONE, WRONG or RIGHT."""
        return (self.outcomes[at] for at in self._onwards())

    def _onwards(self) -> Iterator[int]:
        """Where these stand: into the end of the text, and on with themselves."""
        if not self.size:
            return
        period = len(self.tokens) - self.start
        for i in count():
            at = self.start + i % period
            if self.tokens[at] == NOT_TEXT:
                return
            yield at


class Found:
    """What the rows that go on have found, for a policy to weigh.

    Args:
        texts: of these rows.
        together: whether all rows advance by the smallest acceptance.
    """

    def __init__(self, texts: Sequence[Text], chances: Chances, together: bool = False):
        self.texts, self.chances, self.together = texts, chances, together

    @property
    def everywhere(self) -> bool:
        return all(text.size for text in self.texts)

    def expected(self, most: int) -> list[float]:
        """Tokens that a row may expect of a round of 0 to `most` drafts, on average."""
        table = self.chances.table()
        along = [_along(text.size, text.before(), table) for text in self.texts]
        if self.together:
            return _expected(map(prod, zip(*along)), most)
        tokens = [0.0] * (most + 1)
        for own in along:
            tokens = [sum_of + one for sum_of, one in zip(tokens, _expected(own, most))]
        return [sum_of / len(self.texts) for sum_of in tokens]


def _along(size: int, before: Iterable[int], table: list[list[float]]) -> Iterator[float]:
    """That each of the drafts after such an n-gram is right if those before it are."""
    for outcome in before:
        yield table[size][outcome]
        size = min(size + 1, SIZES[0])  # with each draft that is right the n-gram grows by one


def _expected(chances: Iterable[float], most: int) -> list[float]:
    expected, all_right = [1.0], 1.0
    for chance in islice(chances, most):
        all_right *= chance
        if all_right < UNLIKELY:
            break
        expected.append(expected[-1] + all_right)
    return expected + expected[-1:] * (most + 1 - len(expected))


class Lookup:
    """The texts of a batch.

    Args:
        input_ids: the prompt, ``[B, S]``.
        no_text: of which tokens nothing is to be made, bool ``[B, S]``.
        chances: learnt from; those of the call.
    """

    def __init__(self, input_ids: Tensor, no_text: Tensor, chances: Chances):
        prompts = input_ids.masked_fill(no_text, NOT_TEXT).tolist()
        self.texts = [Text(tokens) for tokens in prompts]
        self.chances = chances

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """Take note of the tokens that were chosen."""
        text = self.texts[row]
        for token in tokens:
            size, before = text.size, text.outcomes[text.start]
            outcome = text.append(token)
            if size:
                self.chances.observe(size, before, outcome == RIGHT)

    def found(self, rows: Sequence[int]) -> Found | None:
        """What these rows have found, or None where no row has found anything."""
        texts = [self.texts[row] for row in rows]
        return Found(texts, self.chances) if any(text.size for text in texts) else None

    def found_together(self, rows: Sequence[int], most: int) -> Found | None:
        """The same where all rows advance as one: None unless each has `most` drafts."""
        if not rows or any(len(self.texts[row].drafts(most)) < most for row in rows):
            return None
        return Found([self.texts[row] for row in rows], self.chances, together=True)

    def drafts(self, rows: Sequence[int], count: int) -> list[list[int]]:
        """What each row drafts, at most `count` tokens; only `rows` draft anything."""
        return [text.drafts(count) if row in rows else [] for row, text in enumerate(self.texts)]

    def tensor(self, drafts: list[list[int]], count: int, device: torch.device) -> Tensor:
        """The same, ``[B, count]``; where there is no draft, any token that the model can read."""
        filled = [
            own + text.tokens[-1:] * (count - len(own)) for own, text in zip(drafts, self.texts)
        ]
        return torch.tensor(filled).to(device, non_blocking=True)

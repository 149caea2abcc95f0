"""What passes take, by what they took lately on a machine that may have other work to do."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

SLOPE = 0.03  # of a dense step, for each more token to verify, before that is measured
HICCUP = 2.0  # times what it should take, or half of it: believed if it is so again
UNSTRAINED = 48.0  # passes' worth, of the supposition that none takes longer than it should,
LATELY = 0.995  # and the weight that is left to a dense step after one more


@dataclass
class Times:
    """Seconds that passes of one shape took lately: the median of the newest few.

    Attributes:
        dense: of a dense step, with all that comes with it.
        draft: of one draft step.
        verify: of a round less its draft steps, by the number of tokens that it verified.
        looked_up: of a round whose drafts were looked up, which renews no selection, likewise.
        steps, strains: dense steps that were timed, and the sum of what each took in medians.
    """

    dense: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    draft: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    verify: dict[int, deque[float]] = field(default_factory=dict)
    looked_up: dict[int, deque[float]] = field(default_factory=dict)
    steps: float = UNSTRAINED
    strains: float = UNSTRAINED

    @property
    def strain(self) -> float:
        """How many times its median a dense step takes on average."""
        return self.strains / self.steps

    def strained(self, medians: float) -> None:
        """Count a dense step that took so many."""
        self.steps = UNSTRAINED + LATELY * (self.steps - UNSTRAINED) + 1
        self.strains = UNSTRAINED + LATELY * (self.strains - UNSTRAINED) + medians

    def verify_seconds(self, numbers: Sequence[int], looked_up: bool = False) -> list[float]:
        """Of rounds that verify so many tokens each.

        Args:
            looked_up: whether their drafts are. Until such rounds were timed, others tell.
        """
        dense = median(self.dense)
        kinds = (self.verify, self.looked_up) if looked_up else (self.verify,)
        # Copies: calls in other threads learn into the same.
        copies = {count: list(seconds) for kind in kinds for count, seconds in list(kind.items())}
        known = {count: median(seconds) for count, seconds in copies.items() if seconds}
        return [self._verify_seconds(tokens, dense, known) for tokens in numbers]

    @staticmethod
    def _verify_seconds(tokens: int, dense: float, known: Mapping[int, float]) -> float:
        """Measured, else by a line through the nearest two that are, else a guess."""
        if tokens in known:
            return known[tokens]
        near = sorted(known, key=lambda count: abs(count - tokens))[:2]
        if not near:
            return dense * (1 + SLOPE * tokens)
        slope = SLOPE * dense
        if len(near) == 2:
            slope = max(0.0, (known[near[0]] - known[near[1]]) / (near[0] - near[1]))
        return max(dense, known[near[0]] + slope * (tokens - near[0]))

    def forget_drafts(self) -> None:
        """Know nothing of rounds with drafts."""
        self.draft.clear()
        self.verify.clear()
        self.looked_up.clear()

    def slow_drafts(self, factor: float) -> None:
        """Take rounds with drafts to take so many times as long."""
        rounds = (*list(self.verify.values()), *list(self.looked_up.values()))
        for times in (self.draft, *rounds):
            slowed = [factor * seconds for seconds in list(times)]
            times.clear()
            times.extend(slowed)


class Round(NamedTuple):
    """What a round with drafts came to.

    Attributes:
        gamma: that it drafted.
        draft, rest: seconds of all draft steps, and of everything else.
        tokens: that a row got, on average.
        looked_up: whether its drafts were.
    """

    gamma: int
    draft: float
    rest: float
    tokens: float
    looked_up: bool = False


def odd(seconds: float, expected: float) -> bool:
    """Whether a pass took what none should."""
    return not expected / HICCUP <= seconds <= expected * HICCUP

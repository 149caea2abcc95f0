"""How many tokens a round drafts: `DraftLength` weighs it up from what passes took.

It goes by how many drafts agreed, too, and does without drafts where they lose. What a round
drafts never changes the tokens, only the time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from std_decode.cost import Device, Workload, expected_tokens

# The draft lengths that are tried. Each is a shape of its own to capture, and the best of these is
# never far behind the best of all.
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# Where each shape is compiled as well, which takes a minute or so, two have to do. The better one
# comes to 98% of the speed of the best of all on average, to 91% at worst: drafts at 0.1 to 0.7 of
# a dense step, 0.5 to 0.95 of them accepted, 1% of a dense step for each token more to verify.
COMPILED_LENGTHS = (2, 8)
SUPPOSED = 0.8  # acceptance, before anything was drafted,
SUPPOSED_DRAFTS = 6.0  # and how many drafts' worth that supposition is
MEMORY = 0.96  # weight that is left to a round's drafts after one more round,
STALE = 0.995  # and after a dense step: what is not seen is not known for long,
FAINT = 1e-6  # drafts' worth, of which no more is forgotten
SLOPE = 0.03  # of a dense step, for each more token to verify, before that is measured
WORTH = 1.04  # drafting has to gain this much
HOPED = 0.95  # acceptance at which it would have to, for a trial,
RISK = 0.02  # of the time so far may be lost by trying drafts out,
ONE_ROUND = 3.0  # or this many dense steps' worth, of which no answer is spared
HICCUP = 2.0  # times what it should take: something else went on, if it is not so again
CREDIT = 10.0  # dense steps' worth, of what drafts gained, that may be lost where the text changes
FEW = 3  # dense steps that have to be timed before anything is compared with them,
REFRESH = 48  # and rounds after which one is timed again
LOOK = 8  # dense steps from one weighing up to the next, while it comes to no drafts
FIRST = 16  # tokens before the first trial: right after a prompt all steps are slow
PAUSE = 64  # dense steps between two trials at first; twice as many after each


@dataclass
class Times:
    """Seconds that passes of one shape took lately: the median of the newest few.

    Attributes:
        dense: of a dense step, with all that comes with it.
        draft: of one draft step.
        verify: of a round less its draft steps, by the number of tokens that it verified.
    """

    dense: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    draft: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    verify: dict[int, deque[float]] = field(default_factory=dict)

    def verify_seconds(self, numbers: Sequence[int]) -> list[float]:
        """Of rounds that verify so many tokens each."""
        dense = median(self.dense)
        # A copy: calls in other threads learn into the same.
        known = {count: median(seconds) for count, seconds in list(self.verify.items())}
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


class FixedLength:
    """A policy that always drafts as many tokens, and the same for one generate call."""

    def __init__(self, gamma: int):
        self.most = self.gamma = gamma

    def begin(self, workload: Workload, rows: int, settle: Callable) -> FixedLength:
        return self

    def choose(self, rows: Sequence[int]) -> int:
        return self.gamma

    def observe(self, *measured: Any) -> None:
        pass

    def end(self) -> None:
        pass


class Policy:
    """What the draft lengths of a patched model's calls go by, kept from call to call.

    Args:
        lengths: that may be chosen, besides none.
    """

    def __init__(self, lengths: Sequence[int] = LENGTHS):
        self.lengths = tuple(lengths)
        self.most = max(lengths)
        self.times: dict[tuple[int, int], Times] = {}
        self.draft_times: dict[int, deque[float]] = {}
        self.acceptance = SUPPOSED

    def begin(
        self,
        workload: Workload,
        rows: int,
        settle: Callable[[int], int] = lambda gamma: gamma,
    ) -> DraftLength:
        """For one generate call.

        Args:
            workload: its decoding steps; before a draft step is measured, what a draft step
                reads of what a dense one does tells how long it takes.
            rows: that advance by their own acceptance; 1 where all advance by the smallest.
            settle: what is drafted where this process would draft so many; ranks that share a
                model have to do the same.
        """
        batch, context = workload.batch, workload.context.bit_length()
        times = self.times.setdefault((batch, context), Times())
        # A draft step takes as long after any prompt.
        times.draft = self.draft_times.setdefault(batch, times.draft)
        memory_bound = Device(1.0, float("inf"))
        ratio = workload.draft_seconds(memory_bound) / workload.dense_seconds(memory_bound)
        return DraftLength(self, times, rows, ratio, settle)


class DraftLength:
    """Chooses the draft length of each round of a generate call.

    The first few steps are dense, unless such steps have been timed before. Then each
    round drafts as many tokens as promise the most tokens a second, or none. Where drafts seem to
    lose they are tried again, rarely, as long as all such trials together cost little.
    """

    def __init__(
        self,
        policy: Policy,
        times: Times,
        rows: int,
        draft_ratio: float,
        settle: Callable[[int], int],
    ):
        self.policy, self.times, self.settle = policy, times, settle
        self.draft_ratio = draft_ratio
        self.agreed = [SUPPOSED_DRAFTS * policy.acceptance] * rows
        self.tried = [SUPPOSED_DRAFTS] * rows
        self.length = 0  # of the newest round
        self.since_dense = 0  # rounds
        self.steps = 0.0  # tokens a row has got,
        self.behind = 0.0  # and dense steps' worth of time that this took more than dense steps
        self.doubted = False  # the time of the newest round
        self.next_trial, self.pause = float(FIRST), float(PAUSE)
        self.trying = False
        self.next_look = 0.0

    def choose(self, rows: Sequence[int]) -> int:
        """Tokens to draft in the next round; `rows` are those that still need tokens."""
        self.trying = False
        measure = len(self.times.dense) < FEW or self.since_dense >= REFRESH
        if measure or self.steps < self.next_look:
            return self.settle(0)
        best = self._best(rows)
        if best == 0:  # little is learnt from a dense step, and to weigh up takes time
            self.next_look = self.steps + LOOK
        return self.settle(best)

    def _best(self, rows: Sequence[int]) -> int:
        dense = median(self.times.dense)
        lengths = self.policy.lengths
        cost = {g: s / dense for g, s in zip(lengths, self._seconds(lengths))}  # in dense steps
        worth = {g: self._tokens(g, rows) / cost[g] for g in cost}
        if self.length in worth:
            worth[self.length] *= WORTH  # do not waver
        allowed = max(RISK * self.steps, ONE_ROUND)
        # Of those that could be paid for if no draft agreed.
        worth = {g: w for g, w in worth.items() if self.behind + cost[g] - 1 <= allowed}
        best = max(worth, key=lambda g: worth[g], default=0)
        if best and worth[best] > WORTH:
            return best
        # Try again where it could pay if every draft agreed (nearly every one, where the time of a
        # draft is known), and costs little if none does.
        hoped = HOPED if self.times.draft else 1.0
        hopeful = [
            gamma
            for gamma in cost
            if expected_tokens(hoped, gamma) / cost[gamma] > WORTH
            and self.behind + cost[gamma] - 1 < allowed
        ]
        if self.steps < self.next_trial or not hopeful:
            return 0
        self.trying = True
        # The shortest tells as well how long a draft step takes, and costs least.
        return hopeful[-1 if self.times.draft else 0]

    def _draft(self) -> float:
        """Seconds of a draft step."""
        times = self.times
        if times.draft:
            return median(times.draft)
        return self.draft_ratio * median(times.dense) if times.dense else math.inf

    def _rest(self, gamma: int) -> float:
        """Seconds of what else a round with so many drafts takes; infinite if nothing is known."""
        times = self.times
        if not times.dense:
            return math.inf
        return times.verify_seconds([gamma + 1])[0] if gamma else median(times.dense)

    def _seconds(self, lengths: Sequence[int]) -> list[float]:
        """Of rounds that draft so many tokens each."""
        draft = self._draft()
        verify = self.times.verify_seconds([gamma + 1 for gamma in lengths])
        return [gamma * draft + seconds for gamma, seconds in zip(lengths, verify)]

    def _tokens(self, gamma: int, rows: Sequence[int]) -> float:
        """That a row may expect of a round, on average over `rows`."""
        chances = [self.agreed[row] / self.tried[row] for row in rows]
        return sum(expected_tokens(chance, gamma) for chance in chances) / len(chances)

    def observe(
        self,
        gamma: int,
        agreed: Mapping[int, int],
        draft: float,
        rest: float,
        tokens: float,
        first_use: bool = False,
    ) -> None:
        """Learn from a round.

        Args:
            gamma: what it drafted.
            agreed: by row, how many drafts agreed.
            draft, rest: seconds of all draft steps, and of everything else.
            tokens: that a row got, on average.
            first_use: whether something was compiled or captured in between, so that the seconds
                tell nothing of rounds to come.
        """
        self.length, self.since_dense = gamma, self.since_dense + 1
        times, expected = self.times, self._rest(gamma)
        # Capturing is for later rounds too, so what it took is not held against this one; nor is
        # what a machine with other things to do took, until it does so twice.
        self.doubted = not first_use and not self.doubted and rest > HICCUP * expected
        if first_use:
            draft = gamma and gamma * self._draft()
        if first_use or self.doubted:
            rest = expected
        elif gamma:
            times.verify.setdefault(gamma + 1, deque(maxlen=5)).append(rest)
        else:
            times.dense.append(rest)
        if gamma == 0:
            self.since_dense = 0
            keep = STALE if min(self.tried) > FAINT else 1.0
            self.agreed = [keep * x for x in self.agreed]
            self.tried = [keep * x for x in self.tried]
        else:
            if not first_use:
                times.draft.append(draft / gamma)
            for row, count in agreed.items():
                self.agreed[row] = MEMORY * self.agreed[row] + count
                # Drafts after the first that does not agree tell nothing.
                self.tried[row] = MEMORY * self.tried[row] + min(count + 1, gamma)
        self.steps += tokens
        if self.trying and not first_use:  # else again: nothing is known of its time yet
            self.next_trial = self.steps + self.pause
            self.pause *= 2
        if times.dense and rest < math.inf:
            lost = (draft + rest) / median(times.dense) - tokens
            self.behind = max(self.behind + lost, -CREDIT)

    def end(self) -> None:
        """Leave what was learnt of the acceptance to the next call."""
        self.policy.acceptance = sum(self.agreed) / sum(self.tried)

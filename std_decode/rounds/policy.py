"""How many tokens a round drafts, and from where: `DraftLength` weighs up what passes took.

It goes by how many drafts agreed, too, and does without drafts where they lose. What a round
drafts never changes the tokens, only the time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from std_decode.costs.times import UNSTRAINED, Round, Times, odd
from std_decode.costs.workload import Device, Workload, expected_tokens
from std_decode.rounds.lookup import Chances, Found
from std_decode.rounds.lookup_length import LOOKUP_LENGTHS, LookupLength

# The draft lengths that are tried. Each is a shape of its own to capture, and the best of these is
# never far behind the best of all.
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# Where a dense step fetches its weights, which may take as long as a hundred drafts.
OFFLOADED_LENGTHS = (*LENGTHS, 48, 63)
# Where each shape is compiled as well, which takes a minute or so, two have to do. By what is
# expected (costs/expected.py) of 7B models on H200, H100 and A100, batches of 1 to 32 and contexts
# of 25k to 131k, 0.5 to 0.95 of the drafts accepted, the better one comes to 98% of the speed of
# the best of all on average, to 88% at worst: no other pair does as well at worst, and none more
# than 0.2% better on average (tests/bench/test_roofline.py).
COMPILED_LENGTHS = (2, 8)
SUPPOSED = 0.8  # acceptance, before anything was drafted,
SUPPOSED_DRAFTS = 6.0  # and how many drafts' worth that supposition is
MEMORY = 0.96  # weight that is left to a round's drafts after one more round,
STALE = 0.995  # and after a dense step: what is not seen is not known for long,
FAINT = 1e-6  # drafts' worth, of which no more is forgotten
WORTH = 1.04  # drafting has to gain this much
HOPED = 0.95  # acceptance at which it would have to, for a trial,
RISK = 0.02  # of the time so far may be lost by trying drafts out,
ONE_ROUND = 3.0  # or this many dense steps' worth, of which only a short answer is spared
CREDIT = 10.0  # dense steps' worth, of what drafts gained, that may be lost where the text changes
FEW = 3  # dense steps that have to be timed before anything is compared with them,
REFRESH = 48  # and rounds after which one is timed again,
SOON = 6  # or where the newest few differ
ALIKE = 1.1  # by more than this factor, or all are of an earlier call;
CLEAR = 2.0  # but not so soon where drafts promise so many times as much as a dense step
LOOK = 8  # dense steps from one weighing up to the next, while it comes to no drafts
FIRST = 16  # tokens before the first trial: right after a prompt all steps are slow
PAUSE = 64  # dense steps between two trials at first; twice as many after each


@dataclass
class Agreed:
    """Drafts of the model's own over all calls: tried, and found to be right.

    Those after a row's first wrong one tell nothing and do not count.
    """

    right: int = 0
    tried: int = 0

    def observe(self, gamma: int, agreed: Mapping[int, int]) -> None:
        if gamma > 0:
            self.right += sum(agreed.values())
            self.tried += sum(min(count + 1, gamma) for count in agreed.values())


class FixedLength:
    """A policy that always drafts as many tokens, and the same for one generate call.

    Args:
        looks_up: whether they are looked up where every row finds some.
    """

    def __init__(self, gamma: int, looks_up: bool = False):
        self.most = self.most_looked_up = self.gamma = gamma
        self.lengths = (gamma,) if gamma else ()
        self.looks_up, self.chances, self.agreed = looks_up, Chances(), Agreed()

    def begin(self, *call: Any) -> FixedLength:
        return self

    def choose(self, rows: Sequence[int], found: Found | None = None) -> int:
        return -self.gamma if found is not None and found.everywhere else self.gamma

    def observe(self, gamma: int, agreed: Mapping[int, int], *measured: Any) -> None:
        self.agreed.observe(gamma, agreed)

    def end(self) -> None:
        pass


class Policy:
    """What the draft lengths of a patched model's calls go by, kept from call to call.

    Args:
        lengths: that may be chosen, besides none; () where the model is to draft nothing.
        lookup_lengths: those of looked-up drafts; () for no look-ups.
    """

    def __init__(
        self, lengths: Sequence[int] = LENGTHS, lookup_lengths: Sequence[int] = LOOKUP_LENGTHS
    ):
        self.lengths, self.lookup_lengths = tuple(lengths), tuple(lookup_lengths)
        self.most = max((*lengths, *lookup_lengths))
        self.chances = Chances()
        self.times: dict[tuple[int, int, int | None], Times] = {}
        self.draft_times: dict[int, deque[float]] = {}
        self.acceptance, self.agreed = SUPPOSED, Agreed()
        self.behind = 0.0  # dense steps' worth; negative: what calls left of what they may lose

    def begin(
        self,
        workload: Workload,
        rows: int,
        settle: Callable[[int], int] = lambda gamma: gamma,
        most: int | None = None,
        tokens: int | None = None,
    ) -> DraftLength:
        """For one generate call.

        Args:
            workload: its decoding steps; before a draft step is measured, what a draft step
                reads of what a dense one does tells how long it takes.
            rows: that advance by their own acceptance; 1 where all advance by the smallest.
            settle: what is drafted where this process would draft so many; ranks that share a
                model have to do the same.
            most: tokens that a pass of this call has room for; None: any.
            tokens: that a row gets at the most; None: any number.
        """
        batch, context = workload.batch, workload.context.bit_length()
        times = self.times.setdefault((batch, context, most), Times())
        # A draft step takes as long after any prompt.
        times.draft = self.draft_times.setdefault(batch, times.draft)
        memory_bound = Device(1.0, float("inf"))
        ratio = workload.draft_seconds(memory_bound) / workload.dense_seconds(memory_bound)
        lengths, lookup_lengths = (
            [gamma for gamma in all_lengths if most is None or gamma <= most]
            for all_lengths in (self.lengths, self.lookup_lengths)
        )
        lookup = LookupLength(times, lookup_lengths)
        one_round = ONE_ROUND if tokens is None else min(ONE_ROUND, RISK * tokens)
        return DraftLength(self, times, rows, ratio, settle, lengths, lookup, one_round)


class DraftLength:
    """Chooses the draft length of each round of a generate call.

    The first few steps are dense, unless such steps have been timed before. Then each
    round drafts as many tokens as promise the most tokens a second, or none. Where drafts seem to
    lose they are tried again, rarely, as long as all such trials together cost little. Where what
    was looked up promises more than either, that is what a round drafts.

    Other work on the machine slows passes, and not all kinds alike, so drafts are weighed against
    dense steps of about the same moment: some are timed in between, one at once after a round that
    took what none should.
    """

    def __init__(
        self,
        policy: Policy,
        times: Times,
        rows: int,
        draft_ratio: float,
        settle: Callable[[int], int],
        lengths: Sequence[int],
        lookup: LookupLength,
        one_round: float,
    ):
        self.policy, self.times, self.settle = policy, times, settle
        self.lengths, self.lookup = lengths, lookup  # that may be chosen, besides none
        self.looks_up, self.chances = bool(lookup.lengths), policy.chances.copy()
        self.most_looked_up = max(lookup.lengths, default=0)
        self.draft_ratio, self.one_round = draft_ratio, one_round
        self.agreed = [SUPPOSED_DRAFTS * policy.acceptance] * rows
        self.tried = [SUPPOSED_DRAFTS] * rows
        self.length = 0  # of the newest round, but for those that were looked up
        self.since_dense = 0  # rounds
        self.timed_here = not times.dense  # whether a dense step was; else one soon is
        self.steps = 0.0  # tokens a row has got,
        self.behind = policy.behind  # and dense steps' worth of time that it took more than those
        # What took too long or too short, to be believed if it is so again.
        self.doubted: Round | None = None
        self.doubted_dense: float | None = None
        # Dense steps' worth that was lost so, and rounds; each may take as much more on average.
        self.hiccups, self.rounds = 0.0, UNSTRAINED
        self.next_trial, self.pause = float(FIRST), float(PAUSE)
        self.trying = False
        self.next_look = 0.0
        self.measuring, self.promised = False, 1.0  # see `_draft_length`

    def choose(self, rows: Sequence[int], found: Found | None = None) -> int:
        """What to draft in the next round.

        Args:
            rows: that still need tokens.
            found: what these have looked up, if anything.

        Returns:
            How many tokens the model is to draft; negative: so many, of what was looked up.
        """
        gamma = self._draft_length(rows)
        if found is not None and not self.measuring and not self.trying:
            count, worth = self.lookup.best(
                found, self.steps, self.hiccups / self.rounds, self._payable(), self._risk()
            )
            if count and worth > WORTH * self.promised:
                # What is never drafted is never found to be better than was thought.
                self.trying = gamma > 0 and self.steps >= self.next_trial
                gamma = gamma if self.trying else -count
        return self.settle(gamma)

    def _draft_length(self, rows: Sequence[int]) -> int:
        """Tokens for the model to draft.

        Notes whether that is to time a dense step, and how many tokens it promises in the time of
        one.
        """
        promised, self.trying, self.promised = self.promised, False, 1.0
        newest = list(self.times.dense)[-FEW:]
        alike = len(newest) == FEW and max(newest) <= ALIKE * min(newest)
        known = self.timed_here and alike or promised >= CLEAR
        measure = len(newest) < FEW or self.since_dense >= (REFRESH if known else SOON)
        self.measuring = measure or self.doubted_dense is not None
        if self.measuring or self.steps < self.next_look:
            return 0
        best = self._best(rows)
        if best == 0:  # little is learnt from a dense step, and to weigh up takes time
            self.next_look = self.steps + LOOK
        return best

    def _risk(self) -> float:
        """Dense steps' worth that may be lost by trying drafts out."""
        return max(RISK * self.steps, self.one_round)

    def _payable(self) -> float:
        """Dense steps' worth that a round may take which could be paid for if no draft agreed."""
        return self._risk() - self.behind + 1

    def _best(self, rows: Sequence[int]) -> int:
        dense, lengths = median(self.times.dense), self._within_reach()
        hiccups = self.hiccups / self.rounds
        cost = {g: s / dense + hiccups for g, s in zip(lengths, self._seconds(lengths))}
        worth = {g: self._tokens(g, rows) / cost[g] for g in cost} | {0: 1.0}
        if self.length in worth:
            worth[self.length] *= WORTH  # do not waver
        paid = [g for g in lengths if cost[g] <= self._payable()]
        best = max((0, *paid), key=lambda g: worth[g])
        if best:
            self.promised = worth[best]
            return best
        if self.steps < self.next_trial or not paid:
            return 0
        # Try again: what could pay if nearly every draft agreed, or else the shortest, for drafts
        # may take less by now.
        self.trying = True
        hopeful = [g for g in paid if expected_tokens(HOPED, g) / cost[g] > WORTH]
        return hopeful[-1] if hopeful and self.times.draft else paid[0]

    def _within_reach(self) -> Sequence[int]:
        """Lengths that are no leap in the dark: to the square of the most tokens yet verified."""
        lengths, most = self.lengths, max(list(self.times.verify), default=1)
        if self.doubted is not None and all(self._odd(self.doubted)):
            return lengths[:1]  # it may take as much again
        return lengths[: 1 + sum(gamma < most**2 for gamma in lengths)]

    def _draft(self) -> float:
        """Seconds of a draft step."""
        if known := list(self.times.draft):
            return median(known)
        return self.draft_ratio * median(self.times.dense) if self.times.dense else math.inf

    def _rest(self, gamma: int) -> float:
        """Seconds of what else a round with so many drafts takes; infinite if nothing is known."""
        return self.times.verify_seconds([gamma + 1])[0] if self.times.dense else math.inf

    def _seconds(self, lengths: Sequence[int]) -> list[float]:
        """Of rounds that draft so many tokens each."""
        draft = self._draft()
        verify = self.times.verify_seconds([gamma + 1 for gamma in lengths])
        # What slows passes at random is in an average, of draft steps, but not in a median.
        draft /= self.times.strain
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
            gamma: what it drafted; negative where that was looked up.
            agreed: by row, how many drafts agreed.
            draft, rest: seconds of all draft steps, and of everything else.
            tokens: that a row got, on average.
            first_use: whether something was compiled or captured in between, so that the seconds
                tell nothing of rounds to come.
        """
        self.policy.agreed.observe(gamma, agreed)
        self.since_dense, self.steps = self.since_dense + 1, self.steps + tokens
        if gamma < 0:
            self._learn_looked_up(Round(-gamma, 0.0, rest, tokens, looked_up=True), first_use)
            return
        self.length = gamma
        if gamma == 0:
            self.since_dense = 0
            keep = STALE if min(self.tried) > FAINT else 1.0
            self.agreed = [keep * x for x in self.agreed]
            self.tried = [keep * x for x in self.tried]
            if not first_use:
                self.timed_here = True
                self._learn_dense(rest)
            return
        for row, count in agreed.items():
            self.agreed[row] = MEMORY * self.agreed[row] + count
            # Drafts after the first that does not agree tell nothing.
            self.tried[row] = MEMORY * self.tried[row] + min(count + 1, gamma)
        if first_use:
            # Capturing is for later rounds too, so what it took is not held against this one.
            self._bill(Round(gamma, gamma * self._draft(), self._rest(gamma), tokens))
            return
        self._learn(Round(gamma, draft, rest, tokens))
        if self.trying and self.doubted is None:  # else again: its time is not known yet
            self.next_trial = self.steps + self.pause
            self.pause *= 2

    def _learn_dense(self, seconds: float) -> None:
        times, before = self.times, self.doubted_dense
        self.doubted_dense = None
        if len(times.dense) < FEW:
            times.dense.append(seconds)
            return
        known = median(times.dense)
        if not odd(seconds, known):
            for each in (seconds, before):
                if each is not None:
                    times.strained(each / known)
            times.dense.append(seconds)
            # It is not the machine. Where no draft was timed before, one such round is enough.
            if self.doubted is not None and not times.draft and all(self._odd(self.doubted)):
                doubted, self.doubted = self.doubted, None
                self._time(doubted)
        elif before is None or (before > known) != (seconds > known):
            self.doubted_dense = seconds
        else:
            self._dense_changed(before, seconds)

    def _dense_changed(self, *seconds: float) -> None:
        times = self.times
        known = median(times.dense)
        times.dense = deque(seconds, times.dense.maxlen)
        # Where the machine is slower, drafts are taken to be so too until they are timed; where it
        # is faster, they may pay that did not.
        if median(seconds) > known:
            times.slow_drafts(median(seconds) / known)
        else:
            times.forget_drafts()
        if self.doubted is not None:
            doubted, self.doubted = self.doubted, None
            self._learn(doubted)
        if self.lookup.doubted is not None:
            doubted, self.lookup.doubted = self.lookup.doubted, None
            self._learn_looked_up(doubted)

    def _odd(self, round: Round) -> tuple[bool, bool]:
        """Whether its drafts, and what else it did, took what they should not.

        Both do where the machine has changed, one where something just got in between.
        """
        if not self.times.dense:
            return False, False
        draft = odd(round.draft, round.gamma * self._draft())
        return draft, odd(round.rest, self._rest(round.gamma))

    def _learn(self, round: Round) -> None:
        before, self.doubted = self.doubted, None
        draft, rest = self._odd(round)
        if not rest and not (draft and self.times.draft):
            if before is not None:
                self._got_in_between(before)
                self.times.draft.append(before.draft / before.gamma)
            self._time(round)
        elif before is not None:
            if draft and rest:
                self.times.forget_drafts()
            self._time(before)
            self._time(round)
        else:
            self.doubted = round
            stalled = rest and not draft and round.rest > self._rest(round.gamma)
            if not stalled:  # a dense step tells whether it is the machine
                self.since_dense = REFRESH

    def _learn_looked_up(self, round: Round, first_use: bool = False) -> None:
        lookup = self.lookup
        if not self.times.dense:
            return
        if first_use:
            self._bill(round._replace(rest=lookup.seconds([round.gamma])[0]))
            return
        slow = lookup.is_slow(round)
        before, lookup.doubted = lookup.doubted, None
        if slow and before is None:
            lookup.doubted = round
            self.since_dense = REFRESH  # a dense step tells whether it is the machine
            return
        if before is not None:
            believe = self._time if slow else self._got_in_between
            believe(before)
        self._time(round)

    def _got_in_between(self, round: Round) -> None:
        """Something else went on in that round, which may be so again."""
        lost = max(0.0, self._lost(round))
        self.hiccups += lost
        self.behind = max(self.behind, min(0.0, self.behind + lost))

    def _time(self, round: Round) -> None:
        if round.looked_up:
            self.lookup.time(round, self.steps)
            self._bill(round)
            return
        times = self.times
        times.draft.append(round.draft / round.gamma)
        times.verify.setdefault(round.gamma + 1, deque(maxlen=5)).append(round.rest)
        self._bill(round)

    def _lost(self, round: Round) -> float:
        """Dense steps' worth that it took more than dense steps."""
        cost = (round.draft + round.rest) / median(self.times.dense)
        return cost - round.tokens * self.times.strain

    def _bill(self, round: Round) -> None:
        if self.times.dense:
            lost = self._lost(round) + self.hiccups / self.rounds
            # Of what a stalled round took too long, no more is held against those to come.
            most = CREDIT + self._risk()
            self.behind = max(min(self.behind + lost, most), -CREDIT)
            if round.looked_up:
                self.lookup.behind = max(min(self.lookup.behind + lost, most), -CREDIT)
            self.rounds += 1

    def end(self) -> None:
        """Leave to the next call what was learnt of the acceptance, and what may be lost yet."""
        self.policy.acceptance = sum(self.agreed) / sum(self.tried)
        self.policy.chances = self.chances
        self.policy.behind = max(-CREDIT, min(0.0, self.behind - RISK * self.steps))

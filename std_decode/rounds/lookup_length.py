"""How many tokens a round looks up, where that pays more than what else it could do.

To look up costs nothing: what it is weighed against is the wider pass alone. How often look-ups
are right is learnt from every token (see lookup.py), so only what their rounds take has to be
tried out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

from std_decode.costs.times import HICCUP, SLOPE, Round, Times
from std_decode.rounds.lookup import Found

# The numbers of tokens that are looked up, besides those that a call has no room for. Each is a
# shape to capture, again where drafts of the model's own renew the selection and these do not.
LOOKUP_LENGTHS = (1, 3, 6, 12, 32)
COMPILED_LOOKUP_LENGTHS = (8,)  # where each shape is compiled as well
LEAST = 1.04  # tokens a dense step's time, for which it is worth while
FIRST, PAUSE = 16.0, 64.0  # tokens before the first trial, and between two at first
FEW = 3  # rounds of a length after which no more are tried
SHARE = 0.5  # of what may be lost by trying drafts out: look-ups leave some for others


class LookupLength:
    """Part of the `DraftLength` of a generate call.

    Attributes:
        behind: dense steps' worth of time that look-ups took more than dense steps.
        doubted: a round that took what none should, to be believed if the next one does too.
        trying: whether the newest answer was for finding out what such a round takes by now.
    """

    def __init__(self, times: Times, lengths: Sequence[int]):
        self.times, self.lengths = times, lengths
        self.behind = 0.0
        self.doubted: Round | None = None
        self.trying = False
        self.next_trial, self.pause = FIRST, PAUSE

    def best(
        self, found: Found, steps: float, hiccups: float, most: float, risk: float
    ) -> tuple[int, float]:
        """The best number of tokens to look up, 0 if none; and tokens in a dense step's time.

        Args:
            steps: tokens so far.
            hiccups: dense steps' worth that a round takes longer on average than it should.
            most, risk: dense steps' worth that a round may take, and that all drafts may lose.
        """
        self.trying = False
        if not self.lengths:
            return 0, 0.0
        tokens = found.expected(self.lengths[-1])
        if tokens[-1] <= LEAST:
            return 0, 0.0
        dense, reach = median(self.times.dense), self._within_reach()
        cost = {n: s / dense + hiccups for n, s in zip(reach, self.seconds(reach))}
        most = min(most, SHARE * risk - self.behind + 1)
        worth = {n: tokens[n] / cost[n] for n in reach if cost[n] <= most}
        best = max(worth, key=lambda n: worth[n], default=0)
        if best and worth[best] > LEAST:
            return best, worth[best]
        if steps < self.next_trial:
            return 0, 0.0
        # A round of the fewest that would pay if what little is known of them were a mistake.
        hoped = {n: tokens[n] / (1 + SLOPE * (n + 1) + hiccups) for n in worth if self._new(n)}
        fewest = next((n for n in hoped if hoped[n] > LEAST), 0)
        self.trying = fewest > 0
        return fewest, hoped.get(fewest, 0.0)

    def _new(self, count: int) -> bool:
        return len(self.times.looked_up.get(count + 1, ())) < FEW

    def seconds(self, lengths: Sequence[int]) -> list[float]:
        """Of rounds that look up so many tokens each."""
        return self.times.verify_seconds([n + 1 for n in lengths], looked_up=True)

    def _within_reach(self) -> Sequence[int]:
        """Those that are no leap in the dark, as of `DraftLength`."""
        if self.doubted is not None:
            return self.lengths[:1]
        timed = (*list(self.times.verify), *list(self.times.looked_up))
        most = max(timed, default=1)
        return self.lengths[: 1 + sum(n < most**2 for n in self.lengths)]

    def is_slow(self, round: Round) -> bool:
        """Whether it took what none should."""
        return round.rest > HICCUP * self.seconds([round.gamma])[0]

    def time(self, round: Round, steps: float) -> None:
        """Learn what it took."""
        newest = self.times.looked_up.setdefault(round.gamma + 1, deque(maxlen=5))
        newest.append(round.rest)
        if self.trying:
            self.next_trial, self.pause = steps + self.pause, 2 * self.pause

"""What drafting costs and gains, in bytes, seconds and tokens.

A decoding step waits for memory: it reads the weights once and the keys and values of every row.
A draft step reads the same weights (or fewer bytes of them) and a few keys; verification reads all
of it again, once for all drafts of the round. What comes of it depends on how many drafts agree.

`DraftLength` weighs the two round by round, from what passes took and how many drafts agreed, and
does without drafts where they lose. What a round drafts never changes the tokens, only the time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

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
ONE_ROUND = 2.0  # or this many dense steps' worth, of which no answer is spared
CREDIT = 10.0  # dense steps' worth, of what drafts gained, that may be lost where the text changes
FEW = 3  # dense steps that have to be timed before anything is compared with them,
REFRESH = 48  # and rounds after which one is timed again
LOOK = 8  # dense steps from one weighing up to the next, while it comes to no drafts
FIRST = 16  # tokens before the first trial: right after a prompt all steps are slow
PAUSE = 64  # dense steps between two trials at first; twice as many after each


@dataclass(frozen=True)
class Device:
    """What bounds a step: memory bandwidth in bytes/s and dense matrix throughput in FLOP/s."""

    bandwidth: float
    flops: float

    def seconds(self, bytes_moved: float, operations: float) -> float:
        return max(bytes_moved / self.bandwidth, operations / self.flops)


@dataclass(frozen=True)
class Workload:
    """One decoding step of a model, at one batch size and context length.

    Attributes:
        weight_bytes: what a dense step reads of the weights: the text decoder and the LM head.
        parameters: how many weights that are; each is multiplied once a token.
        kv_bytes: of one cached token, keys and values, all layers that attend to everything.
        batch: rows.
        context: cached tokens of a row.
        draft_keys: keys of a row that a draft step reads, per layer.
        draft_weight_bytes: what a draft step reads of the weights; None: the same as a dense one.
        window_bytes: keys and values of a row in all sliding-window layers, which drafts read too.
    """

    weight_bytes: float
    parameters: float
    kv_bytes: float
    batch: int
    context: int
    draft_keys: int
    draft_weight_bytes: float | None = None
    window_bytes: float = 0.0

    def dense_seconds(self, device: Device, tokens: int = 1) -> float:
        """A dense pass over `tokens` new tokens of each row: a plain step, or a verification."""
        cached = self.batch * (self.context * self.kv_bytes + self.window_bytes)
        return device.seconds(
            self.weight_bytes + cached, 2 * self.parameters * self.batch * tokens
        )

    def draft_seconds(self, device: Device) -> float:
        read = min(self.draft_keys, self.context) * self.kv_bytes + self.window_bytes
        weights = self.weight_bytes
        if self.draft_weight_bytes is not None:
            weights = self.draft_weight_bytes
        return device.seconds(weights + self.batch * read, 2 * self.parameters * self.batch)

    def round_seconds(self, device: Device, gamma: int) -> float:
        """`gamma` draft steps and the verification of all of them."""
        return gamma * self.draft_seconds(device) + self.dense_seconds(device, gamma + 1)


def expected_tokens(acceptance: float, gamma: int) -> float:
    """Tokens that a round of `gamma` drafts gives a row, the dense model's own one included.

    Args:
        acceptance: chance that a draft agrees, given that those before it did, 0 to 1.

    Source: Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023,
    equation 1.
    """
    if not 0 < acceptance < 1:
        return gamma * acceptance + 1.0
    # (1 - acceptance^(gamma + 1)) / (1 - acceptance), exact for acceptances close to 1 as well.
    return -math.expm1((gamma + 1) * math.log(acceptance)) / (1 - acceptance)


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
        best = max(worth, key=lambda g: worth[g])
        allowed = max(RISK * self.steps, ONE_ROUND)
        if worth[best] > WORTH and self.behind < allowed:
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
        return hopeful[-1]

    def _seconds(self, lengths: Sequence[int]) -> list[float]:
        """Of rounds that draft so many tokens each."""
        times = self.times
        draft = self.draft_ratio * median(times.dense)
        if times.draft:
            draft = median(times.draft)
        verify = times.verify_seconds([gamma + 1 for gamma in lengths])
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
        times = self.times
        if gamma == 0:
            self.since_dense = 0
            keep = STALE if min(self.tried) > FAINT else 1.0
            self.agreed = [keep * x for x in self.agreed]
            self.tried = [keep * x for x in self.tried]
            if not first_use:
                times.dense.append(rest)
        else:
            for row, count in agreed.items():
                self.agreed[row] = MEMORY * self.agreed[row] + count
                # Drafts after the first that does not agree tell nothing.
                self.tried[row] = MEMORY * self.tried[row] + min(count + 1, gamma)
            if not first_use:
                times.draft.append(draft / gamma)
                times.verify.setdefault(gamma + 1, deque(maxlen=5)).append(rest)
        self.steps += tokens
        if self.trying and not first_use:  # else again: nothing is known of its time yet
            self.next_trial = self.steps + self.pause
            self.pause *= 2
        if times.dense:
            dense, took = median(times.dense), draft + rest
            if first_use:  # capturing is for later rounds too, so what it took is not held against
                took = self._seconds([gamma])[0] if gamma else dense
            self.behind = max(self.behind + took / dense - tokens, -CREDIT)

    def end(self) -> None:
        """Leave what was learnt of the acceptance to the next call."""
        self.policy.acceptance = sum(self.agreed) / sum(self.tried)

"""Machines made up, with other work on them, for what draft_length="auto" makes of its times.

Time is in dense steps of the idle machine. A machine is, at any moment, in one state, which slows
each kind of pass by a factor, and each pass is slowed by chance besides.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from std_decode.rounds.policy import LENGTHS

Slowed = tuple[float, float, float]  # dense steps, draft steps, verifications: times as long
IDLE: Slowed = (1.0, 1.0, 1.0)


def log_normal(spread: float) -> Callable[[random.Random], float]:
    """Of mean 1, as all noises here."""
    return lambda chance: math.exp(chance.gauss(-spread * spread / 2, spread))


def pareto(tail: float, most: float = 50.0) -> Callable[[random.Random], float]:
    """Of a tail that falls by this power, cut at `most` times the least."""
    mean = (tail - most ** (1 - tail)) / (tail - 1)
    return lambda chance: min(most, chance.paretovariate(tail)) / mean


def bursts(rate: float, times: float) -> Callable[[random.Random], float]:
    """One pass of 1 / `rate` takes so many times as long."""
    mean = 1 + rate * (times - 1)
    return lambda chance: (times if chance.random() < rate else 1.0) / mean


def still(chance: random.Random) -> float:
    return 1.0


@dataclass(frozen=True)
class Load:
    """Other work on a machine.

    Attributes:
        states: that follow each other, again and again.
        stretch: that each lasts on average; 0: only the first.
        noise: on a dense step, and on what else a round takes;
        draft_noise: on a draft step, and on a verification; as `noise` if None.
    """

    states: tuple[Slowed, ...] = (IDLE,)
    stretch: float = 0.0
    noise: Callable[[random.Random], float] = still
    draft_noise: Callable[[random.Random], float] | None = None

    def stretches(self, chance: random.Random) -> Iterator[tuple[float, Slowed]]:
        for state in itertools.cycle(self.states):
            last = self.stretch * chance.uniform(0.5, 1.5) if self.stretch else math.inf
            yield last, state


class Machine:
    """Decodes a text by a policy's choices, under a load.

    Attributes:
        at: tokens of each row.
        tokens, worth: that a row has got on average, and the dense steps that the machine could
            have made meanwhile in the states that it was in, noise at its mean.
        ends: both after each round.
        chosen: draft lengths.
    """

    def __init__(
        self, draft: float, verify: tuple[float, float], load: Load, seed: int = 0, rows: int = 1
    ):
        self.draft, self.verify, self.load, self.rows = draft, verify, load, rows
        self.chance = random.Random(seed)
        self.stretches = load.stretches(self.chance)
        self.left, self.state = next(self.stretches)
        self.start()

    def start(self) -> None:
        """Another text."""
        self.at, self.tokens, self.worth = [0] * self.rows, 0.0, 0.0
        self.ends: list[tuple[float, float]] = []
        self.chosen: list[int] = []

    def after(self, tokens: int) -> float:
        """Dense steps that could have been made, for each token, once there are so many."""
        return next(worth / count for count, worth in self.ends if count >= tokens)

    def run(self, work: float, kind: int) -> float:
        """Seconds that a pass of so much work takes."""
        noise = self.load.noise
        if kind and self.load.draft_noise is not None:
            noise = self.load.draft_noise
        noisy, taken = noise(self.chance), 0.0
        while True:
            slowed = self.state[kind] * noisy
            part = min(work, self.left / slowed)
            taken += part * slowed
            self.worth += part * self.state[kind] / self.state[0]
            self.left -= part * slowed
            work -= part
            if work <= 1e-12:
                return taken
            self.left, self.state = next(self.stretches)

    def go(self, length: Any, acceptance: float, tokens: int) -> Machine:
        """On to so many tokens of each row, with drafts that agree by chance."""
        right = [
            [self.chance.random() < acceptance for _ in range(tokens + max(LENGTHS))]
            for _ in self.at
        ]
        one, more = self.verify
        while going := [row for row, at in enumerate(self.at) if at < tokens]:
            gamma = min(length.choose(going), tokens - min(self.at) - 1)
            agreed = {row: prefix(right[row], self.at[row], gamma) for row in going}
            drafting = sum(self.run(self.draft, 1) for _ in range(gamma))
            rest = self.run(one + more * gamma, 2) if gamma else self.run(1.0, 0)
            own = {row: min(count + 1, tokens - self.at[row]) for row, count in agreed.items()}
            length.observe(gamma, agreed, drafting, rest, sum(own.values()) / len(going))
            for row, count in own.items():
                self.at[row] += count
            self.tokens = sum(self.at) / len(self.at)
            self.ends.append((self.tokens, self.worth))
            self.chosen.append(gamma)
        return self


def prefix(right: list[bool], start: int, most: int) -> int:
    """How many are true from `start` on before one that is not, at most so many."""
    count = 0
    while count < most and right[start + count]:
        count += 1
    return count

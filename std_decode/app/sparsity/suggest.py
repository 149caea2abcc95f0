"""Which `top_k_keys` and `draft_length` the measurements speak for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from std_decode.app.sparsity.measure import SWEEP_DRAFT_LENGTH, DraftsPoint, KeysPoint
from std_decode.costs.workload import expected_tokens

ENOUGH = 0.95  # of the most tokens a round that any number of keys gives
LEAST_GAIN = 1.03  # less than this is what timing varies by
NEARLY = 0.98  # of the best speed that a shorter draft length needs to have


@dataclass(frozen=True)
class Suggestion:
    """Options for `patch`, the speed they promise, and one sentence why.

    Attributes:
        speedup: over dense decoding (`draft_length=0`), 1.0 where that is suggested.
    """

    top_k_keys: int
    draft_length: int
    speedup: float
    why: str


def suggest_keys(points: Sequence[KeysPoint]) -> int:
    """The fewest keys whose drafts give nearly the most tokens a round.

    Args:
        points: by ascending number of keys. The last one, which drafts with every key and so saves
            nothing, is left out where there are others.
    """
    points = points[:-1] or points
    tokens = {p.top_k_keys: expected_tokens(p.agreement, SWEEP_DRAFT_LENGTH) for p in points}
    most = max(tokens.values())
    return min(keys for keys, count in tokens.items() if count >= ENOUGH * most)


def speedups(points: Sequence[DraftsPoint]) -> dict[int, float]:
    """Speed over dense decoding by draft length, from 0 to the longest measured.

    Acceptance and the time of a round are as measured, in between interpolated.

    Args:
        points: by ascending draft length, the first of length 0, at least one more.
    """
    lengths = [p.draft_length for p in points]
    rounds = [p.round_seconds for p in points]
    drafted = [p for p in points if p.acceptance is not None]
    found = {0: 1.0}
    for gamma in range(1, lengths[-1] + 1):
        acceptance = 0.0
        if drafted:
            accepted = [p.acceptance or 0.0 for p in drafted]
            acceptance = np.interp(gamma, [p.draft_length for p in drafted], accepted)
        tokens = expected_tokens(float(acceptance), gamma)
        found[gamma] = float(tokens / np.interp(gamma, lengths, rounds) * rounds[0])
    return found


def suggest(keys: Sequence[KeysPoint], drafts: Sequence[DraftsPoint], chosen: int) -> Suggestion:
    """Weigh what was measured.

    Args:
        keys: one for each number of keys.
        drafts: with `chosen` keys, as `speedups` takes them.
        chosen: of `suggest_keys`.
    """
    gains = speedups(drafts)
    most = max(gain for g, gain in gains.items() if g)
    gamma = min(g for g, gain in gains.items() if g and gain >= NEARLY * most)
    agreement = next(p.agreement for p in keys if p.top_k_keys == chosen)
    step = next(p.draft_seconds for p in reversed(drafts)) / drafts[0].round_seconds
    seen = (
        f"With {chosen:,} keys {agreement:.0%} of the sparse model's next tokens are the dense "
        f"one's, a draft step takes {step:.2f} of a dense step's time"
    )
    if gains[gamma] < LEAST_GAIN:
        why = (
            f"Drafting does not pay here: {seen[0].lower()}{seen[1:]}, and the best draft length, "
            f"{gamma}, comes to {gains[gamma]:.2f}x the speed of dense decoding."
        )
        return Suggestion(chosen, 0, 1.0, why)
    why = f"{seen}, and {gamma} drafts a round come to {gains[gamma]:.2f}x dense decoding's speed."
    return Suggestion(chosen, gamma, gains[gamma], why)

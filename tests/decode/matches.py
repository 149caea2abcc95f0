"""Rows that have found something in their texts, without texts."""

from dataclasses import dataclass

from std_decode.rounds.lookup import NONE


@dataclass
class Match:
    """What `Found` asks of a row.

    Attributes:
        size: of the n-gram that it found, 0 if none.
        outcome: of the look-ups that led to what follows there.
    """

    size: int
    outcome: int = NONE

    def before(self, most):
        return [self.outcome] * most if self.size else []

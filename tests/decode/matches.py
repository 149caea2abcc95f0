"""Rows that have found something in their texts, without texts."""

from dataclasses import dataclass
from itertools import repeat

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

    def before(self):
        return repeat(self.outcome) if self.size else iter(())

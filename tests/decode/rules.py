"""What is kept of a prompt, stated once more in plain Python, one row at a time."""

from __future__ import annotations

from collections.abc import Sequence


def rules(
    visual: Sequence[bool], start: int = 0, most_text: int = 1024
) -> tuple[set[int], set[int], int]:
    """Positions that are always kept, those that compete, and how many last queries vote.

    Args:
        visual: whether each position holds a video or image token.
        start: the first position that is no padding.
        most_text: kept before the visual tokens, and after them.
    """
    valid = range(start, len(visual))
    shown = [n for n in valid if visual[n]]
    always = set(valid[:4])
    if shown:
        always |= set([n for n in valid if n < shown[0]][-most_text:])
        always |= set([n for n in valid if n > shown[-1]][-most_text:])
        observers = min(64, max(1, valid[-1] - shown[-1]))
    else:
        always |= set(valid[-64:])
        observers = min(64, len(valid))
    return always, set(valid) - always, observers

"""The one difference from the unpatched model's tokens that is no bug, and how it is told.

Feeding T tokens at once rounds differently from feeding them one by one. So a choice between two
tokens that are closer than `MARGIN` may fall either way, and after it the row's text may go on
differently. Nothing else may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import Tensor

MARGIN = 1e-4  # of log-probability (less log noise): below it float32 rounding may decide


def behind_best(scores: Tensor, noise: Tensor | None = None) -> Tensor:
    """How far behind its row's best each token was when one was chosen, ``[B, V]``.

    Args:
        scores: of the unpatched model, processed, ``[B, V]``.
        noise: the step's draws from Exp(1) when sampling, ``[B, V]``; ``torch.multinomial`` takes
            the largest of p / noise. None when the likeliest token is taken.
    """
    value = scores.log_softmax(dim=-1)
    if noise is not None:
        value = value - noise.log()
    return value.amax(dim=-1, keepdim=True) - value


def near_ties(
    expected: Tensor,
    got: Tensor,
    prompt: int,
    behind: Callable[[int], Tensor],
    *,
    ends: Collection[int] = (),
    pad: int | None = None,
) -> set[tuple[int, int]]:
    """Fail unless the tokens are those of the unpatched model, each row judged by itself.

    A row may go its own way from a step on at which the token it has instead was less than
    `MARGIN` behind the best; nothing after that step is compared. The batch may be longer or
    shorter only if such a row is there, and the other rows have only padding to gain or lose.

    Args:
        expected: prompt and what the unpatched model generated, ``[B, S + steps]``.
        got: the same of the patched one; it may have come to another number of steps.
        prompt: S.
        behind: see `behind_best`; given the step at which `expected` was chosen, from 0.
        ends: tokens that end a row.
        pad: what fills a row that has ended.

    Returns:
        The (row, step) at each of which rounding decided differently.
    """
    assert len(expected) == len(got), f"{len(got)} rows, expected {len(expected)}"
    width = min(expected.shape[1], got.shape[1])
    ties = set()
    for row, (right, found) in enumerate(zip(expected.tolist(), got.tolist())):
        ended = next((n for n in range(prompt, width) if right[n] in ends), width)
        column = next((n for n in range(width) if right[n] != found[n]), None)
        if column is None:
            rest = right[width:] + found[width:]
            assert not rest or (ended < width and set(rest) == {pad}), (
                f"lengths differ: {len(found)}, expected {len(right)}; row {row} did not end"
            )
            continue
        here = f"row {row}, step {column - prompt}: token {found[column]}, not {right[column]}"
        assert column >= prompt, f"{here}, in the prompt"
        assert column <= ended, f"{here}, after the row's end"
        lag = behind(column - prompt)[row]
        chosen, instead = float(lag[right[column]]), float(lag[found[column]])
        assert chosen < MARGIN, f"{here}: {right[column]} was not the choice, check the options"
        assert instead < MARGIN, f"{here}, which is behind by {instead:.2g}"
        ties.add((row, column - prompt))
    assert expected.shape[1] == got.shape[1] or ties, (
        f"lengths differ: {got.shape[1]}, expected {expected.shape[1]}"
    )
    return ties

"""Which 4-bit values, scale and zero stand for a group of weights.

From the range of a group on, by turns: the nearest values, and the scale and zero that are best
for these by least squares. Errors count by how large the weight's input is, squared. At last the
zeros of a row move so that its errors cancel out on the mean input, which least squares, group by
group, do not see.
"""

from __future__ import annotations

import torch
from torch import Tensor

REFITS = 2  # more gain little, and each takes as long as a third of all the rest
_LEAST = 1e-8  # of a scale, where all weights of a group are the same


def fit(
    groups: Tensor, importance: Tensor | None = None, mean: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Round groups of weights to ``(q - 8) * scale + zero``.

    Args:
        groups: float32 ``[N, groups, group]``, contiguous.
        importance: of each column, float32 ``[groups, group]``, positive, its mean about 1: the
            input's mean square; None: all count alike.
        mean: of each column's input, float32 ``[groups, group]``; None: 0.

    Returns:
        q, 0 to 15, uint8 like `groups`; scale and zero, bfloat16 ``[N, groups]``.
    """
    least, most = groups.amin(-1), groups.amax(-1)  # on a CPU aminmax takes ten times as long
    scale = ((most - least) / 15).clamp_(min=_LEAST)
    zero = least + 8 * scale
    # Means over a group are weighted by importance, whose sum over the group is 1 for that.
    share = 1 / groups.shape[-1] if importance is None else importance / importance.sum(-1, True)
    q, weighted, product = (torch.empty_like(groups) for _ in range(3))
    middle = torch.mul(groups, share, out=product).sum(-1)
    for _ in range(REFITS):
        _nearest(groups, scale, zero, q)
        mean_q = torch.mul(q, share, out=weighted).sum(-1)
        slope = torch.mul(weighted, groups, out=product).sum(-1) - mean_q * middle
        spread = torch.mul(weighted, q, out=product).sum(-1) - mean_q * mean_q
        known = (spread > 0) & (slope > 0)
        scale = torch.where(known, slope / spread, scale).clamp_(min=_LEAST)
        zero = middle - scale * mean_q
    # As the kernel is going to see them: rounding q afterwards makes up for theirs.
    scale, zero = scale.bfloat16(), zero.bfloat16()
    _nearest(groups, scale.float(), zero.float(), q)
    if importance is not None and mean is not None:
        told = (torch.mul(q, mean, out=product).sum(-1) * scale).sum(-1)
        error = groups.flatten(1) @ mean.flatten() - told - zero.float() @ mean.sum(-1)
        zero = (zero + error[:, None] * _step(importance, mean)).bfloat16()
    return q.add_(8).to(torch.int8).view(torch.uint8), scale, zero  # far quicker than to uint8


def _step(importance: Tensor, mean: Tensor) -> Tensor:
    """By how much the zeros ``[groups]`` of a row move for its error on the mean input.

    It is the move after which errors, weighted by the inputs' variances, one by one, plus the
    error on the mean input are least: ``variance * step^2 + (error - total @ step)^2``.
    """
    variance = (importance - mean * mean).clamp_(min=0).sum(-1)
    variance += 1e-6 * importance.sum(-1)
    total = mean.sum(-1)
    return total / variance / (1 + (total * total / variance).sum())


def _nearest(groups: Tensor, scale: Tensor, zero: Tensor, out: Tensor) -> None:
    torch.sub(groups, zero[..., None], out=out)
    out.mul_((1 / scale)[..., None]).round_().clamp_(-8, 7)

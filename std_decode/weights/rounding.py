"""Which 4-bit values, scale and zero stand for a group of weights.

From the range of a group on, by turns: the nearest values, and the scale and zero that are best
for these by least squares. Errors count by how large the weight's input is, squared.
"""

from __future__ import annotations

import torch
from torch import Tensor

REFITS = 2  # more gain little, and each takes as long as half of all the rest
_LEAST = 1e-8  # of a scale, where all weights of a group are the same


def fit(groups: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Round groups of weights to ``(q - 8) * scale + zero``.

    Args:
        groups: float32 ``[N, groups, group]``, contiguous.
        importance: of each column, float32 ``[groups, group]``, positive, its mean about 1; None:
            all count alike.

    Returns:
        q, 0 to 15, uint8 like `groups`; scale and zero, bfloat16 ``[N, groups]``.
    """
    least, most = groups.aminmax(dim=-1)
    scale = ((most - least) / 15).clamp_(min=_LEAST)
    zero = least + 8 * scale
    # Means over a group are weighted by importance, whose sum over the group is 1 for that.
    share = None if importance is None else importance / importance.sum(-1, keepdim=True)
    q, weighted = torch.empty_like(groups), torch.empty_like(groups)
    mean = _mean(groups, share, weighted)
    for _ in range(REFITS):
        _nearest(groups, scale, zero, q).clamp_(-8, 7)
        mean_q = _mean(q, share, weighted)
        if share is None:
            torch.mul(q, 1 / q.shape[-1], out=weighted)
        slope = _dot(weighted, groups) - mean_q * mean
        spread = _dot(weighted, q) - mean_q * mean_q
        known = (spread > 0) & (slope > 0)
        scale = torch.where(known, slope / spread, scale).clamp_(min=_LEAST)
        zero = mean - scale * mean_q
    # As the kernel is going to see them: rounding q afterwards makes up for theirs.
    scale, zero = scale.bfloat16(), zero.bfloat16()
    q = _nearest(groups, scale.float(), zero.float(), q).add_(8).clamp_(0, 15)
    return q.to(torch.uint8), scale, zero


def _nearest(groups: Tensor, scale: Tensor, zero: Tensor, out: Tensor) -> Tensor:
    torch.sub(groups, zero[..., None], out=out)
    return out.mul_((1 / scale)[..., None]).round_()


def _mean(values: Tensor, share: Tensor | None, out: Tensor) -> Tensor:
    """Over each group; what it adds up is left in `out` where shares are given."""
    if share is None:
        return values.mean(-1)
    return torch.mul(values, share, out=out).sum(-1)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    group = one.shape[-1]
    return torch.bmm(one.view(-1, 1, group), other.view(-1, group, 1)).view(one.shape[:-1])

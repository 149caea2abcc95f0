"""Attention of several tokens as plain decoding has it: each alone, by the model's own function.

What a token's attention adds up to depends, in the last bits, on how many queries the function is
given at once. So each query gets a call of its own, of the very shape and with the very mask that
the unpatched model would give it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface

from std_kernels import score_keys

if TYPE_CHECKING:
    from std_decode.model.attention import Attending, Result


def each_alone(attending: Attending, lengths: list[int]) -> Result:
    """A pass's attention in one layer, on the CPU.

    Args:
        lengths: of each row before the pass.
    """
    layer, query, cache = attending.layer, attending.query, attending.running.cache
    batch, count = len(query), query.shape[2]
    if attending.scored:
        kv_len, kv_start = cache.span.kv_len, cache.kv_start
        layer.weigh(
            score_keys(query, attending.key, kv_len, kv_start=kv_start, **attending.options)
        )
    alike = len(set(lengths)) == 1
    parts = [slice(0, batch)] if alike else [slice(row, row + 1) for row in range(batch)]
    outs = []
    for rows in parts:
        length = lengths[rows.start] + 1
        outs.append(_joined([_one(attending, rows, t, length + t) for t in range(count)], 1))
    return _joined(outs, 0), None


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """Without the copy that torch.cat makes of one, as every dense step has it."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _one(attending: Attending, rows: slice, token: int, length: int) -> Tensor:
    """``[rows, 1, Hq, D]``, of a token that is the `length`-th of its row."""
    first = attending.first_seen(length)
    result = attending.dense(
        attending.module,
        attending.query[rows, :, token : token + 1],
        attending.key[rows, :, first:length],
        attending.value[rows, :, first:length],
        _mask(attending, rows, first, length),
        **attending.given,
    )
    return result[0]


def _mask(attending: Attending, rows: slice, first: int, length: int) -> Any:
    """That of the rows, made for the whole batch: whether there is one is a matter of all rows."""
    running, window = attending.running, attending.layer.window
    if (window, length) not in running.masks:
        asked, kv_start = running.asked.get(window), running.cache.kv_start
        mask = None
        if asked is not None:
            padding = None
            if kv_start is not None:
                padding = torch.arange(length, device=kv_start.device) >= kv_start[:, None]
            here = dict(q_length=1, kv_length=length - first, q_offset=length - 1, kv_offset=first)
            mask = AttentionMaskInterface._global_mapping[attending.replaced](
                **{**asked, "attention_mask": padding, **here}
            )
        running.masks[window, length] = mask
    mask = running.masks[window, length]
    return mask if mask is None or len(mask) == 1 else mask[rows]

"""Dense attention of one row on the CPU where no bits are promised: K and V are read once.

The query heads of a KV head are queries of one product, whatever the number of tokens. What a
layer takes in microseconds, float32, two threads of an AMD EPYC: this, `verify_attention`, whose
bits depend neither on T nor on what else is there, and both with scores.

    Hq, Hkv, D     keys     T    plain          with scores
    9, 3, 64      1,100     5     173,    323     208,    513
    9, 3, 64      8,100     5   2,059,  1,888   2,103,  2,832
    28, 4, 128    4,100     5   4,424,  5,070   5,425,  6,941
    28, 4, 128   16,100     5  18,725, 17,314  16,152, 26,340
    8, 8, 32     16,500     5   3,517,  3,846   4,472,  6,503

A token alone takes 0.47, 1.8 and 8.5 ms in a 7B's layer (Hq 28, Hkv 4, D 128) at 1,000, 4,000 and
16,000 keys; told of the groups, `scaled_dot_product_attention` reads K and V for each query head
and takes 0.64, 3.4 and 37 ms.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from std_decode.model.attention import Attending

# What one call is told of which token sees which key, and what scores are made of, at most: 4 MiB
# in float32, and twice 32. Beyond, `verify_attention` is as quick, or takes less memory.
MOST_BIASES = 1 << 20
MOST_LOGITS = 1 << 23


def fits(attending: Attending) -> bool:
    """Whether a layer's attention in this pass can be had so."""
    length, query = attending.running.one_read, attending.query
    # The lengths are on the CPU; a layer of a model on several devices need not be.
    if length is None or query.device.type != "cpu" or not attending.is_plain:
        return False
    heads, count = query.shape[1:3]
    seen = length + count - attending.first_seen(length + 1)
    if attending.scored:
        return query.dtype == torch.float32 and heads * count * seen <= MOST_LOGITS
    return count == 1 or heads // attending.key.shape[1] * count * seen <= MOST_BIASES


def attend(attending: Attending) -> Tensor:
    """Attention of the T newest tokens, ``[1, T, Hq, D]``."""
    query, length = attending.query, attending.running.one_read
    assert length is not None
    seen = slice(attending.first_seen(length + 1), length + query.shape[2])
    rows = query.reshape(1, attending.key.shape[1], -1, query.shape[-1])
    out = (_with_scores if attending.scored else _plain)(attending, rows, seen)
    return out.reshape(query.shape).transpose(1, 2).contiguous()


def _plain(attending: Attending, rows: Tensor, seen: slice) -> Tensor:
    """Of the queries ``[1, Hkv, Hq / Hkv * T, D]`` of each KV head."""
    return nn.functional.scaled_dot_product_attention(
        rows,
        attending.key[:, :, seen],
        attending.value[:, :, seen],
        attn_mask=_bias(attending, seen) if attending.query.shape[2] > 1 else None,
        scale=attending.given.get("scaling"),
    )


def _bias(attending: Attending, seen: slice) -> Tensor:
    """0 where a query of a KV head sees a key, else -inf, ``[Hq / Hkv * T, keys]``."""
    query, window, made = attending.query, attending.layer.window, attending.running.biases
    keys, groups = seen.stop - seen.start, query.shape[1] // attending.key.shape[1]
    key = groups, keys, window, query.dtype
    if key not in made:
        bias = _later(query, keys)
        if window is not None:
            bias += torch.full_like(bias, -math.inf).tril(keys - len(bias) - window)
        made[key] = bias.repeat(groups, 1)
    return made[key]


def _later(query: Tensor, keys: int) -> Tensor:
    """-inf where one of the last keys comes after a token, ``[T, keys]``."""
    count = query.shape[2]
    return query.new_full((count, keys), -math.inf).triu(keys - count + 1)


def _with_scores(attending: Attending, rows: Tensor, seen: slice) -> Tensor:
    """The same, and for each key the scores of `std_kernels.verify_attention_with_scores`."""
    query, layer = attending.query, attending.layer
    scale = attending.given.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (rows * scale) @ attending.key[:, :, seen].transpose(2, 3)
    count = query.shape[2]
    own = logits.view(*query.shape[:3], -1)[..., -count:]
    own += _later(query, count)
    # +inf switches a row off. The finite floor keeps a masked logit less it at -inf, not NaN.
    cut = layer.lse_estimate()
    cut = cut.nan_to_num(nan=math.inf, posinf=math.inf, neginf=torch.finfo(cut.dtype).min)
    share = (logits - cut.reshape(*rows.shape[:3], 1)).sigmoid_()
    layer.scores[..., seen.stop :] = 0.0
    torch.sum(share, 2, out=layer.scores[..., seen])
    del share
    return logits.softmax(-1) @ attending.value[:, :, seen]

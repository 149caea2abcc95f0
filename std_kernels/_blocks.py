"""Attention of rows to keys, each row with the same bits whatever rows come with it.

Softmax is taken row by row. A matrix product is not: libraries choose the order in which they add
by the sizes, the number of rows among them. MKL and oneDNN have one order for 1, one for 2 or 3,
and one for all numbers of rows from 4 on; in it a float32 sum is a single chain of fused
multiply-adds. So rows are padded to 4 at least, and `_one_order` sees once in a process whether
that is enough on this machine. Where it is not, each token's G rows have a product of their own,
padded likewise: with fewer rows MKL's order depends on where in memory the result lies.

A product that a library spreads over threads may add differently again, so no call has only one:
then it is never spread.
"""

from functools import lru_cache

import torch
from torch import Tensor

from std_kernels._packed import INF

_FEWEST, _MOST = 4, 32  # rows in a product; the fused kernel takes up to 32 at a time
_ROWS = 128  # rows in a call; from 192 on it would take 64
_CHUNK = 2048  # keys at a time with a soft cap
Parts = list[tuple[Tensor, Tensor]]


def attend_rows(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    T: int,
    scale: float,
    softcap: float | None,
) -> Parts:
    """Attention of rows [BH, 1, G * T, D] to keys [BH, H, n, D], n > 0, each of the H apart.

    Args:
        bias: [T, n], or None.

    Returns:
        H parts to be merged, each out [BH, 1, G * T, D] and lse [BH, 1, G * T] float32.
    """
    H, R = keys.shape[1], rows.shape[2]
    fused = softcap is None and rows.device.type == "cpu"
    if not _one_order(rows.dtype if fused else torch.float32, rows.shape[3], fused):
        given = rows.unflatten(2, (-1, T)).squeeze(1).transpose(1, 2)
        bias = None if bias is None else bias.view(1, T, 1, -1)
        parts = []
        for k, v in zip(keys.split(1, 1), values.split(1, 1)):
            out, lse = _attend_padded(given, k, v, bias, scale, softcap)
            out, lse = out.transpose(1, 2), lse.transpose(1, 2)
            parts.append((out.reshape(rows.shape), lse.reshape(rows.shape[:3])))
        return parts
    if bias is not None:
        bias = (
            bias.expand(R // T, -1, -1).reshape(1, 1, R, -1) if T > 1 else bias.view(1, 1, 1, -1)
        )
    if H > 1:
        rows = rows.expand(-1, H, -1, -1)
    if R <= _ROWS:
        out, lse = _attend_padded(rows, keys, values, bias, scale, softcap)
    else:
        pieces = []
        for r in range(0, R, _ROWS):
            part = bias if bias is None or T == 1 else bias[:, :, r : r + _ROWS]
            given = rows[:, :, r : r + _ROWS]
            pieces.append(_attend_padded(given, keys, values, part, scale, softcap))
        out, lse = (torch.cat(x, 2) for x in zip(*pieces))
    return [(out, lse)] if H == 1 else list(zip(out.split(1, 1), lse.split(1, 1)))


def _attend_padded(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """`_attend`, padded so that no product has less than _FEWEST rows."""
    R = rows.shape[2]
    rest = R % _MOST
    if not 0 < rest < _FEWEST:
        return _attend(rows, keys, values, bias, scale, softcap)
    more = (0, 0, 0, _FEWEST - rest)
    if bias is not None and bias.shape[2] > 1:
        bias = torch.constant_pad_nd(bias, more)
    out, lse = _attend(torch.constant_pad_nd(rows, more), keys, values, bias, scale, softcap)
    return out[:, :, :R], lse[:, :, :R]


def _attend(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Rows [BH, X, R, D], their products as they come: of R rows, or of _MOST and the rest."""
    alone = rows.shape[0] == rows.shape[1] == 1
    if alone:
        rows = rows.expand(-1, 2, -1, -1)
    if keys.shape[1] != rows.shape[1]:
        keys, values = (x.expand(-1, rows.shape[1], -1, -1) for x in (keys, values))
    if softcap is None and rows.device.type == "cpu":
        # In half precision the kernel may repack keys, by a rule that counts rows and threads,
        # when it sees 4 heads or more. So the heads are its batch, and X (1 or 2) its heads.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
            rows, keys, values, 0.0, False, attn_mask=bias, scale=scale
        )
    else:
        out, lse = _attend_in_chunks(rows, keys, values, bias, scale, softcap)
    return (out[:, :1], lse[:, :1]) if alone else (out, lse)


def _attend_in_chunks(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """What the fused kernel does, for logits that pass through a soft cap, and on any device."""
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for block in (rows.float() * scale).split(_MOST, 2):
        best = block.new_full((*block.shape[:3], 1), -INF)
        total, out = torch.zeros_like(best), torch.zeros_like(block)
        for start in range(0, keys.shape[2], _CHUNK):
            part = slice(start, start + _CHUNK)
            k, v = keys[:, :, part].float(), values[:, :, part].float()
            logit = torch.matmul(block, k.transpose(-1, -2))
            if softcap is not None:
                logit.div_(softcap).tanh_().mul_(softcap)
            if bias is not None:
                logit += bias[:, :, len(outs) * _MOST :][:, :, : block.shape[2], part]
            newest = torch.maximum(best, logit.amax(-1, keepdim=True))
            weights = logit.sub_(newest).exp_()
            fade = (best - newest).exp_()
            total = total.mul_(fade).add_(weights.sum(-1, keepdim=True))
            out = out.mul_(fade).add_(torch.matmul(weights, v))
            best = newest
        outs.append(out.div_(total).to(rows.dtype))
        lses.append((best + total.log_()).squeeze(-1))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def merge(parts: Parts, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Out and lse of parts that share rows, and of a sink's logit that carries no value.

    Of exp, log and tanh PyTorch computes each number alike wherever in a tensor it stands, of
    exp2, sigmoid and logaddexp not.
    """
    if len(parts) == 1 and sink is None:
        return parts[0]
    lses = [lse for _, lse in parts]
    if sink is not None:
        lses.append(sink.expand_as(lses[0]))
    best = lses[0]
    for lse in lses[1:]:
        best = torch.maximum(best, lse)
    shares = [(lse - best).exp_() for lse in lses]
    total = shares[0]
    for share in shares[1:]:
        total = total + share
    out = parts[0][0] * shares[0].div_(total)[..., None]
    for (more, _), share in zip(parts[1:], shares[1:]):
        out += more * share.div_(total)[..., None]
    return out, total.log_().add_(best)


@lru_cache(maxsize=64)
def _one_order(dtype: torch.dtype, D: int, fused: bool) -> bool:
    """Whether a row has the same bits in a product of any number of rows from 4 to 32.

    The order of adding depends on sizes, not on numbers, so one set of numbers tells: logits and
    values of which large ones cancel, where every order leaves a rest of its own.
    """
    # Keys on both sides of the kernel's 512, the second of its blocks a short one.
    half, n = D // 2, 320
    draw = torch.Generator().manual_seed(D)
    sizes = (_MOST, half), (n, half), (n, D)
    x, k, v = (torch.randn(2, 1, *size, generator=draw, dtype=torch.float32) for size in sizes)
    turn, order = (torch.randperm(size, generator=draw) for size in (half, n))
    rows, k = torch.cat((50 * x, 50 * x[..., turn]), -1), torch.cat((k, -k[..., turn]), -1)
    keys, values = torch.cat((k, k[:, :, order]), 2), torch.cat((v, -v[:, :, order]), 2)
    rows, keys, values = (x.to(dtype) for x in (rows, keys, values))
    softcap = None if fused else 50.0

    def same(count: int, first: int) -> bool:
        """Whether `count` rows from `first` on have the bits that they have 4 at a time."""
        part = slice(first, first + count)
        found = _attend(rows[:, :, part], keys, values, None, 1.0, softcap)
        return all(torch.equal(x, y[:, :, part]) for x, y in zip(found, wanted))

    fours = [_attend(x, keys, values, None, 1.0, softcap) for x in rows.split(_FEWEST, 2)]
    wanted = [torch.cat(x, 2) for x in zip(*fours)]
    return all(
        same(count, first) for count in range(_FEWEST, _MOST + 1) for first in {0, _MOST - count}
    )

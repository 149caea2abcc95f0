"""Attention of GQA-packed rows: what the CPU ops share.

Rows are [B, Hkv, R, D], the R = G * T query rows of a KV head under one another, so that each K/V
is read once for all of them and never copied per query head.
"""

import math
import threading
from functools import lru_cache

import torch
from torch import Tensor

# 2 MiB of logits stay in a cache: W = 64 scoring queries of 8 heads over 16384 keys take 16 ms on
# two cores, 20 to 23 ms in chunks of 2^18 or 2^20.
MAX_LOGITS = 1 << 19
INF = float("inf")


def attend(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention of packed rows [B, Hkv, R, D] to at least one key: out and lse [B, Hkv, R]."""
    if softcap is None and rows.device.type == "cpu":
        # Against matmul and softmax, one thread, Hq 8, Hkv 2, D 32, T 1: 20 and 34 us at N 512,
        # 370 and 450 us at N 16384 in float32; and the logits of half inputs stay in float32.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
            rows, keys, values, 0.0, False, attn_mask=bias, scale=scale
        )
    keys, values, outs, lses = keys.float(), values.float(), [], []
    step = max(1, MAX_LOGITS // max(1, keys.shape[:3].numel()))
    for r in range(0, rows.shape[2], step):
        block = logits(rows[:, :, r : r + step].float(), keys, scale, softcap)
        if bias is not None:
            block += bias[..., r : r + step, :]
        lse = block.logsumexp(-1, keepdim=True)
        outs.append(torch.matmul(block.sub_(lse).exp_(), values).to(rows.dtype))
        lses.append(lse.squeeze(-1))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def logits(rows: Tensor, keys: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Float32 logits of float32 rows, whatever the keys' dtype: half ones would round them."""
    product = torch.matmul(rows * scale, keys.float().transpose(-1, -2))
    return product if softcap is None else product.div_(softcap).tanh_().mul_(softcap)


def ranges(
    kv_len: Tensor, kv_start: Tensor | None, T: int, window: int | None
) -> list[tuple[int, int]]:
    """First key any query of the row sees and one past the last; high <= low if none."""
    highs = kv_len.tolist()
    lows = [0] * len(highs) if kv_start is None else kv_start.tolist()
    if window is not None:
        lows = [max(low, high - T - window + 1) for low, high in zip(lows, highs, strict=True)]
    return list(zip(lows, highs, strict=True))


def out_like(query: Tensor) -> Tensor:
    """Room for an output [B, Hq, T, D] that lies in memory as [B, T, Hq, D].

    That is how a model wants it back: transposed again it is contiguous, without a copy.
    """
    B, Hq, T, D = query.shape
    return query.new_empty((B, T, Hq, D)).transpose(1, 2)


def laid_out(out: Tensor) -> Tensor:
    """An output [B, Hq, T, D] as it lies in memory for `out_like`; no copy at T = 1."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def unpack(query: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Packed results in the caller's shape, with the sinks' share taken out of the values."""
    out = laid_out(out.reshape(query.shape))
    lse = lse.reshape(query.shape[:3]).contiguous()
    if sinks is None:
        return out, lse
    sink = sinks[:, None]
    # NaN only where neither keys nor sink weigh anything, and there out is already 0.
    share = torch.sigmoid(lse - sink).nan_to_num_(0.0)
    return (out * share[..., None]).to(out.dtype), torch.logaddexp(lse, sink)


def nothing_seen(query: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output 0, and the lse of no logit but the sink's."""
    lse = query.new_full(query.shape[:3], -INF, dtype=torch.float32)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks[:, None])
    return out_like(query).zero_(), lse


def gather(
    key: Tensor, value: Tensor, slots: Tensor, empty: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows `slots` [B, Hkv, S] of key and of value, [B, Hkv, S, D] each, zero where empty.

    On the CPU they are there until this thread gathers others.
    """
    if empty is not None:
        slots = slots.masked_fill(empty, 0)
    row = _storage_rows(key, slots)
    keys = _take(key, row, "keys")
    if value.stride() != key.stride():
        row = _storage_rows(value, slots)
    values = _take(value, row, "values")
    if empty is not None:
        # An empty slot took position 0, which may be padding and hold NaN.
        keys.masked_fill_(empty[..., None], 0)
        values.masked_fill_(empty[..., None], 0)
    return keys, values


def gather_with_tail(
    key: Tensor, value: Tensor, indices: Tensor, tail: slice
) -> tuple[Tensor, Tensor]:
    """Rows `indices` [B, Hkv, K] and `tail` behind them, of key and value, [B, Hkv, S, D] each."""
    # Put the slots together, not the rows: these are copied once.
    more = torch.arange(tail.start, tail.stop, dtype=indices.dtype, device=indices.device)
    slots = torch.cat((indices, more.expand(*indices.shape[:2], -1)), 2)
    return gather(key, value, slots, None)


def _row_unit(source: Tensor) -> int:
    """Elements between two rows of D when the storage is seen as one long list of rows."""
    return max(1, math.gcd(*source.stride()[:3]))


def _storage_rows(source: Tensor, slots: Tensor) -> Tensor:
    """Where in that list the positions `slots` [B, Hkv, S] stand."""
    unit = _row_unit(source)
    B, Hkv = source.shape[:2]
    stride_b, stride_h, stride_n = (stride // unit for stride in source.stride()[:3])
    heads = _head_offsets(B, Hkv, stride_b, stride_h, slots.device)
    return torch.add(heads, slots, alpha=stride_n)


@lru_cache(maxsize=64)
def _head_offsets(B: int, Hkv: int, stride_b: int, stride_h: int, device: torch.device) -> Tensor:
    heads = [b * stride_b + h * stride_h for b in range(B) for h in range(Hkv)]
    return torch.tensor(heads, dtype=torch.int64, device=device).view(B, Hkv, 1)


class _Scratch(threading.local):
    """Memory of this thread for gathered rows, up to `_MOST_HELD` bytes for keys, and for values.

    The system gives a large new tensor new pages, which costs more than to fill them: a draft step
    of 30 layers (Hkv 3, K 1024, D 64, float32, one thread) took 741 page faults a layer and 45 ms
    of system time.
    """

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype], Tensor] = {}

    def rows(self, name: str, like: Tensor, count: int) -> Tensor | None:
        """Room for so many rows of D, ``[count, D]``; None where they are too many."""
        size = count * like.shape[-1]
        if size * like.element_size() > _MOST_HELD:
            return None
        held = self.held.get((name, like.dtype))
        if held is None or held.numel() < size:
            with torch.inference_mode(False):  # else nothing could be written to it outside
                held = torch.empty(size * 5 // 4, dtype=like.dtype)  # a tail grows step by step
            self.held[(name, like.dtype)] = held
        return held[:size].view(count, like.shape[-1])


_MOST_HELD = 1 << 26
_scratch = _Scratch()


def _take(source: Tensor, row: Tensor, name: str) -> Tensor:
    """One index_select over the storage seen as rows, whatever the layout of the cache.

    At Hkv 4, K 1024, D 128 in float32 on one core it takes 63 us, advanced indexing 250 us and
    gather 660 us.
    """
    unit = _row_unit(source)
    last = sum((size - 1) * step for size, step in zip(source.shape, source.stride(), strict=True))
    size = ((last - source.shape[-1] + 1) // unit + 1, source.shape[-1])
    storage = source.as_strided(size, (unit, 1), source.storage_offset())
    room = _scratch.rows(name, source, row.numel()) if source.device.type == "cpu" else None
    taken = torch.index_select(storage, 0, row.flatten(), out=room)
    return taken.view(*row.shape, source.shape[-1])

"""One decoder layer's share of the KV cache: its buffers, and what its drafts are to read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

if TYPE_CHECKING:
    from std_decode.model.cache import SparseToDenseCache

NO_MASK = -(2**40)  # a key offset that no mask is ever asked for

# Tokens per dense pass on the demo model at gamma 4: never re-selecting, going by the newest
# scores alone, and with this: 4,096 video tokens and 64 keys 3.82, 3.77, 4.60; 256 keys 3.91,
# 4.74, 4.85; 16,384 video tokens and 64 keys 3.99, 3.87, 4.69; 256 keys 3.87, 4.69, 4.69. By the
# exact softmax 4.84 to 4.95. What ties with this and what loses: bench/results/selection.md.
FADE = 0.9


class BufferLayer(CacheLayerMixin):
    """One decoder layer's keys and values, ``[B, Hkv, capacity, D]``, and what steers its drafts.

    Attributes:
        window: sliding-window size, or None where the layer attends to everything. Windowed layers
            draft densely: they have no selection.
        past: the layer of the caller's cache that this one goes on from, or None.
        indices: selected key positions, int32 ``[B, Hkv, K]``, ascending, padded with -1.
        importance: what the prompt's keys compete by, float32 ``[B, Hkv, S]``.
        lse: log-sum-exp of each draft step of the round, float32 ``[B, Hq, gamma]``.
    """

    is_compileable = False
    is_croppable = False  # nobody but the rounds takes tokens back
    supports_early_init = False

    def __init__(self, owner: SparseToDenseCache, window: int | None):
        super().__init__()
        self.owner = owner
        self.window = window
        self.is_sliding = window is not None
        self.past: Any = None
        self.indices: Any = None
        self.importance: Any = None
        self.lse: Any = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, dim = key_states.shape
        # Unwritten rows are never read into a result, so they need no zeros.
        shape = (batch, heads, self.owner.capacity, dim)
        self.keys, self.values = key_states.new_empty(shape), value_states.new_empty(shape)
        self.is_initialized = True

    def adopt(self, past: Any) -> None:
        """Take over the tokens of a layer of the caller's cache."""
        length = self.owner.longest
        for name in ("keys", "values"):
            old, new = getattr(past, name), getattr(self, name)
            first = length - old.shape[2]  # a sliding window has forgotten what came before
            new[:, :, :first] = 0  # masked at prefill, but read
            new[:, :, first:length] = old
            # The caller's cache need not hold the same tokens a second time, in the same order.
            if first == 0 and self.owner.order is None:
                setattr(past, name, new[:, :, :length])

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Write T tokens behind the accepted ones.

        Returns:
            At prefill the prompt's keys and values, for the attention the model came with;
            afterwards the whole buffers, for ours.
        """
        if self.owner.prefilling:
            return self._write_prompt(key_states, value_states)
        span = self.owner.span
        # 2.3 us instead of 4.0 for the same below, which a compiler fuses and this it does not.
        if len(span.slots) == 1 and not torch.compiler.is_compiling():
            slots = span.slots[0].to(self.device)
            self.keys.index_copy_(2, slots, key_states)
            self.values.index_copy_(2, slots, value_states)
            return self.keys, self.values
        rows, slots = span.rows.to(self.device), span.slots.to(self.device)
        self.keys[rows, :, slots] = key_states.transpose(1, 2)
        self.values[rows, :, slots] = value_states.transpose(1, 2)
        return self.keys, self.values

    def _write_prompt(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.past is not None:
            self.adopt(self.past)
            self.past = None
        given, expected = key_states.shape[2], self.owner.span.slots.shape[1]
        if given != expected:  # slots that nothing was written to would be attended to
            raise RuntimeError(
                f"generate: a layer got keys of {given} tokens for a prompt of {expected}, "
                "expected as many; unpatch the model, whose own code leaves some out"
            )
        start, end = self.owner.longest, self.owner.longest + given
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def arrange(self, order: Tensor) -> None:
        """Put the first S tokens of each row in this order, ``[B, S]``."""
        index = order.to(self.device)[:, None, :, None]
        for buffer in (self.keys, self.values):
            tokens = buffer[:, :, : order.shape[1]]
            tokens.copy_(tokens.take_along_dim(index, dim=2))

    def grow(self, capacity: int) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self.owner.longest] = old[:, :, : self.owner.longest]
            setattr(self, name, new)

    def weigh_prompt(self, scores: Tensor, query_heads: int) -> None:
        """Begin with the importance that prefill's scores tell, ``[B, Hkv, S]``, used up."""
        if self.lse is None:
            self.lse = scores.new_empty(len(scores), query_heads, self.owner.most_drafts)
        share = scores.div_(scores.sum(dim=-1, keepdim=True).clamp_(min=1e-30))
        if self.importance is None:
            self.importance = share
        else:
            self.importance[..., : share.shape[-1]] = share  # what is beyond is no candidate

    def weigh(self, scores: Tensor) -> None:
        """Renew the importance from the newest scores ``[B, Hkv, N]``, which are used up.

        A key's importance is its share of the attention of the round in which it mattered most,
        fading by `FADE` a round: what was needed lately is often needed again. In place, because
        all layers' importance is one tensor and so is selected from in one call.
        """
        share = scores[..., : self.importance.shape[-1]]
        if self.owner.is_prompt is not None:
            share *= self.owner.is_prompt.to(share.device)
        share /= share.sum(dim=-1, keepdim=True).clamp_(min=1e-30)
        # NaN, of a draft that is no number, is left out: it would stay for ever.
        torch.fmax(self.importance.mul_(FADE), share, out=self.importance)

    def note_lse(self, lse: Tensor) -> None:
        """Keep a draft step's log-sum-exp, ``[B, Hq, 1]``, as an estimate for verification."""
        self.lse.index_copy_(2, self.owner.ahead.to(lse.device), lse)

    def lse_estimate(self, count: int, padding: int = 0) -> Tensor:
        """What the log-sum-exp of the `count` verified rows will be about, ``[B, Hq, count]``.

        It is that of the draft step of the same token, which saw fewer keys and is a little low.
        No draft step saw the last row: the step before it stands in. Rows that are `padding` give
        no scores.
        """
        last = count - padding - 1
        parts = [self.lse[..., :last], self.lse[..., last - 1 : last]]
        if padding:
            none = self.lse.new_full((), torch.inf)
            parts.append(none.expand(*self.lse.shape[:-1], padding))
        return torch.cat(parts, -1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys to mask; the offset tells that none need masking."""
        return self.get_seq_length() + query_length, 0 if self.owner.prefilling else NO_MASK

    def get_seq_length(self) -> int:
        # A captured or compiled pass must not see a number that changes from pass to pass.
        return self.owner.longest if self.owner.prefilling else self.owner.capacity

    def get_max_length(self) -> int:
        return -1

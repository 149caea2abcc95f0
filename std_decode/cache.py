"""The KV cache of a patched model: one dense buffer per layer, and lengths that say what counts.

A draft writes its keys and values at their own positions, verification overwrites them with the
dense ones, and rejecting a draft is nothing but a smaller length. K/V are never copied or moved;
drafting reads the selected rows in place through an index list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

BUCKET = 256  # capacities are multiples of this many tokens
NO_MASK = -(2**40)  # a key offset that no mask is ever asked for
MOST_NEW_TOKENS = 1024  # room made at first; more comes by growing

# Tokens per dense pass on the demo model, mean of 6 clips, gamma 4: never re-selecting, going by
# the newest scores alone, and with this: at 1,024 video tokens and K 32 3.48, 2.27, 3.95; K 64
# 3.51, 3.86, 4.94; K 128 3.61, 4.74, 4.94; at 128 video tokens and K 32 2.12, 2.64, 3.18.
FADE = 0.9


class BufferLayer(CacheLayerMixin):
    """One decoder layer's keys and values, ``[B, Hkv, capacity, D]``, and what steers its drafts.

    Attributes:
        window: sliding-window size, or None where the layer attends to everything. Windowed layers
            draft densely: they have no selection.
        past: the layer of the caller's cache that this one goes on from, or None.
        indices: selected key positions, int32 ``[B, Hkv, K]``, ascending, padded with -1.
        importance: what the prompt's keys compete by, float32 ``[B, Hkv, S]``; of prefill's
            scores until the first selection.
        draft_lse: log-sum-exp of each draft step of the round, ``[B, Hq, 1]`` each.
    """

    is_compileable = False
    is_croppable = False  # nobody but the rounds takes tokens back
    supports_early_init = False

    def __init__(self, owner: SparseToDenseCache, window: int | None, past: Any = None):
        super().__init__()
        self.owner = owner
        self.window = window
        self.past = past
        self.is_sliding = window is not None
        self.indices: Tensor | None = None
        self.importance: Any = None
        self.draft_lse: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, dim = key_states.shape
        # Unwritten rows are never read into a result, so they need no zeros.
        shape = (batch, heads, self.owner.capacity, dim)
        self.keys, self.values = key_states.new_empty(shape), value_states.new_empty(shape)
        self.is_initialized = True
        if self.past is not None:
            self.adopt(self.past)

    def adopt(self, past: Any) -> None:
        """Take over the tokens of a layer of the caller's cache."""
        length = self.owner.longest
        for name in ("keys", "values"):
            old, new = getattr(past, name), getattr(self, name)
            first = length - old.shape[2]  # a sliding window has forgotten what came before
            new[:, :, :first] = 0  # masked at prefill, but read
            new[:, :, first:length] = old
            if first == 0:  # the caller's cache need not hold the same tokens a second time
                setattr(past, name, new[:, :, :length])

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Write T tokens behind the accepted ones.

        Returns:
            At prefill the prompt's keys and values, for the attention the model came with;
            afterwards the whole buffers, for ours.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        span = self.owner.span
        if self.owner.prefilling:
            start, end = self.owner.longest, self.owner.longest + key_states.shape[2]
            self.keys[:, :, start:end] = key_states
            self.values[:, :, start:end] = value_states
            return self.keys[:, :, :end], self.values[:, :, :end]
        rows, slots = span.rows.to(self.device), span.slots.to(self.device)
        self.keys[rows, :, slots] = key_states.transpose(1, 2)
        self.values[rows, :, slots] = value_states.transpose(1, 2)
        return self.keys, self.values

    def grow(self, capacity: int) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self.owner.longest] = old[:, :, : self.owner.longest]
            setattr(self, name, new)

    def weigh(self, scores: Tensor) -> None:
        """Renew the importance from the newest scores ``[B, Hkv, N]``, which are used up.

        A key's importance is its share of the attention of the round in which it mattered most,
        fading by `FADE` a round: what was needed lately is often needed again. In place, because
        all layers' importance is one tensor and so is selected from in one call.
        """
        share = scores[..., : self.owner.prompt or None]
        share /= share.sum(dim=-1, keepdim=True).clamp_(min=1e-30)
        if self.importance is None:
            self.importance = share
        else:
            torch.maximum(self.importance.mul_(FADE), share, out=self.importance)

    def lse_estimate(self) -> Tensor:
        """What the verified rows' log-sum-exp will be about, ``[B, Hq, gamma + 1]``.

        It is that of the draft step of the same token, which saw fewer keys and is a little low.
        No draft step saw the last row: the step before it stands in.
        """
        return torch.cat([*self.draft_lse, self.draft_lse[-1]], dim=-1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys to mask; the offset tells that none need masking."""
        return self.owner.longest + query_length, 0 if self.owner.prefilling else NO_MASK

    def get_seq_length(self) -> int:
        return self.owner.longest

    def get_max_length(self) -> int:
        return -1


def bucket(tokens: int) -> int:
    """`tokens` rounded up, so that buffers grow rarely and sizes repeat."""
    return -(-tokens // BUCKET) * BUCKET


@dataclass(frozen=True)
class Span:
    """Where the T tokens of one forward pass go and what they may see."""

    kv_len: Tensor  # [B] int32, each row's length with these tokens
    rows: Tensor  # [B, 1] int64
    slots: Tensor  # [B, T] int64


class SparseToDenseCache(Cache):
    """The buffers of all layers and the number of tokens of each row that are accepted.

    Args:
        config: of the text decoder; it says which layers have a sliding window.
        template: the DynamicCache that generate made or its caller gave. The call goes on from its
            tokens, and it gets the new ones at the end.
        capacity: tokens to make room for, rounded up to a multiple of `BUCKET`.
        kv_start: first valid position of each row, int32 ``[B]``, or None without left padding.

    Attributes:
        lengths: accepted tokens of each row, int64 ``[B]``.
        longest: the largest of them, as the host knows it.
        prefilling: until the prompt is read.
        prompt: tokens that were there when it had been.
        answer: stands in for the model in forward calls that carry this cache.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        template: DynamicCache,
        capacity: int,
        batch: int,
        device: torch.device,
        kv_start: Tensor | None = None,
    ):
        windows = [getattr(x, "sliding_window", None) for x in DynamicCache(config=config).layers]
        self.template = template
        self.capacity = bucket(capacity)
        self.kv_start = kv_start
        self.longest = template.get_seq_length()
        self.prefilling = True
        past = template.layers if self.longest else [None] * len(windows)
        super().__init__(layers=[BufferLayer(self, w, p) for w, p in zip(windows, past)])
        self.lengths = torch.full((batch,), self.longest, device=device)
        self.tail_start = torch.zeros(batch, dtype=torch.int32, device=device)
        self._rows = torch.arange(batch, device=device)[:, None]
        self.prompt = 0
        self.answer: Any = None

    @property
    def selecting_layers(self) -> list[BufferLayer]:
        return [layer for layer in self.layers if not layer.is_sliding]

    @property
    def nbytes(self) -> int:
        """Of the buffers."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more. What is not accepted does not survive a growth."""
        if self.longest + tokens > self.capacity:
            self.capacity = bucket(max(self.longest + tokens, self.capacity * 3 // 2))
            for layer in self.layers:
                layer.grow(self.capacity)

    def expect(self, tokens: int, ahead: int = 0) -> None:
        """Say that the next pass brings each row `tokens` tokens, `ahead` past its accepted."""
        start = self.lengths[:, None] + ahead
        slots = start + torch.arange(tokens, device=start.device)
        self.span = Span((start[:, 0] + tokens).int(), self._rows, slots)

    def advance(self, tokens: int | Tensor, longest: int) -> None:
        """Accept `tokens` more, ``[B]`` or of every row; the longest row has `longest` then."""
        self.lengths = self.lengths + tokens
        self.longest = longest

    def rewind(self, length: int) -> None:
        """Forget every row's tokens from `length` on."""
        self.lengths = self.lengths.clamp(max=length)
        self.longest = length

    def finish_prefill(self, new_tokens: int) -> None:
        self.advance(new_tokens, self.longest + new_tokens)
        self.tail_start.copy_(self.lengths)
        self.prompt = self.longest
        self.prefilling = False

    def to_dynamic(self) -> DynamicCache:
        """Put the tokens into the DynamicCache, as plain decoding leaves it. Call it last.

        Layer by layer, so that no more than one layer is in memory twice.
        """
        for index, layer in enumerate(self.layers):
            known = 0
            if self.template.layers and index < len(self.template.layers):
                known = self.template.layers[index].get_seq_length()
            new = slice(known, self.longest)
            self.template.update(layer.keys[:, :, new], layer.values[:, :, new], index)
            layer.keys = layer.values = None
        return self.template

    def release(self) -> None:
        """Drop the buffers now: cache, layers and engine refer to each other in a circle."""
        self.layers.clear()
        self.answer = None

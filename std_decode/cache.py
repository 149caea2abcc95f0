"""The KV cache of a patched model: one dense buffer per layer, and a length that says what counts.

A draft writes its keys and values at their own positions, verification overwrites them with the
dense ones, and rejecting a draft is nothing but a smaller length. K/V are never copied or moved;
drafting reads the selected rows in place through an index list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

BUCKET = 256  # capacities are multiples of this many tokens
NO_MASK = -(2**40)  # a key offset that no mask is ever asked for
MOST_NEW_TOKENS = 1024  # room made at first; more comes by growing


class BufferLayer(CacheLayerMixin):
    """One decoder layer's keys and values, ``[B, Hkv, capacity, D]``, and what steers its drafts.

    Attributes:
        window: sliding-window size, or None where the layer attends to everything. Windowed layers
            draft densely: they have no selection.
        indices: selected key positions, int32 ``[B, Hkv, K]``, ascending, padded with -1.
        scores: each key's attention in the newest pass, float32 ``[B, Hkv, N]``, until selected.
        draft_lse: log-sum-exp of each draft step of the round, ``[B, Hq, 1]`` each.
    """

    is_compileable = False
    is_croppable = False  # nobody but the rounds takes tokens back
    supports_early_init = False

    def __init__(self, owner: SparseToDenseCache, window: int | None):
        super().__init__()
        self.owner = owner
        self.window = window
        self.is_sliding = window is not None
        self.indices: Tensor | None = None
        self.scores: Any = None
        self.draft_lse: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, dim = key_states.shape
        # Unwritten rows are never read into a result, so they need no zeros.
        shape = (batch, heads, self.owner.capacity, dim)
        self.keys, self.values = key_states.new_empty(shape), value_states.new_empty(shape)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Write T tokens behind the accepted ones.

        Returns:
            At prefill the prompt's keys and values, for the attention the model came with;
            afterwards the whole buffers, for ours.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        span = self.owner.span
        if self.owner.length == 0:
            tokens = key_states.shape[2]
            self.keys[:, :, :tokens] = key_states
            self.values[:, :, :tokens] = value_states
            return self.keys[:, :, :tokens], self.values[:, :, :tokens]
        rows, slots = span.rows.to(self.device), span.slots.to(self.device)
        self.keys[rows, :, slots] = key_states.transpose(1, 2)
        self.values[rows, :, slots] = value_states.transpose(1, 2)
        return self.keys, self.values

    def grow(self, capacity: int) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self.owner.length] = old[:, :, : self.owner.length]
            setattr(self, name, new)

    def lse_estimate(self) -> Tensor:
        """What the verified rows' log-sum-exp will be about, ``[B, Hq, gamma + 1]``.

        It is that of the draft step of the same token, which saw fewer keys and is a little low.
        No draft step saw the last row: the step before it stands in.
        """
        return torch.cat([*self.draft_lse, self.draft_lse[-1]], dim=-1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys to mask; the offset tells that none need masking."""
        return self.owner.length + query_length, NO_MASK if self.owner.length else 0

    def get_seq_length(self) -> int:
        return self.owner.length

    def get_max_length(self) -> int:
        return -1


def _bucket(tokens: int) -> int:
    return -(-tokens // BUCKET) * BUCKET


@dataclass(frozen=True)
class Span:
    """Where the T tokens of one forward pass go and what they may see."""

    kv_len: Tensor  # [B] int32, each row's length with these tokens
    rows: Tensor  # [B, 1] int64
    slots: Tensor  # [B, T] int64


class SparseToDenseCache(Cache):
    """The buffers of all layers and the number of tokens that are accepted.

    Args:
        template: the empty DynamicCache that generate made; it says which layers have a window,
            and is what the caller gets back at the end.
        capacity: tokens to make room for, rounded up to a multiple of `BUCKET`.
        kv_start: first valid position of each row, int32 ``[B]``, or None without left padding.
    """

    def __init__(
        self,
        template: DynamicCache,
        capacity: int,
        batch: int,
        device: torch.device,
        kv_start: Tensor | None = None,
    ):
        windows = [getattr(layer, "sliding_window", None) for layer in template.layers]
        super().__init__(layers=[BufferLayer(self, window) for window in windows])
        self.template = template
        self.capacity = _bucket(capacity)
        self.kv_start = kv_start
        self.length = 0
        self.tail_start = torch.zeros(batch, dtype=torch.int32, device=device)
        self._rows = torch.arange(batch, device=device)[:, None]
        self.rounds: Any = None  # answers the forward calls that carry this cache
        self.expect(0)

    @property
    def selecting_layers(self) -> list[BufferLayer]:
        return [layer for layer in self.layers if not layer.is_sliding]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more. What is not accepted does not survive a growth."""
        if self.length + tokens > self.capacity:
            self.capacity = _bucket(max(self.length + tokens, self.capacity * 3 // 2))
            for layer in self.layers:
                layer.grow(self.capacity)

    def expect(self, tokens: int, ahead: int = 0) -> None:
        """Say that the next pass brings `tokens` tokens, `ahead` past the accepted ones."""
        start = self.length + ahead
        slots = torch.arange(start, start + tokens, device=self._rows.device)
        kv_len = torch.full_like(self.tail_start, start + tokens)
        self.span = Span(kv_len, self._rows, slots.expand(len(self._rows), -1))

    def finish_prefill(self, prompt_length: int) -> None:
        self.length = prompt_length
        self.tail_start.fill_(prompt_length)

    def to_dynamic(self) -> DynamicCache:
        """The accepted tokens in the cache that generate made, as plain decoding leaves it."""
        for index, layer in enumerate(self.layers):
            keys, values = layer.keys[:, :, : self.length], layer.values[:, :, : self.length]
            self.template.update(keys.clone(), values.clone(), index)
        return self.template

    def release(self) -> None:
        """Drop the buffers now: cache, layers and rounds refer to each other in a circle."""
        self.layers.clear()
        self.rounds = None

"""One decoder layer's share of the KV cache: its buffers, and what its drafts are to read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from std_decode.model.selection_rules import Selection

if TYPE_CHECKING:
    from std_decode.model.cache import SparseToDenseCache

NO_MASK = -(2**40)  # a key offset that no mask is ever asked for


class BufferLayer(CacheLayerMixin):
    """One decoder layer's keys and values, ``[B, Hkv, capacity, D]``, and what steers its drafts.

    Attributes:
        window: sliding-window size, or None where the layer attends to everything. Windowed layers
            draft densely: they have no selection.
        past: the layer of the caller's cache that this one goes on from, or None.
        indices: selected key positions, int32 ``[B, Hkv, K]``, ascending, padded with -1.
        importance: what the prompt's keys compete by, float32 ``[B, Hkv, S]``.
        query_heads: Hq.
        newest_queries: of the prompt so far, where more of it is to be read, see `voters`.
        newest_lse: log-sum-exp of the newest draft step, float32 ``[B, Hq, 1]``.
        group, place: what the layer shares with others (`LayerGroup`), and its place among them;
            None before the first selection.
    """

    one_by_one = False  # whether layers renew their selections themselves, see `OffloadedLayer`
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
        self.query_heads = 0
        self.newest_queries: Any = None
        self.newest_lse: Any = None
        self.group: Any = None
        self.place = 0

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
        start = self.owner.longest
        end = start + self._of_prompt(key_states)
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _of_prompt(self, key_states: Tensor) -> int:
        """How many tokens of the prompt there are keys of."""
        given, expected = key_states.shape[2], self.owner.span.slots.shape[1]
        if given != expected:  # slots that nothing was written to would be attended to
            raise RuntimeError(
                f"generate: a layer got keys of {given} tokens for a prompt of {expected}, "
                "expected as many; unpatch the model, whose own code leaves some out"
            )
        return given

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

    def voters(self, query: Tensor, count: int, partial: bool) -> Tensor:
        """The newest `count` queries of the prompt so far, ``[B, Hq, count, D]``.

        Args:
            query: of this pass, ``[B, Hq, T, D]``.
            partial: whether more of the prompt follows, whose last pass may have too few.
        """
        newest, before = query[:, :, -count:], self.newest_queries
        if before is not None and newest.shape[2] < count:
            newest = torch.cat([before, newest], dim=2)[:, :, -count:]
        self.newest_queries = newest.clone() if partial else None  # without the rest of `query`
        return newest

    def choose(self, selection: Selection, keys: Tensor, values: Tensor) -> None:
        """Nothing yet: all layers select at once."""

    def reselect(self, keys: Tensor, values: Tensor) -> None:
        """The same."""

    def listed(self) -> tuple[Tensor, Tensor, Tensor]:
        """What of the buffers a draft reads: indices, tail_start and kv_len of its attention."""
        return self.indices, self.owner.tail_start, self.owner.span.kv_len

    def weigh_prompt(self, scores: Tensor, query_heads: int) -> None:
        """Begin with the importance that prefill's scores tell, ``[B, Hkv, S]``, used up."""
        self.query_heads = query_heads
        share = scores.div_(scores.sum(dim=-1, keepdim=True).clamp_(min=1e-30))
        if self.importance is None:
            self.importance = share
        else:
            self.importance[..., : share.shape[-1]] = share  # what is beyond is no candidate

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def hand_over(self, template: DynamicCache, index: int, new: slice) -> None:
        """Put tokens into the caller's cache, as plain decoding leaves them."""
        template.update(self.keys[:, :, new], self.values[:, :, new], index)

    def drop(self) -> None:
        """Let the buffers go."""
        self.keys = self.values = None

    @property
    def scores(self) -> Tensor:
        """Where a verification is to leave this layer's scores, ``[B, Hkv, capacity]``."""
        return self.group.scores[self.place]

    def weigh(self, scores: Tensor) -> None:
        """Hand in the newest scores ``[B, Hkv, N]``, for `LayerGroup.renew`."""
        self.scores.copy_(scores)

    def note_lse(self, lse: Tensor) -> None:
        """Keep a draft step's log-sum-exp, ``[B, Hq, 1]``, for `LayerGroup.note_lse`."""
        self.newest_lse = lse

    def lse_estimate(self) -> Tensor:
        """What the log-sum-exp of the verified rows will be about, ``[B, Hq, T]``."""
        return self.group.estimate[self.place]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys to mask; the offset tells that none need masking."""
        return self.get_seq_length() + query_length, 0 if self.owner.prefilling else NO_MASK

    def get_seq_length(self) -> int:
        # A captured or compiled pass must not see a number that changes from pass to pass.
        return self.owner.longest if self.owner.prefilling else self.owner.capacity

    def get_max_length(self) -> int:
        return -1

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
from transformers.generation.utils import ALL_CACHE_NAMES

# What transformers calls the cache in arguments and outputs; the second until 5.23.
CACHE = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"

BUCKET = 256  # capacities are multiples of this many tokens
NO_MASK = -(2**40)  # a key offset that no mask is ever asked for
MOST_NEW_TOKENS = 1024  # room made at first; more comes by growing

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


def bucket(tokens: int) -> int:
    """`tokens` rounded up, so that buffers grow rarely and sizes repeat."""
    return -(-tokens // BUCKET) * BUCKET


def sliding_windows(config: PreTrainedConfig) -> list[int | None]:
    """Of each decoder layer; None where it attends to everything."""
    return [getattr(x, "sliding_window", None) for x in DynamicCache(config=config).layers]


class _Length:
    """How long a layer of the caller's cache was, and back to that."""

    def __init__(self, layer: Any):
        self.layer, self.tokens = layer, layer.get_seq_length()
        # What was is the beginning of what is: no need to hold it. Not so where a window moves on,
        # or where there was nothing.
        self.held = vars(layer).copy() if layer.is_sliding or not self.tokens else None

    def restore(self) -> None:
        if self.held is not None:
            vars(self.layer).clear()
            vars(self.layer).update(self.held)
            return
        for name in ("keys", "values"):  # one of the two may have been extended, the other not
            setattr(self.layer, name, getattr(self.layer, name)[:, :, : self.tokens])


@dataclass(frozen=True)
class Span:
    """Where the T tokens of one forward pass go and what they may see."""

    kv_len: Tensor  # [B] int32, each row's length with these tokens
    rows: Tensor  # [B, 1] int64
    slots: Tensor  # [B, T] int64


class SparseToDenseCache(Cache):
    """The buffers of all layers and the number of tokens of each row that are accepted.

    What a pass reads and writes stays where it is between passes, and between the calls that use
    the cache one after the other, so that a captured pass can be replayed.

    Args:
        config: of the text decoder; it says which layers have a sliding window.
        capacity: tokens to make room for, rounded up to a multiple of `BUCKET`.
        most_drafts: gamma at most.

    Attributes:
        template: the DynamicCache that generate made or its caller gave. The call goes on from its
            tokens, and it gets the new ones at the end.
        kv_start: first valid position of each row, int32 ``[B]``, or None where none is masked.
        order: what the prompt's tokens are put in once they are read, so that the masked ones come
            first, ``[B, S]``; the caller's cache gets them as they were. None: they do already.
        lengths: accepted tokens of each row, int64 ``[B]``.
        longest: the largest of them, as the host knows it.
        ahead: drafts of this round that lie behind them, int64 ``[1]``.
        tail_start: where the keys begin that no selection covers, int32 ``[B]``.
        is_prompt: 1 where importance is of a key of the prompt, float32 ``[B, 1, S]``; None where
            it is of no other.
        prefilling: until the prompt is read.
        prompt: tokens that were there when it had been.
        answer: stands in for the model in forward calls that carry this cache.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        capacity: int,
        batch: int,
        device: torch.device,
        most_drafts: int = 0,
    ):
        windows = sliding_windows(config)
        super().__init__(layers=[BufferLayer(self, window) for window in windows])
        self.capacity, self.most_drafts = bucket(capacity), most_drafts
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.ahead = torch.zeros(1, dtype=torch.int64, device=device)
        self.tail_start = torch.zeros(batch, dtype=torch.int32, device=device)
        self.kv_start: Tensor | None = None
        self.order: Tensor | None = None
        self.is_prompt: Tensor | None = None
        self._rows = torch.arange(batch, device=device)[:, None]
        self.answer: Any = None

    def start(
        self,
        template: DynamicCache,
        kv_start: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        """Begin a call that goes on from the tokens of `template`."""
        self.template, self.order = template, order
        self.longest, self.prompt = template.get_seq_length(), 0
        self.prefilling = True
        self.lengths.fill_(self.longest)
        self.ahead.zero_()
        if kv_start is None or self.kv_start is None:
            self.kv_start = kv_start
        else:
            self.kv_start.copy_(kv_start)
        for index, layer in enumerate(self.layers):
            layer.past = template.layers[index] if self.longest else None

    def __bool__(self) -> bool:
        # Phi-3 has a prompt beyond the switch of its RoPE read without a cache, where there is one
        # that it takes for shorter. A DynamicCache that has no layers yet is False as well.
        return not self.prefilling or self.longest > 0

    @property
    def selecting_layers(self) -> list[BufferLayer]:
        return [layer for layer in self.layers if not layer.is_sliding]

    @property
    def nbytes(self) -> int:
        """Of the buffers."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def reserve(self, tokens: int) -> bool:
        """Make room for `tokens` more. What is not accepted does not survive a growth.

        Returns:
            Whether the buffers had to grow, and are elsewhere now.
        """
        if self.longest + tokens <= self.capacity:
            return False
        self.capacity = bucket(max(self.longest + tokens, self.capacity * 3 // 2))
        for layer in self.layers:
            layer.grow(self.capacity)
        return True

    def expect(self, tokens: int) -> None:
        """Say that the next pass brings each row `tokens` tokens, `ahead` past its accepted."""
        start = (self.lengths + self.ahead)[:, None]
        slots = start + torch.arange(tokens, device=start.device)
        self.span = Span((start[:, 0] + tokens).int(), self._rows, slots)

    def advance(self, tokens: int | Tensor, longest: int) -> None:
        """Accept `tokens` more, ``[B]`` or of every row; the longest row has `longest` then."""
        self.lengths += tokens
        self.longest = longest

    def rewind(self, length: int) -> None:
        """Forget every row's tokens from `length` on."""
        self.lengths.clamp_(max=length)
        self.longest = length

    def finish_prefill(self, new_tokens: int) -> None:
        self.advance(new_tokens, self.longest + new_tokens)
        self.tail_start.copy_(self.lengths)
        self.prompt = self.longest
        if self.order is not None:
            for layer in self.layers:
                layer.arrange(self.order)
        if self.is_prompt is not None:
            self.is_prompt.zero_()[..., : self.prompt] = 1
        self.prefilling = False

    def to_dynamic(self, *, keep: bool) -> None:
        """Put the tokens into the DynamicCache, as plain decoding leaves it.

        Args:
            keep: whether the buffers are needed again; else each goes as it is done with, so that
                no more than one layer is in memory twice.

        Note:
            All or nothing: where memory ends half-way, no layer keeps tokens that others lack.
        """
        before = [_Length(layer) for layer in self.template.layers]
        back = None if self.order is None else self.order.argsort(dim=1)
        try:
            for index, layer in enumerate(self.layers):
                if back is not None:
                    layer.arrange(back)
                known = before[index].tokens if index < len(before) else 0
                new = slice(known, self.longest)
                self.template.update(layer.keys[:, :, new], layer.values[:, :, new], index)
                if not keep:
                    layer.keys = layer.values = None
        except BaseException:
            del self.template.layers[len(before) :]
            for length in before:
                length.restore()
            raise

    def release(self) -> None:
        """Drop the buffers."""
        self.layers.clear()
        self.answer = None

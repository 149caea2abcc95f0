"""The KV cache of a patched model: one dense buffer per layer, and lengths that say what counts.

A draft writes its keys and values at their own positions, verification overwrites them with the
dense ones, and rejecting a draft is nothing but a smaller length. K/V are never copied or moved;
drafting reads the selected rows in place through an index list.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer
from transformers.generation.utils import ALL_CACHE_NAMES

from std_decode.model.buffers import BufferLayer
from std_decode.model.link import Link
from std_decode.model.offloaded import OffloadedLayer, Staging
from std_decode.model.recurrent import MOST_WIDTH, RecurrentLayer, hand_over

# What transformers calls the cache in arguments and outputs; the second until 5.23.
CACHE = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"

BUCKET = 256  # capacities are multiples of this many tokens
MOST_NEW_TOKENS = 1024  # room made at first; more comes by growing


def bucket(tokens: int) -> int:
    """`tokens` rounded up, so that buffers grow rarely and sizes repeat."""
    return -(-tokens // BUCKET) * BUCKET


def sliding_windows(config: PreTrainedConfig) -> list[int | None]:
    """Of each decoder layer; None where it attends to everything."""
    return [getattr(x, "sliding_window", None) for x in DynamicCache(config=config).layers]


class _Length:
    """How long a layer of the caller's cache was, and back to that."""

    def __init__(self, layer: Any):
        self.layer = layer
        if isinstance(layer, LinearAttentionLayer):
            # Only memory for one that holds nothing yet can be lacking.
            self.tokens = 0
            self.held: dict[str, Any] | None = {name: copy(x) for name, x in vars(layer).items()}
            return
        self.tokens = layer.get_seq_length()
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
    ring: Tensor | None = None  # the same in the rings of layers with a state
    drafted: bool = False  # by a draft pass: no state is to go on from them


class SparseToDenseCache(Cache):
    """The buffers of all layers and the number of tokens of each row that are accepted.

    What a pass reads and writes stays where it is between passes, and between the calls that use
    the cache one after the other, so that a captured pass can be replayed.

    Args:
        config: of the text decoder; it says which layers have a sliding window.
        capacity: tokens to make room for, rounded up to a multiple of `BUCKET`.
        most_drafts: gamma at most.
        offloads: whether keys and values are kept in the host's memory, see `OffloadedLayer`.

    Attributes:
        link: what they are copied by; `staging`: where to.
        recurrent: the layers that have a state instead of keys and values.
        settled: accepted tokens of each row that their states are of, int32 ``[B]``.
        slots: of their rings.
        most_per_pass: tokens that these have room for in one pass after another.
        template: the DynamicCache that generate made or its caller gave. The call goes on from its
            tokens, and it gets the new ones at the end.
        kv_start: first valid position of each row, int32 ``[B]``, or None where none is masked.
        order: what the prompt's tokens are put in once they are read, so that the masked ones come
            first, ``[B, S]``; the caller's cache gets them as they were. None: they do already.
        lengths: accepted tokens of each row, int64 ``[B]``.
        longest: the largest of them, as the host knows it.
        ahead: drafts of this round that lie behind them, int64 ``[1]``.
        tail_start: where the keys begin that no selection covers, int32 ``[B]``.
        prefilling: until the prompt is read.
        to_read: tokens that the prompt has in all, where it is read in several passes; else 0.
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
        offloads: bool = False,
    ):
        self.offloads = offloads
        self.link, self.staging = Link(), Staging(self)
        super().__init__(layers=[self._layer(like) for like in DynamicCache(config=config).layers])
        self.recurrent = [layer for layer in self.layers if isinstance(layer, RecurrentLayer)]
        self.capacity, self.most_drafts = bucket(capacity), most_drafts
        self.most_per_pass = most_drafts + 1
        self.settled = torch.zeros(batch, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.ahead = torch.zeros(1, dtype=torch.int64, device=device)
        self.tail_start = torch.zeros(batch, dtype=torch.int32, device=device)
        self.kv_start: Tensor | None = None
        self.order: Tensor | None = None
        self._rows = torch.arange(batch, device=device)[:, None]
        self.answer: Any = None

    def _layer(self, like: Any) -> Any:
        if isinstance(like, LinearAttentionLayer):
            return RecurrentLayer(self)
        if self.offloads:
            return OffloadedLayer(self)
        return BufferLayer(self, getattr(like, "sliding_window", None))

    def start(
        self,
        template: DynamicCache,
        kv_start: Tensor | None = None,
        order: Tensor | None = None,
        to_read: int = 0,
    ) -> None:
        """Begin a call that goes on from the tokens of `template`."""
        self.template, self.order, self.to_read = template, order, to_read
        self.longest, self.prompt = template.get_seq_length(), 0
        self.prefilling = True
        self.lengths.fill_(self.longest)
        self.ahead.zero_()
        if kv_start is None or self.kv_start is None:
            self.kv_start = kv_start
        else:
            self.kv_start.copy_(kv_start)
        for index, layer in enumerate(self.layers):
            past = template.layers[index] if self.longest else None
            if isinstance(layer, RecurrentLayer):
                layer.begin(past)
            else:
                layer.past = past

    def __bool__(self) -> bool:
        # Phi-3 has a prompt beyond the switch of its RoPE read without a cache, where there is one
        # that it takes for shorter. A DynamicCache that has no layers yet is False as well.
        return not self.prefilling or self.longest > 0

    @property
    def selecting_layers(self) -> list[BufferLayer]:
        return [layer for layer in self.buffers if not layer.is_sliding]

    @property
    def buffers(self) -> list[BufferLayer]:
        """The layers that have keys and values."""
        return [layer for layer in self.layers if isinstance(layer, BufferLayer)]

    @property
    def offloaded(self) -> list[OffloadedLayer]:
        """The layers whose keys and values are in the host's memory."""
        return [layer for layer in self.layers if isinstance(layer, OffloadedLayer)]

    @property
    def nbytes(self) -> int:
        """Of the buffers, states and rings, on the device."""
        return sum(layer.nbytes for layer in self.layers) + self.staging.nbytes

    @property
    def host_nbytes(self) -> int:
        """Of keys and values in the host's memory."""
        return sum(layer.host_nbytes for layer in self.offloaded)

    @property
    def slots(self) -> int:
        # Those accepted since the states, at most a pass's, and a pass's new ones.
        return 2 * self.most_per_pass + MOST_WIDTH

    def reserve(self, tokens: int) -> bool:
        """Make room for `tokens` more. What is not accepted does not survive a growth.

        Returns:
            Whether the buffers had to grow, and are elsewhere now.
        """
        widened = self._widen(tokens)
        if self.longest + tokens <= self.capacity:
            return widened
        self.capacity = bucket(max(self.longest + tokens, self.capacity * 3 // 2))
        for layer in self.layers:
            layer.grow(self.capacity)
        return True

    def _widen(self, tokens: int) -> bool:
        """Make the rings take so many tokens in a pass; whether they had to move."""
        if not self.recurrent or tokens <= self.most_per_pass:
            return False
        self.most_per_pass = tokens
        for layer in self.recurrent:
            layer.widen(self.slots)
        return True

    def expect(self, tokens: int, *, drafted: bool = False) -> None:
        """Say that the next pass brings each row `tokens` tokens, `ahead` past its accepted."""
        if not self.prefilling:
            self._widen(tokens)
        start = (self.lengths + self.ahead)[:, None]
        slots = start + torch.arange(tokens, device=start.device)
        ring = slots % self.slots if self.recurrent else None
        self.span = Span((start[:, 0] + tokens).int(), self._rows, slots, ring, drafted)

    def settle(self) -> None:
        """Say that a dense pass has stored the states after the accepted tokens."""
        if self.recurrent:
            self.settled.copy_(self.lengths)

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
        for recurrent in self.recurrent:
            recurrent.finish_prefill()
        self.settle()
        if self.order is not None:
            for layer in self.layers:
                layer.arrange(self.order)
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
        states = {index: x.final() for index, x in enumerate(self.layers) if x in self.recurrent}
        try:
            for index, layer in enumerate(self.layers):
                if index in states:
                    continue
                if back is not None:
                    layer.arrange(back)
                known = before[index].tokens if index < len(before) else 0
                new = slice(known, self.longest)
                layer.hand_over(self.template, index, new)
                if not keep:
                    layer.drop()
            for index, state in states.items():
                hand_over(self.template.layers[index], *state)
        except BaseException:
            del self.template.layers[len(before) :]
            for length in before:
                length.restore()
            raise

    def release(self) -> None:
        """Drop the buffers."""
        self.staging.clear()
        self.layers.clear()
        self.answer = None

"""What the layers of a device share: tensors of all of them, so that one call serves all."""

from __future__ import annotations

import torch
from torch import Tensor

from std_decode.model.buffers import BufferLayer
from std_decode.model.selection_rules import Selection
from std_kernels import renew_importance

# Tokens per dense pass on the demo model at gamma 4: never re-selecting, going by the newest
# scores alone, and with this: 4,096 video tokens and 64 keys 3.82, 3.77, 4.60; 256 keys 3.91,
# 4.74, 4.85; 16,384 video tokens and 64 keys 3.99, 3.87, 4.69; 256 keys 3.87, 4.69, 4.69. By the
# exact softmax 4.84 to 4.95. What ties with this and what loses: bench/results/selection.md.
FADE = 0.9


class LayerGroup:
    """L layers of one device that draft sparsely, and what steers their drafts.

    Attributes:
        importance: what the prompt's keys compete by, float32 ``[L, B, Hkv, S]``.
        indices: selected key positions, int32 ``[L, B, Hkv, K]``, ascending, padded with -1.
        lse: log-sum-exp of each draft step of the round, float32 ``[L, B, Hq, gamma]``.
        estimate: of the verification under way, see `expect`, float32 ``[L, B, Hq, T]``.
        scores: of the newest verification, float32 ``[L, B, Hkv, capacity]``; empty until there is
            one.
    """

    def __init__(self, layers: list[BufferLayer], columns: int, width: int, most_drafts: int):
        self.layers = layers
        batch, heads, length = layers[0].importance.shape
        shape = (len(layers), batch, heads)
        self.importance = layers[0].importance.new_zeros(*shape, columns)
        self.indices = self.importance.new_empty(*shape, width, dtype=torch.int32)
        hq = layers[0].query_heads
        self.lse = self.importance.new_empty(len(layers), batch, hq, most_drafts)
        self.scores = self.importance.new_empty(*shape, 0)
        for place, layer in enumerate(layers):
            self.importance[place, ..., :length] = layer.importance
            layer.group, layer.place = self, place
            layer.importance, layer.indices = self.importance[place], self.indices[place]

    @property
    def nbytes(self) -> int:
        return self.importance.nbytes + self.indices.nbytes + self.scores.nbytes

    def make_room(self, capacity: int) -> None:
        """For the scores of a verification, where it is not there yet."""
        if self.scores.shape[-1] != capacity:
            shape = (*self.importance.shape[:-1], capacity)
            self.scores = None  # before there is more
            self.scores = self.importance.new_empty(shape)

    def note_lse(self, ahead: Tensor) -> None:
        """Keep the newest draft step's log-sum-exp, that of step `ahead` ``[1]``."""
        newest = torch.stack([layer.newest_lse for layer in self.layers])
        self.lse.index_copy_(3, ahead.to(self.lse.device), newest)

    def expect(self, count: int, padding: int) -> None:
        """Say how many rows the next verification has, of which the last are `padding`."""
        self.estimate = lse_estimate(self.lse, count, padding)

    def renew(self, stop: Tensor) -> None:
        """Renew the importance of the keys below `stop` ``[B]`` from the newest scores.

        A key's importance is its share of the attention of the round in which it mattered most,
        fading by `FADE` a round: what was needed lately is often needed again. NaN, of a draft
        that is no number, is left out: it would stay for ever.
        """
        renew_importance(self.importance, self.scores, stop.to(self.scores.device), FADE)


class OneByOne(LayerGroup):
    """The same of layers whose keys pass by one after the other: each selects while they do.

    Attributes:
        scores: those of one layer, ``[1, B, Hkv, capacity]``.
        selection: the rules of the prompt.
    """

    selection: Selection

    def __init__(self, layers: list[BufferLayer], *sizes: int):
        chosen = torch.stack([layer.indices for layer in layers])
        super().__init__(layers, *sizes)
        self.scores = self.scores[:1]
        self.indices.copy_(chosen)

    def make_room(self, capacity: int) -> None:
        if self.scores.shape[-1] != capacity:
            self.scores = self.importance.new_empty(1, *self.importance.shape[1:-1], capacity)

    def renew(self, stop: Tensor) -> None:
        """Each layer has done so."""

    def reselect(self, place: int, stop: Tensor) -> None:
        """Renew the importance of one layer's keys, and pick those of its next drafts."""
        importance, stop = self.importance[place : place + 1], stop.to(self.scores.device)
        renew_importance(importance, self.scores, stop, FADE)
        self.indices[place] = self.selection.of(importance[0])


def lse_estimate(lse: Tensor, count: int, padding: int = 0) -> Tensor:
    """What the log-sum-exp of `count` verified rows will be about, ``[..., count]``.

    It is that of the draft step of the same token, which saw fewer keys and is a little low, from
    ``[..., gamma]``. No draft step saw the last row: the step before it stands in. Rows that are
    `padding` give no scores.
    """
    last = count - padding - 1
    parts = [lse[..., :last], lse[..., last - 1 : last]]
    if padding:
        none = lse.new_full((), torch.inf)
        parts.append(none.expand(*lse.shape[:-1], padding))
    return torch.cat(parts, -1)


def group_layers(layers: list[BufferLayer], selection: Selection) -> list[LayerGroup]:
    """Layers that are on one device and alike in their heads share a group."""
    alike: dict[tuple, list[BufferLayer]] = {}
    for layer in layers:
        own = layer.importance
        key = (own.device, own.shape, layer.query_heads, layer.one_by_one)
        alike.setdefault(key, []).append(layer)
    columns, width = selection.always.shape[1], selection.width
    return [
        (OneByOne if members[0].one_by_one else LayerGroup)(
            members, columns, width, members[0].owner.most_drafts
        )
        for members in alike.values()
    ]

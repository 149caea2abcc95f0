"""What the tests of the ops with a state share: rings of tokens, NaN wherever no call may look."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

NAN = float("nan")


@dataclass
class Tokens:
    """The inputs of every row's first `count` tokens, and the state before any of them."""

    count: int
    query: Tensor  # [B, count, Hk, Dk]
    key: Tensor
    value: Tensor  # [B, count, Hv, Dv]
    g: Tensor  # [B, count, Hv]
    beta: Tensor
    state: Tensor  # [B, Hv, Dk, Dv]
    slots: int = 0
    inputs: Tensor = field(init=False)  # of a convolution, [B, count, C]

    def __post_init__(self) -> None:
        self.inputs = self.value.flatten(2)

    def ring(self, x: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """Tokens first to last of each row of x ``[B, count, ...]``, in their slots."""
        ring = x.new_full((len(x), self.slots, *x.shape[2:]), NAN)
        for b, (low, high) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            for n in range(max(low, 0), high):
                ring[b, n % self.slots] = x[b, n]
        return ring

    def call(self, state: Tensor, state_len: list[int], kv_len: list[int], T: int) -> tuple:
        """The op's arguments where `state` is that after `state_len` tokens."""
        first = torch.tensor(state_len, dtype=torch.int32)
        last = torch.tensor(kv_len, dtype=torch.int32)
        query = torch.stack(
            [self.query[b, n - T : n] for b, n in enumerate(kv_len)]
        )  # [B, T, Hk, Dk]
        rings = (self.ring(x, first, last) for x in (self.key, self.value, self.g, self.beta))
        return query, *rings, state, first, last


def make_tokens(
    count: int = 12,
    *,
    B: int = 2,
    Hk: int = 1,
    Hv: int = 2,
    Dk: int = 16,
    Dv: int = 16,
    slots: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tokens:
    """Tokens as a layer has them: keys nearly alike, so that a value is replaced, not added."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    query, key = draw(B, count, Hk, Dk), draw(B, count, Hk, Dk) + 2 * draw(1, 1, 1, Dk)
    value = 3 * draw(B, count, Hv, Dv)
    g, beta = logsigmoid(2 + draw(B, count, Hv)), torch.sigmoid(draw(B, count, Hv))
    query, key, value, beta = (x.to(dtype) for x in (query, key, value, beta))
    state = normalize(draw(B, Hv, Dk, Dv), dim=2) * 4
    return Tokens(count, query, key, value, g, beta, state, slots)

"""Operators that give a token the bits it has when plain decoding feeds it alone.

Matrix libraries choose their kernel, and with it the order of a sum, by the number of rows. So a
token among others may get another last bit than alone, which in half precision is soon another
token. Whether it does is tried, shape by shape, on numbers whose sums cancel: what is left of them
is rounding alone, and every difference in order shows. Where it does, the rows are fed in the
portions in which plain decoding has them.

PyTorch's CPU kernels take the exponential of most elements by vectors and of the last few of a
thread's share one by one, which rounds otherwise. So such functions are fed in portions always.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MOST_EVEN = 32  # rows, up to which an expert's product is tried
_ROWS = 64  # different rows of a trial's weights; all others repeat them
_GROUPED = {
    function
    for function in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None))
    if function is not None
}
_MATMUL = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
# Whose result for an element depends on where in the tensor it is, in the last bits.
_UNEVEN = {
    *(F.silu, F.gelu, F.softplus, torch.sigmoid, torch.tanh, torch.exp, torch.cos, torch.sin),
    *(Tensor.sigmoid, Tensor.tanh, Tensor.exp, Tensor.cos, Tensor.sin),
}


class Portions(TorchFunctionMode):
    """Within, operators of a pass that feeds ``[B, T]`` tokens are those of ``[B, 1]`` each.

    Args:
        batch, tokens: B and T.
        alone: whether that goes for products with as many rows as tokens; they are left as they
            are where the passes that are compared have the same number. Not so those of experts,
            whose number of rows the tokens themselves decide.

    Attributes:
        uneven: whether plain decoding has such a product of a batch in portions that depend on
            which experts the other rows choose, so that its bits are not to be had.
    """

    def __init__(self, batch: int, tokens: int, alone: bool):
        super().__init__()
        self.batch, self.tokens, self.alone = batch, tokens, alone
        self.uneven = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is torch.addmm and not kwargs and len(args) == 3:  # GPT-2 has its layers so
            return self._linear(args[1], args[2].mT, args[0])
        if func in _MATMUL:
            return self._matmul(func, *args, **kwargs)
        if func in _GROUPED:
            return self._grouped(func, *args, **kwargs)
        if func in _UNEVEN and args[0].device.type == "cpu":
            return self._each_token(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _each_token(self, func: Callable, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shape, count = input.shape, self.batch * self.tokens
        if len(shape) == 2 and shape[0] == count and self.batch > 1:
            input = input.view(self.batch, self.tokens, -1)
        if len(shape) < 2 or input.shape[-2] != self.tokens or kwargs.get("inplace"):
            return func(input.view(shape), *args, **kwargs)
        each = input.split(1, dim=-2)
        if input.is_contiguous():  # else, as half of a wider product, it would not be alone either
            each = [part.contiguous() for part in each]
        return torch.cat([func(part, *args, **kwargs) for part in each], dim=-2).view(shape)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = input.numel() // input.shape[-1]
        if input.dim() == 2 and (_is_part(weight) or rows % self.tokens):
            return self._expert(F.linear, input, weight, bias)
        # A part of the rows of a batch may have an adapter of its own.
        of_tokens = input.dim() == 2 or (input.dim() == 3 and input.shape[1] == self.tokens)
        few = rows // self.tokens
        if not (self.alone and of_tokens) or same_bits(_Product.of(weight, bias), few, rows):
            return F.linear(input, weight, bias)
        each = input.reshape(few, self.tokens, -1).unbind(1)
        if input.dim() == 3:
            each = [row[:, None] for row in each]
        outs = [F.linear(row.contiguous(), weight, bias) for row in each]
        return torch.stack(outs, dim=1).view(*input.shape[:-1], -1)

    def _matmul(self, func: Callable, input: Tensor, other: Tensor) -> Tensor:
        if not (isinstance(other, Tensor) and input.dim() == other.dim() == 2):
            return func(input, other)
        return self._expert(lambda rows, weight, _: func(rows, weight.mT), input, other.mT)

    def _expert(
        self, func: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Of the tokens ``[n, K]`` that chose one expert: each as if no other had."""
        if self._even(_Product.of(weight, bias), len(input)):
            return func(input, weight, bias)
        return torch.cat([func(row, weight, bias) for row in input.split(1)])

    def _grouped(self, func: Callable, input: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
        """The same of all experts; rows ``[n, K]`` sorted by expert, weights ``[E, K, N]``."""
        if input.device.type != "cpu":  # one kernel for groups of all sizes; see `bits`
            return func(input, weight, **kwargs)
        ends = kwargs.pop("offs")
        counts = ends.diff(prepend=ends.new_zeros(1))
        most = int(counts.max())
        if self._even(_Product.of(weight[0].mT, None, func), most):
            return func(input, weight, offs=ends, **kwargs)
        place = torch.arange(len(input), device=input.device)
        expert = torch.searchsorted(ends, place, right=True).clamp(max=len(ends) - 1)
        turn = place - (ends - counts)[expert]
        out = input.new_zeros(len(input), weight.shape[-1])
        for count in range(most):  # the first row of each expert, then the second, and so on
            here = (turn == count) & (place < ends[-1])
            offsets = (counts > count).cumsum(0).to(ends.dtype)
            out[here] = func(input[here], weight, offs=offsets, **kwargs)
        return out

    def _even(self, product: _Product | None, most: int) -> bool:
        """Whether a row's bits are the same however many choose its expert."""
        even = all(same_bits(product, 1, rows) for rows in range(2, most + 1))
        if self.alone and self.batch > 1:
            # Plain decoding has up to as many; by then all that may come has to be known.
            even = all(same_bits(product, 1, rows) for rows in range(2, MOST_EVEN + 1)) and even
            self.uneven |= not even
        return even


def _is_part(weight: Tensor) -> bool:
    """Whether it is one expert's of a tensor that holds all of them; a router's stands alone."""
    return type(weight) is Tensor and weight.untyped_storage().nbytes() > weight.nbytes


@dataclass(frozen=True)
class _Product:
    """All that a matrix library can choose a kernel by, beside the number of rows."""

    shape: tuple[int, ...]  # of the weights, [N, K]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    has_bias: bool
    grouped: Callable | None
    threads: int

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None, grouped: Callable | None = None
    ) -> _Product | None:
        """None of weights that are quantised or shared out, whose product is unknown."""
        if type(weight) not in (Tensor, nn.Parameter):
            return None
        threads = torch.get_num_threads()
        shape, stride = tuple(weight.shape), tuple(weight.stride())
        has_bias = bias is not None
        return cls(shape, stride, weight.dtype, weight.device, has_bias, grouped, threads)

    def __call__(self, input: Tensor, weight: Tensor) -> Tensor:
        if self.grouped is not None:
            ends = torch.tensor([len(input)], dtype=torch.int32, device=input.device)
            return self.grouped(input, weight.mT[None], offs=ends)
        bias = weight.new_zeros(len(weight)) if self.has_bias else None
        return F.linear(input, weight, bias)


@lru_cache(maxsize=4096)
def same_bits(product: _Product | None, few: int, rows: int) -> bool:
    """Whether each of so many `rows` has the bits that it has among so `few`."""
    if product is None:
        return few == rows
    out_features, in_features = product.shape
    half = in_features // 2
    draw: Any = dict(generator=torch.Generator().manual_seed(0), device="cpu")
    order = torch.randperm(half, **draw)

    def cancelling(count: int, sign: int) -> Tensor:
        first = torch.randn(count, half, dtype=torch.float32, **draw)
        # Of many magnitudes, or short sums would need no rounding.
        first *= 2.0 ** torch.randint(-5, 6, first.shape, **draw)
        last = first.new_zeros(count, in_features % 2)
        numbers = torch.cat([first, sign * first[:, order], last], dim=1)
        return numbers.to(product.device, product.dtype)

    few_rows = cancelling(min(_ROWS, out_features), 1)
    weight = few_rows.new_empty_strided(product.shape, product.stride)
    for start in range(0, out_features, _ROWS):
        part = weight[start : start + _ROWS]
        part.copy_(few_rows[: len(part)])
    given = cancelling(rows, -1)
    together = product(given, weight)
    return torch.equal(together, torch.cat([product(part, weight) for part in given.split(few)]))

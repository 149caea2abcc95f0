"""4-bit copies of a linear layer's weights, and the product with them: `std_kernels.int4_linear`.

Along each row, groups of 128 (64, 32) weights share a scale and a zero, both bfloat16;
w = (q - 8) * scale + zero with q from 0 to 15. That is 0.53 bytes a weight in groups of 128, 0.56
in groups of 64. How they are chosen is in `rounding`.

Copies serve drafts alone, so what rounding costs is agreement, never a token.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

import std_kernels as sk
from std_decode.model.packed import PLAIN
from std_decode.weights.rounding import fit

GROUPS = (128, 64, 32)  # the first that divides a row is taken
MOST_BYTES = 0.56  # a weight, for which groups may be finer than they need be
ROWS = 16  # output features that `std_kernels.pack_int4` packs together
CHUNK = 1 << 24  # weights that are quantised at a time, which bounds what is needed besides
FITTED = 1 << 18  # the same on a CPU, whose caches they should fit in
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Quantized(NamedTuple):
    """A weight ``[N, K]`` in 4 bits, as any device takes it.

    Attributes:
        values: two weights a byte, the even column in the high half, uint8 ``[N, K / 2]``.
        scales: scale and zero of each group, bfloat16 ``[K / group, N, 2]``.
    """

    values: Tensor
    scales: Tensor

    @property
    def group(self) -> int:
        return 2 * self.values.shape[1] // len(self.scales)


def group_size(columns: int) -> int | None:
    """How many weights of a row of `columns` share a scale, or None where no size divides it."""
    return next((group for group in GROUPS if columns % group == 0), None)


def group_sizes(shapes: list[tuple[int, int]], besides: int = 0) -> list[int]:
    """How many weights share a scale in each layer, given all layers' ``[N, K]`` in their order.

    Where the hidden size is no multiple of 128, most layers have groups of 64 and those that read
    the MLP's wider states, which are hurt most by rounding, would have coarser ones. They get the
    same from the last layer on, as far as `MOST_BYTES` go.

    Args:
        besides: bytes that a draft reads beside the copies.
    """
    groups = [group_size(columns) or GROUPS[-1] for _, columns in shapes]
    finest = min(groups, default=0)
    widest = max((columns for _, columns in shapes), default=0)
    spare = MOST_BYTES * sum(rows * columns for rows, columns in shapes) - besides
    spare -= sum(nbytes(*shape, group) for shape, group in zip(shapes, groups))
    for index in reversed(range(len(shapes))):
        rows, columns = shapes[index]
        more = nbytes(rows, columns, finest) - nbytes(rows, columns, groups[index])
        if rows < columns == widest and 0 < more <= spare:
            groups[index], spare = finest, spare - more
    return groups


def no_kernel(device: torch.device) -> str | None:
    """Why there is no 4-bit matmul on a device, or None."""
    if device.type == "meta":
        return "weights are offloaded"
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "4-bit matmul on a GPU takes Triton, which is not installed"
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and capability < (8, 0):
            return "4-bit matmul takes a GPU of compute capability 8.0 or newer"
        return None
    return None if device.type == "cpu" else f"there is no 4-bit matmul on {device.type}"


def refusal(weight: Tensor, device: torch.device | None = None) -> str | None:
    """Why a weight ``[N, K]`` cannot have a 4-bit copy, or None.

    Args:
        device: of the copy; None: the weight's.
    """
    if type(weight.data) not in PLAIN:
        return f"a weight of type {type(weight.data).__name__}"
    if weight.dtype not in FLOATS:
        return f"a weight of {str(weight.dtype).removeprefix('torch.')}"
    rows, columns = weight.shape
    if rows % ROWS or group_size(columns) is None:
        return f"[{rows}, {columns}], where the kernel takes multiples of [{ROWS}, {GROUPS[-1]}]"
    return no_kernel(weight.device if device is None else device)


def nbytes(rows: int, columns: int, group: int | None = None) -> int:
    """Of the 4-bit copy of ``[rows, columns]`` weights, scales and zeros included."""
    group = group or group_size(columns)
    assert group is not None
    return rows * columns // 2 + 4 * rows * (columns // group)


def temporary_bytes(rows: int, columns: int, group: int | None = None) -> int:
    """What making the copy takes besides, at most: chunks in float32, and the copy unpacked."""
    return 24 * min(max(CHUNK, 64 * columns), rows * columns) + nbytes(rows, columns, group)


def quantize(
    weight: Tensor,
    importance: Tensor | None = None,
    mean: Tensor | None = None,
    group: int | None = None,
) -> Quantized:
    """Round a weight ``[N, K]`` of any float dtype to 4 bits, where it is.

    Args:
        importance: of each column, float32 ``[K]``, positive, with a mean of 1: the mean squares
            of what it is multiplied with. None: all count alike.
        mean: of what each column is multiplied with, float32 ``[K]``, in the same units; None: 0.
        group: how many weights share a scale, one of `GROUPS` that divides K; None: the first.
    """
    columns = weight.shape[1]
    group = group or group_size(columns)
    assert group is not None and columns % group == 0
    about = [
        None if x is None else x.to(weight.device).unflatten(0, (-1, group))
        for x in (importance, mean)
    ]
    rows = _chunk_rows(columns)
    if weight.device.type == "cpu":
        rows = max(1, min(rows, FITTED // columns))
    parts = [_quantize(chunk, group, *about) for chunk in weight.split(rows)]
    values, scales = zip(*parts)
    return Quantized(torch.cat(values), torch.cat(scales, dim=1))


def _chunk_rows(columns: int) -> int:
    # In whole packing blocks of every device, so that packed chunks are what the whole would be.
    return max(64, CHUNK // columns // 64 * 64)


def _quantize(
    weight: Tensor, group: int, importance: Tensor | None, mean: Tensor | None
) -> tuple[Tensor, Tensor]:
    groups = weight.detach().float().contiguous().unflatten(1, (-1, group))
    q, scale, zero = fit(groups, importance, mean)
    pairs = q.flatten(1).view(torch.int16)  # the even column in the low byte
    values = (pairs << 4).bitwise_or_(pairs >> 8).to(torch.int8).view(torch.uint8)
    return values, torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous()


def dequantize(quantized: Quantized) -> Tensor:
    """The weights that a 4-bit copy stands for, float32 ``[N, K]``."""
    scale, zero = quantized.scales.float().transpose(0, 1).unbind(-1)
    groups = _unpacked(quantized.values).float().unflatten(1, (-1, quantized.group))
    return ((groups - 8) * scale[..., None] + zero[..., None]).flatten(1)


def _unpacked(values: Tensor) -> Tensor:
    return torch.stack((values >> 4, values & 15), dim=-1).flatten(1)


def pack(values: Tensor, group: int, out: Tensor | None = None) -> Tensor:
    """`Quantized.values` in the order in which the matmul of their device reads them.

    Args:
        out: where to, ``[N, K / 2]``; anew where None.
    """
    out = torch.empty_like(values) if out is None else out
    rows = _chunk_rows(2 * values.shape[1])
    for chunk, into in zip(values.split(rows), out.split(rows)):
        into.copy_(sk.pack_int4(chunk, group))
    return out


def reads_slices(device: torch.device) -> bool:
    """Whether the matmul of a device reads a layer's share of several layers' scales in place."""
    return device.type == "cuda"


def linear(input: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` with packed weights, in bfloat16 whatever the input's dtype.

    Args:
        input: ``[..., K]``.
        packed: of `pack`, ``[N, K]`` before.
        scales: of `Quantized`.
    """
    return sk.int4_linear(input.contiguous(), packed, scales, bias)

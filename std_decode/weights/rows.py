"""Rows of a matrix in 8 bits: of an embedding and an LM head, drafts read a few at a time."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 22  # numbers that are rounded at a time


class Rows:
    """A matrix ``[V, K]`` of which rows are read: in 8 bits, with a scale for each row.

    Attributes:
        values: int8 ``[V, K]``.
        scales: float32 ``[V, 1]``.
    """

    def __init__(self, weight: Tensor):
        self.dtype = weight.dtype
        self.values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        self.scales = torch.empty(len(weight), 1, device=weight.device)
        rows = max(1, CHUNK // weight.shape[1])
        for start in range(0, len(weight), rows):
            chunk = weight[start : start + rows].float()
            scales = chunk.abs().amax(dim=1, keepdim=True).clamp_(min=1e-30) / 127
            self.values[start : start + rows] = (chunk / scales).round_()
            self.scales[start : start + rows] = scales

    def __getitem__(self, rows: Tensor) -> Tensor:
        return (self.values[rows] * self.scales[rows]).to(self.dtype)

    def same(self, other: Rows) -> bool:
        return torch.equal(self.values, other.values) and torch.equal(self.scales, other.scales)

    @staticmethod
    def planned_bytes(weight: Tensor) -> int:
        return weight.numel() + 4 * len(weight)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

"""The ops of a decoder layer around its products, in plain PyTorch: the operators of transformers'
eager layers in their order, so with their bits.

A row's bits do not depend on the rows beside it. Nothing is read on the host.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_rms_norm(
    residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sum, and the norm of it."""
    if delta is None:
        total = residual.clone(memory_format=torch.contiguous_format)
    else:
        total = residual + _product(delta, bias, residual.dtype)
    return total.contiguous(), _rms_norm(total, weight, eps).contiguous()


def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """The rotated queries; keys and values go to their slots."""
    B, Hkv, _, D = keys.shape
    heads = _product(qkv, bias, keys.dtype).view(B, slots.shape[1], -1, D)
    query, key, value = heads.split([heads.shape[2] - 2 * Hkv, Hkv, Hkv], dim=2)
    if q_norm is not None and k_norm is not None:
        query, key = _rms_norm(query, q_norm, eps), _rms_norm(key, k_norm, eps)
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    rows = torch.arange(B, device=slots.device)[:, None]
    keys[rows, :, slots] = key
    values[rows, :, slots] = value
    return query.transpose(1, 2).contiguous()


def silu_mul(gate_up: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A row at a time: PyTorch takes the last few elements of a tensor by another exponential."""
    gate, up = _product(gate_up, bias, dtype).chunk(2, dim=-1)
    rows = [F.silu(row.contiguous()) for row in gate.split(1)]
    return (torch.cat(rows) if rows else gate) * up


def _product(product: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A product as the model has it, of its partials where it is given so."""
    if product.dim() == 3:
        parts = product.unbind()
        product = parts[0]
        for part in parts[1:]:
            product = product + part
    if bias is not None:
        product = product.float() + bias.float()
    return product.to(dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + eps)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads ``[B, T, H, D]`` by cos and sin ``[B, T, Dr]``."""
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    halves = torch.cat((-second, first), dim=-1)
    rotated = rotated * cos[:, :, None] + halves * sin[:, :, None]
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated

"""Products with weights of 4 bits, as drafts read them.

    out[.., n] = sum over k of input[.., k] * ((q[n, k] - 8) * scale[k // g, n] + zero[k // g, n])

Along each row of the weight, groups of g = 128, 64 or 32 share a scale and a zero, both bfloat16,
and q is 0 to 15: the format of PyTorch's own 4-bit matmul, 0.53 bytes a weight at g = 128. The
order in which `pack_int4` lays the values out is the device's own.
"""

import torch
from torch import Tensor

from std_kernels._checks import check_no_grad, check_tensor
from std_kernels._errors import (
    bad_dtype,
    bad_shape,
    bad_stride,
    bad_type,
    bad_value,
    not_a_tensor,
)
from std_kernels._library import INTERPRETING, register

GROUPS = (128, 64, 32)
ROWS = 16  # a weight has a multiple of
SLICE = 64  # what of a packed weight is cut out begins and ends at multiples of
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_KERNELS = "std_kernels._int4_linear_kernels"


def _pack(values: Tensor, group: int) -> Tensor:
    q = torch.stack((values >> 4, values & 15), dim=-1).flatten(1)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 2)


def _product(input: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    rows = input.reshape(-1, input.shape[-1]).to(torch.bfloat16).contiguous()
    group = input.shape[-1] // len(scales)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group, scales.contiguous())


def _linear(input: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    product = _product(input, packed, scales).view(*input.shape[:-1], len(packed))
    product = product.to(input.dtype)
    return product if bias is None else product + bias


def _partials(input: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return _product(input, packed, scales).float()[None]


def _fake_partials(input: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    R, K, N = input.numel() // input.shape[-1], input.shape[-1], len(packed)
    S = 1
    if input.is_cuda or INTERPRETING:
        from std_kernels._int4_linear_kernels import splits

        S = splits(input.device, R, int(N), int(K), int(K // len(scales)))
    return input.new_empty((S, R, N), dtype=torch.float32)


_PACK = register(
    "pack_int4(Tensor values, int group) -> Tensor",
    _pack,
    lambda values, group: torch.empty_like(values, memory_format=torch.contiguous_format),
    _KERNELS,
)
_LINEAR = register(
    "int4_linear(Tensor input, Tensor packed, Tensor scales, Tensor? bias) -> Tensor",
    _linear,
    lambda input, packed, scales, bias: input.new_empty((*input.shape[:-1], len(packed))),
    _KERNELS,
)
_PARTIALS = register(
    "int4_linear_partials(Tensor input, Tensor packed, Tensor scales) -> Tensor",
    _partials,
    _fake_partials,
    _KERNELS,
)


def pack_int4(values: Tensor, group: int) -> Tensor:
    """Lays 4-bit values out as `int4_linear` reads them where they are.

    Rows from a to b of what it returns, both multiples of 64 (or b = N), are what it would return
    for those rows alone: several weights can be packed as one and each be a view of it.

    Args:
        values: [N, K / 2] uint8, two a byte, the even column in the high half. N a multiple of
            16, K of `group`.
        group: how many columns share a scale: 128, 64 or 32.

    Returns:
        [N, K / 2] uint8, contiguous, in an order of the device's own. It is good for this device
        and this `group` alone.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, stride or group.

    Note:
        On the CPU the order is that of PyTorch's `_convert_weight_to_int4pack_for_cpu`, which
        goes by the CPU's instructions. Takes 8 bytes a value while it runs there, 3 on a GPU.
    """
    op = "pack_int4"
    if not isinstance(values, Tensor):
        raise not_a_tensor(op, "values", values, "a uint8 tensor [N, K / 2]")
    if values.dtype is not torch.uint8:
        raise bad_dtype(op, "values", values, "uint8 [N, K / 2]")
    if not isinstance(group, int):
        found = f"is of type {type(group).__name__}"
        raise bad_type(op, "group", found, "an int", "pass 128, 64 or 32")
    if group not in GROUPS:
        raise bad_value(op, "group", f"is {group}", "128, 64 or 32", "quantise in such groups")
    if values.dim() != 2 or values.shape[0] % ROWS or 2 * values.shape[1] % group:
        expected = f"[N, K / 2] with N a multiple of {ROWS} and K of group = {group}"
        raise bad_shape(op, "values", values, expected, "keep such a weight as it is")
    if values.stride(-1) != 1 and values.shape[1] > 1:
        raise bad_stride(op, "values", values)
    return _PACK(values, group)


def int4_linear(
    input: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Multiplies with a 4-bit weight, as ``F.linear`` does with a whole one.

    Args:
        input: [..., K] float16, bfloat16 or float32. It is rounded to bfloat16.
        packed: [N, K / 2] uint8 from `pack_int4` on input's device, or a slice of its rows that
            begins and ends at multiples of 64.
        scales: [K / g, N, 2] bfloat16, scale and zero of each group, inner strides 2 and 1. A
            slice along N is read where it is on a GPU, and copied on the CPU.
        bias: [N] in input's dtype, or None.

    Returns:
        [..., N] in input's dtype.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device or stride.
        RuntimeError: an input requires grad while gradients are enabled; there is no backward.

    Note:
        One row takes multiply-adds of float32; more take bfloat16 products of the weights rounded
        to that, summed in float32, the weights being read again for each 32 rows. On a GPU K is
        split by the device, the weight and the number of rows (1, to 16, more), so that a row's
        bits do not depend on what else the call has; two launches where it is split, one where it
        is not. The CPU path is PyTorch's `_weight_int4pack_mm_for_cpu`, whose product is rounded
        to bfloat16.
    """
    _check("int4_linear", input, packed, scales)
    if bias is not None:
        N = len(packed)
        check_tensor("int4_linear", "bias", bias, input, input.dtype, (N,), "[N]")
    check_no_grad("int4_linear", input, scales, bias)
    return _LINEAR(input, packed, scales, bias)


def int4_linear_partials(input: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """The same product before its parts are added, for a consumer that adds them as it reads.

    Args:
        input, packed, scales: see `int4_linear`.

    Returns:
        [S, R, N] float32, R the number of rows of input and S that of the parts of K. Summed over
        S in ascending order and rounded once they are `int4_linear` without a bias. S depends on
        the device, N, K and on whether R is 1, at most 16 or more; on the CPU it is 1.

    Raises:
        As `int4_linear`.

    Note:
        One launch, 4 * S * R * N bytes written.
    """
    _check("int4_linear_partials", input, packed, scales)
    check_no_grad("int4_linear_partials", input, scales)
    return _PARTIALS(input, packed, scales)


def _check(op: str, input: Tensor, packed: Tensor, scales: Tensor) -> None:
    if not isinstance(input, Tensor):
        raise not_a_tensor(op, "input", input, "a tensor [..., K]")
    if input.dtype not in _FLOATS:
        raise bad_dtype(op, "input", input, "float16, bfloat16 or float32")
    if not input.dim() or not input.shape[-1] or input.shape[-1] % GROUPS[-1]:
        expected = f"[..., K] with K a multiple of {GROUPS[-1]}"
        raise bad_shape(op, "input", input, expected, "keep such a weight as it is")
    if input.stride(-1) != 1:
        raise bad_stride(op, "input", input)
    if not isinstance(packed, Tensor):
        raise not_a_tensor(op, "packed", packed, "a uint8 tensor [N, K / 2] from pack_int4")
    if packed.dim() != 2 or packed.shape[0] % ROWS:
        expected = f"[N, K / 2] with N a multiple of {ROWS}"
        raise bad_shape(op, "packed", packed, expected, "pass what pack_int4 returns")
    N, K = packed.shape[0], input.shape[-1]
    check_tensor(op, "packed", packed, input, torch.uint8, (N, K // 2), "[N, K / 2]")
    if not packed.is_contiguous():
        raise bad_stride(op, "packed", packed)
    if not isinstance(scales, Tensor):
        raise not_a_tensor(op, "scales", scales, "a bfloat16 tensor [K / g, N, 2]")
    if scales.dim() != 3 or not len(scales) or K % len(scales) or K // len(scales) not in GROUPS:
        expected = f"[K / g, N, 2] with K = {K} and g of 128, 64 or 32"
        raise bad_shape(op, "scales", scales, expected, "pass the scales of packed")
    shape = (len(scales), N, 2)
    check_tensor(op, "scales", scales, input, torch.bfloat16, shape, "[K / g, N, 2]")
    if scales.stride(1) != 2 or scales.stride(0) % 32:
        raise bad_stride(op, "scales", scales)

"""The Triton kernel of rope_write: a head of a token in each program."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from std_kernels._device import (
    ROW_UNIT,
    Spec,
    aot_spec,
    cast,
    in_units,
    padded,
    partials,
    product_of,
    rms_scale,
    row_unit,
)
from std_kernels._tuning import Row, arch_of, config, precision


@triton.jit
def _head(product_ptr, n, keep, stride_s, bias_ptr, S: tl.constexpr, dtype: tl.constexpr):
    """Features n of a row of the product, as the model has them."""
    return cast(product_of(product_ptr, 0, keep, stride_s, bias_ptr, n, S), dtype).to(tl.float32)


@triton.jit
def _of_either(q_norm_ptr, k_norm_ptr, d, of_query, of_key):
    """A head norm's weights: of queries or of keys, where the other mask is empty."""
    weight = tl.load(q_norm_ptr + d, mask=of_query, other=0.0).to(tl.float32)
    return weight + tl.load(k_norm_ptr + d, mask=of_key, other=0.0).to(tl.float32)


@triton.jit
def _normed(x, scale, weight, dtype: tl.constexpr):
    return cast(cast(x * scale, dtype).to(tl.float32) * weight, dtype).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        *("T", "HQ", "stride_qkv_s", "stride_qkv_r", "stride_slots_b", "stride_slots_t"),
        *("stride_cos_b", "stride_cos_t", "stride_sin_b", "stride_sin_t", "eps", "inverse"),
    ],
    do_not_specialize_on_alignment=["cos_ptr", "sin_ptr", "slots_ptr", "bias_ptr"],
)
def _rope_write_kernel(
    qkv_ptr, bias_ptr,  # [B * T, (HQ + 2 HKV) D] or [S, ...], [(HQ + 2 HKV) D] or None
    cos_ptr, sin_ptr,  # [B, T, ROTARY]; a stride of 0 where one row serves all
    q_norm_ptr, k_norm_ptr,  # [D] or None
    slots_ptr,  # [B, T]
    query_ptr,  # [B, HQ, T, D], contiguous
    keys_ptr, values_ptr,  # [B, HKV, N, D]
    stride_qkv_s, stride_qkv_r,
    stride_cos_b, stride_cos_t, stride_sin_b, stride_sin_t, stride_slots_b, stride_slots_t,
    stride_keys_b, stride_keys_h, stride_keys_n,
    stride_values_b, stride_values_h, stride_values_n,
    T, HQ, eps, inverse,  # inverse: 1 / D
    HKV: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr,
    S: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    r, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, t = r // T, r % T
    d = tl.arange(0, BLOCK_D)
    keep = d < D
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    stride_s = in_units(stride_qkv_s, UNIT)
    qkv_ptr += r * in_units(stride_qkv_r, UNIT)
    slot = tl.load(slots_ptr + b * stride_slots_b + t * stride_slots_t)
    first = head * D
    x = _head(qkv_ptr, first + d, keep, stride_s, bias_ptr, S, dtype)
    # Without branches: loads and stores that a head has none of are masked.
    is_query, is_value = head < HQ, head >= HQ + HKV
    is_key = (head >= HQ) & (head < HQ + HKV)
    half: tl.constexpr = ROTARY // 2
    # Bounds, not `keep & is_key`: of a scalar, Triton 3.9's interpreter makes a mask of integers.
    turned = d < tl.where(is_value, 0, ROTARY)
    queries, keys = tl.where(is_query, D, 0), tl.where(is_key, D, 0)
    other = tl.where(d < half, d + half, d - half)
    y = _head(qkv_ptr, first + other, turned, stride_s, bias_ptr, S, dtype)
    if q_norm_ptr is not None:
        scale = rms_scale(x, inverse, eps)
        weight = _of_either(q_norm_ptr, k_norm_ptr, d, d < queries, d < keys)
        x = tl.where(is_value, x, _normed(x, scale, weight, dtype))
        queried, keyed = tl.where(is_query, ROTARY, 0), tl.where(is_key, ROTARY, 0)
        weight = _of_either(q_norm_ptr, k_norm_ptr, other, d < queried, d < keyed)
        y = _normed(y, scale, weight, dtype)
    cos = tl.load(cos_ptr + b * stride_cos_b + t * stride_cos_t + d, mask=turned, other=1.0)
    sin = tl.load(sin_ptr + b * stride_sin_b + t * stride_sin_t + d, mask=turned, other=0.0)
    y = tl.where(d < half, -y, y)
    # By fma with 0, so that no compiler fuses a float32 product with the sum: eager rounds it.
    one = cast(tl.fma(x, cos.to(tl.float32), tl.zeros_like(x)), dtype).to(tl.float32)
    two = cast(tl.fma(y, sin.to(tl.float32), tl.zeros_like(y)), dtype).to(tl.float32)
    x = cast(tl.where(turned, one + two, x), dtype)
    tl.store(query_ptr + ((b * HQ + head) * T + t) * D + d, x, mask=d < queries)
    at = b * stride_keys_b + (head - HQ).to(tl.int64) * stride_keys_h + slot * stride_keys_n
    tl.store(keys_ptr + at + d, x, mask=d < keys)
    at = b * stride_values_b + (head - HQ - HKV).to(tl.int64) * stride_values_h
    tl.store(values_ptr + at + slot * stride_values_n + d, x, mask=d < tl.where(is_value, D, 0))


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
    """One launch; the arguments are those of the op's schema."""
    B, Hkv, _, D = keys.shape
    T, heads = slots.shape[1], qkv.shape[-1] // D
    query = keys.new_empty((B, heads - 2 * Hkv, T, D))
    if not query.numel():
        return query
    tile = config("rope_write", "head", arch_of(keys.device), precision(keys.dtype), D, Hkv)
    S, stride_r, stride_s = partials(qkv)
    one_row = cos.shape[0] == 1
    options: dict[str, Any] = dict(
        HKV=Hkv, D=D, ROTARY=cos.shape[2], S=S, BLOCK_D=padded(D),
        UNIT=row_unit(stride_r, stride_s),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    _rope_write_kernel[(B * T, heads)](
        qkv, bias, cos, sin, q_norm, k_norm, slots, query, keys, values, stride_s, stride_r,
        0 if one_row else cos.stride(0), cos.stride(1),
        0 if one_row else sin.stride(0), sin.stride(1), *slots.stride(),
        *keys.stride()[:3], *values.stride()[:3], T, heads - 2 * Hkv, eps, 1 / D, **options,
    )  # fmt: skip
    return query


def aot_specs(arch: str, dtype: str, row: Row) -> list[Spec]:
    """Plain, with head norms, and of 7 partials with a bias."""
    half, D = f"*{dtype}", row.head_dim
    types = {f"{x}_ptr": half for x in ("qkv", "cos", "sin", "query", "keys", "values")}
    strides = ["qkv_s", "qkv_r", *(f"{x}_{i}" for x in ("cos", "sin", "slots") for i in "bt")]
    strides += [f"{x}_{i}" for x in ("keys", "values") for i in "bhn"]
    types |= dict.fromkeys((f"stride_{name}" for name in strides), "i32")
    types |= dict(slots_ptr="*i64", T="i32", HQ="i32", eps="fp32", inverse="fp32")
    fixed: dict = dict(HKV=4, D=D, ROTARY=D, BLOCK_D=padded(D), UNIT=ROW_UNIT)
    specs = []
    for S, given in (
        (0, {}),
        (0, dict(q_norm_ptr=half, k_norm_ptr=half)),
        (7, dict(qkv_ptr="*fp32", bias_ptr=half)),
    ):
        absent = dict.fromkeys({"q_norm_ptr", "k_norm_ptr", "bias_ptr"} - set(given))
        constants = fixed | absent | dict(S=S)
        specs.append(aot_spec(_rope_write_kernel, types | given, constants, *row[7:9]))
    return specs

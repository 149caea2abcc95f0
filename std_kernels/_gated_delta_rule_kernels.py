"""The Triton kernel of gated_delta_rule and its launcher.

A program has BLOCK_V columns of one head's state in registers, from the stored state to the last
token. All sums are over the state's other dim, so programs have nothing to tell each other. With
eight columns and one warp, the 32 heads of Qwen3.5-27B at B = 1 are 512 programs.
"""

import triton
import triton.language as tl
from torch import Tensor

from std_kernels import _tuning
from std_kernels._device import Spec, aot_spec, cast, check_grid, padded

_COMPILED = (64, 120, 128, 256)  # head dims, ahead of time


@triton.jit
def _unit(x):
    """x [BLOCK_K] divided by its length."""
    return x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)


@triton.jit
def _token(
    n, start, stop, P,
    query_ptr, key_ptr, value_ptr, g_ptr, beta_ptr,  # of this row and head
    stride_query_t, stride_key_p, stride_value_p, stride_g_p, stride_beta_p,
    k, v, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Token n's inputs, as they are in memory; zeros beyond the last."""
    some = n < stop
    slot = (n % P).to(tl.int64)
    # Bounds, not `some & ...`: of a scalar, Triton 3.9's interpreter makes a mask of integers.
    keys, values = tl.where(some, DK, 0), tl.where(some, DV, 0)
    key = tl.load(key_ptr + slot * stride_key_p + k, mask=k < keys, other=0.0)
    value = tl.load(value_ptr + slot * stride_value_p + v, mask=v < values, other=0.0)
    g = tl.load(g_ptr + slot * stride_g_p, mask=some, other=0.0)
    beta = tl.load(beta_ptr + slot * stride_beta_p, mask=some, other=0.0)
    at = query_ptr + (n - start).to(tl.int64) * stride_query_t + k
    query = tl.load(at, mask=k < tl.where(n >= start, keys, 0), other=0.0)
    return query, key, value, g, beta


@triton.jit(
    do_not_specialize=[
        "T", "P", "stride_query_b", "stride_query_t", "stride_key_b", "stride_key_p",
        "stride_value_b", "stride_value_p", "stride_g_b", "stride_g_p", "stride_beta_b",
        "stride_beta_p",
    ],
    do_not_specialize_on_alignment=[
        "query_ptr", "key_ptr", "value_ptr", "g_ptr", "beta_ptr", "state_len_ptr", "kv_len_ptr"
    ],
)  # fmt: skip
def _gated_delta_rule_kernel(
    query_ptr, key_ptr, value_ptr,  # [B, T, Hk, Dk], [B, P, Hk, Dk], [B, P, Hv, Dv]
    g_ptr, beta_ptr, state_ptr,  # [B, P, Hv], [B, P, Hv], [B, Hv, Dk, Dv] float32
    state_len_ptr, kv_len_ptr, out_ptr,  # [B], [B], [B, T, Hv, Dv]
    stride_query_b, stride_query_t, stride_key_b, stride_key_p, stride_value_b, stride_value_p,
    stride_g_b, stride_g_p, stride_beta_b, stride_beta_p,
    T, P,
    scale,
    HK: tl.constexpr, HV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    """Grid (pieces of Dv, B * Hv)."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // HV, bh % HV
    k = tl.arange(0, BLOCK_K)
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    stop = tl.load(kv_len_ptr + b)
    start = stop - T
    first = tl.minimum(tl.load(state_len_ptr + b), start)
    query_ptr += b * stride_query_b + h // (HV // HK) * D
    key_ptr += b * stride_key_b + h // (HV // HK) * D
    value_ptr += b * stride_value_b + h * DV
    g_ptr += b * stride_g_b + h
    beta_ptr += b * stride_beta_b + h
    out_ptr += (b * T * HV + h) * DV + v
    inside = (k < D)[:, None] & (v < DV)[None, :]
    state_at = state_ptr + bh * (D * DV) + k[:, None] * DV + v[None, :]
    state = tl.load(state_at, mask=inside, other=0.0)  # [BLOCK_K, BLOCK_V]

    # Inputs are asked for one token ahead: a token's arithmetic is as long as its trip to memory.
    query, key, value, g, beta = _token(
        first, start, stop, P, query_ptr, key_ptr, value_ptr, g_ptr, beta_ptr, stride_query_t,
        stride_key_p, stride_value_p, stride_g_p, stride_beta_p, k, v, D, DV,
    )  # fmt: skip
    # One loop for tokens old and new: so one's bits cannot depend on which of them it is.
    for n in tl.range(first, stop):
        if UPDATE:
            if (n == start) & (start > first):
                tl.store(state_at, state, mask=inside)
        unit = _unit(key.to(tl.float32))
        asked = _unit(query.to(tl.float32)) * scale
        target, decay, rate = value.to(tl.float32), tl.exp(g), beta.to(tl.float32)
        query, key, value, g, beta = _token(
            n + 1, start, stop, P, query_ptr, key_ptr, value_ptr, g_ptr, beta_ptr, stride_query_t,
            stride_key_p, stride_value_p, stride_g_p, stride_beta_p, k, v, D, DV,
        )  # fmt: skip
        # Products that are summed by fma: so no compiler contracts them here and not there.
        keys = tl.broadcast_to(unit[:, None], state.shape)
        state = tl.fma(state, tl.full(state.shape, 0.0, tl.float32) + decay, 0.0)
        delta = (target - tl.sum(tl.fma(state, keys, 0.0), 0)) * rate
        state = tl.fma(keys, tl.broadcast_to(delta[None, :], state.shape), state)
        out = tl.sum(tl.fma(state, tl.broadcast_to(asked[:, None], state.shape), 0.0), 0)
        at = out_ptr + (n - start).to(tl.int64) * (HV * DV)
        tl.store(at, cast(out, out_ptr.dtype.element_ty), mask=v < tl.where(n >= start, DV, 0))


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    state_len: Tensor,
    kv_len: Tensor,
    update: bool,
) -> Tensor:
    """One launch; the arguments are those of the op's schema."""
    B, T, Hk, Dk = query.shape
    P, Hv, Dv = value.shape[1:]
    out = query.new_empty((B, T, Hv, Dv))
    if not out.numel():
        return out
    check_grid("gated_delta_rule", B, Hv)
    arch, precision = _tuning.arch_of(query.device), _tuning.precision(query.dtype)
    row = _tuning.config("gated_delta_rule", "state", arch, precision, 0, Dv)
    _gated_delta_rule_kernel[(triton.cdiv(Dv, row.block_n), B * Hv)](
        query, key, value, g, beta, state, state_len, kv_len, out,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *g.stride()[:2],
        *beta.stride()[:2], T, P, Dk**-0.5, HK=Hk, HV=Hv, D=Dk, DV=Dv, BLOCK_K=padded(Dk),
        BLOCK_V=row.block_n, UPDATE=update, num_warps=row.num_warps, num_stages=row.num_stages,
    )  # fmt: skip
    return out


def aot_specs(arch: str, dtype: str, row: _tuning.Row) -> list[Spec]:
    """A pass that stores the state, and a draft, of heads as Qwen3.5 has them."""
    half = f"*{dtype}"
    types = dict.fromkeys(("query_ptr", "key_ptr", "value_ptr", "beta_ptr", "out_ptr"), half)
    types |= dict.fromkeys(("g_ptr", "state_ptr"), "*fp32")
    types |= dict.fromkeys(("state_len_ptr", "kv_len_ptr"), "*i32")
    types |= dict.fromkeys((f"stride_query_{x}" for x in "bt"), "i32")
    names = ("key", "value", "g", "beta")
    types |= dict.fromkeys((f"stride_{name}_{x}" for name in names for x in "bp"), "i32")
    types |= dict(T="i32", P="i32", scale="fp32")
    tile = row.config()
    launch = tile.num_warps, tile.num_stages
    heads = dict(HK=16, HV=32, BLOCK_V=tile.block_n)
    return [
        aot_spec(
            _gated_delta_rule_kernel,
            types,
            heads | dict(D=D, DV=D, BLOCK_K=padded(D), UPDATE=update),
            *launch,
        )
        for D in _COMPILED
        for update in (True, False)
    ]

"""What kernels share: arithmetic that is right on a GPU and in the interpreter, the merge of
split partials, and the description of a kernel that compiles it without a GPU.

Logits are in base 2 (`exp2` is one instruction, `exp` two) until a result is stored. The mul-adds
are written as `tl.fma`, so that no compiler contracts them in one place and not in another.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_wait

from std_kernels._errors import bad_value

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
# Triton compares every global constant of a kernel with its value at compile time at each launch,
# 0.5 us a piece on the host. Kernels of a decode step write them out, those of prefill name them.
LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))
# The running maximum before any key: finite, so that no difference is inf - inf.
NO_KEY = tl.constexpr(-1.0e30)
# A partial row is BLOCK_D values, its lse and padding: one buffer, rows aligned to 16 bytes.
PARTIAL_PAD = 4


# A head dim is a multiple of UNIT, and so are the strides of dense rows: all that 16-byte loads of
# 16-bit values need. Triton looks for multiples of 16 by itself.
UNIT = 8
# Rows of features are longer, and all but a few models have multiples of this.
ROW_UNIT = 16


@triton.jit
def in_units(stride, UNIT: tl.constexpr):
    """`stride`, a multiple of UNIT by promise of the launcher, in a form that shows it."""
    if UNIT == 1:
        return stride
    else:
        return stride // UNIT * UNIT


@triton.jit
def load_query(
    query_ptr, b, first_head, t, g, T, stride_b, stride_h, stride_t, d, D: tl.constexpr
):
    """Rows of tokens t of T and heads first_head + g, zeros for tokens beyond: [rows, BLOCK_D]."""
    stride_h = in_units(stride_h, 8)
    at = t.to(tl.int64) * in_units(stride_t, 8) + g.to(tl.int64) * stride_h
    at += b * in_units(stride_b, 8) + first_head * stride_h
    return tl.load(
        query_ptr + at[:, None] + d[None, :],
        mask=(t < T)[:, None] & (d < D)[None, :],
        other=0.0,
    )


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32, with no rounding of float32 inputs to tf32."""
    if INTERPRET:
        # The interpreter's tl.dot multiplies the bit patterns of bfloat16, which it holds as raw
        # bits, and is a BLAS call that rounds a row by where it stands in the tile.
        a, b = a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64)
        return acc + tl.sum(a[:, :, None] * b[None, :, :], 1).to(tl.float32)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Float32 to `dtype`, to nearest even: the interpreter truncates on the way to bfloat16."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def tanh(x):
    """To about 2 ulp. The hardware's own has 11 bits, and libdevice's is not interpreted."""
    square = x * x
    # Cephes tanhf below 0.625, where 1 - 2 / (e^2x + 1) would cancel.
    poly = tl.fma(square, tl.full(x.shape, -5.70498872745e-3, tl.float32), 2.06390887954e-2)
    poly = tl.fma(square, poly, -5.37397155531e-2)
    poly = tl.fma(square, poly, 1.33314422036e-1)
    poly = tl.fma(square, poly, -3.33332819422e-1)
    small = tl.fma(x, square * poly, x)
    size = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp2(size * (2.0 * 1.4426950408889634)) + 1.0)
    return tl.where(size < 0.625, small, tl.where(x < 0.0, -large, large))


@triton.jit
def exp(x):
    """PyTorch's own exponential on a GPU, to the bit; libdevice is not interpreted."""
    if INTERPRET:
        return tl.exp(x)
    else:
        return libdevice.exp(x)


@triton.jit
def product_of(product_ptr, at, keep, stride_s, bias_ptr, n, S: tl.constexpr):
    """Features n of a row of a product, which begin at `at`, in float32: [BLOCK].

    With S > 0 the sum of S float32 partials, ascending. The caller rounds it.
    """
    x = tl.load(product_ptr + at + n, mask=keep, other=0.0).to(tl.float32)
    for s in tl.static_range(1, S):
        x += tl.load(product_ptr + s * stride_s.to(tl.int64) + at + n, mask=keep, other=0.0)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + n, mask=keep, other=0.0).to(tl.float32)
    return x


@triton.jit
def rms_scale(x, inverse, eps):
    """1 / sqrt(mean(x^2) + eps) of a row x [BLOCK] with zeros beyond its end.

    PyTorch's mean on a GPU multiplies by 1 / count. The fma with 0 keeps a compiler from fusing
    that product with the sum behind it.
    """
    return tl.rsqrt(tl.fma(tl.sum(x * x, 0), inverse, 0.0) + eps)


@triton.jit
def base2_logits(product, scale, softcap):
    """Logits of a query-key product, times log2(e); see `logit_scales` for the two factors."""
    if softcap is None:
        return product * scale
    else:
        return tanh(product * scale) * softcap


def logit_scales(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """The factors that `base2_logits` takes for an op's `scale` and `softcap`."""
    log2e = 1.4426950408889634
    return (scale * log2e, None) if softcap is None else (scale / softcap, softcap * log2e)


@triton.jit
def visible_range(b, kv_len_ptr, kv_start_ptr, T, window):
    """First key that any of row b's T queries sees, and one past the last."""
    stop = tl.load(kv_len_ptr + b)
    start = 0
    if kv_start_ptr is not None:
        start = tl.maximum(tl.load(kv_start_ptr + b), 0)
    if window is not None:
        start = tl.maximum(start, stop - T - window + 1)
    return start, stop


@triton.jit
def online_softmax(x, top, total):
    """One step of the running softmax over base-2 logits x [M, N], masked ones -inf.

    Returns the weights [M, N], the factor for what was accumulated so far, and the new top and
    total. A tile that a row sees nothing of leaves the row's bits as they were: weights 0,
    factor 1.
    """
    new_top = tl.maximum(top, tl.max(x, 1))
    weights = tl.exp2(x - new_top[:, None])
    factor = tl.exp2(top - new_top)
    return weights, factor, new_top, tl.fma(total, factor, tl.sum(weights, 1))


@triton.jit
def store_partial(partial_ptr, row, keep, acc, top, total, BLOCK_D: tl.constexpr):
    """Writes what one split found for rows `row` [M]: values [M, BLOCK_D] and base-2 lse."""
    STRIDE: tl.constexpr = BLOCK_D + 4  # PARTIAL_PAD
    d = tl.arange(0, BLOCK_D)
    seen = total > 0.0
    some = tl.where(seen, total, 1.0)
    lse = tl.where(seen, top + tl.log2(some), float("-inf"))
    values = acc * (1.0 / some)[:, None]
    at = partial_ptr + row.to(tl.int64) * STRIDE
    tl.store(at[:, None] + d[None, :], values, mask=(keep & seen)[:, None])
    tl.store(at + BLOCK_D, lse, mask=keep)


@triton.jit(
    do_not_specialize=["T", "window", "num_splits"],
    do_not_specialize_on_alignment=["kv_len_ptr", "kv_start_ptr", "sinks_ptr"],
)
def merge_kernel(
    partial_ptr,  # [B * Hkv, num_splits, T * G, BLOCK_D + PARTIAL_PAD]
    kv_len_ptr, kv_start_ptr,  # [B] or None: all num_splits hold something; [B] or None
    sinks_ptr,  # [Hq] or None
    out_ptr, lse_ptr,  # [B, T, Hq, D], [B, Hq, T], both contiguous
    T, window, num_splits,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Merges the splits of one query row, ascending, in blocks at absolute multiples of BLOCK_S.

    A split beyond the row's keys weighs exactly 0 and changes no bit. With PDL the kernel is
    launched while the splits are under way, and waits for them here: its launch costs nothing.
    """
    STRIDE: tl.constexpr = BLOCK_D + 4  # PARTIAL_PAD
    r = tl.program_id(0)
    bh = tl.program_id(1)
    b, h = bh // HKV, bh % HKV
    t, g = r // G, r % G
    d = tl.arange(0, BLOCK_D)
    first = 0
    last = num_splits
    if kv_len_ptr is not None:
        start, stop = visible_range(b, kv_len_ptr, kv_start_ptr, T, window)
        first = start // SPLIT
        last = tl.where(stop > start, tl.cdiv(stop, SPLIT), first)

    top = -1.0e30
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    rows = partial_ptr + (bh.to(tl.int64) * num_splits * (T * G) + r) * STRIDE
    if PDL:
        gdc_wait()
    for s0 in tl.range(first // BLOCK_S * BLOCK_S, last, BLOCK_S, num_stages=3):
        s = s0 + tl.arange(0, BLOCK_S)
        live = (s >= first) & (s < last)
        at = rows + (s - first).to(tl.int64) * (T * G) * STRIDE
        lse = tl.load(at + BLOCK_D, mask=live, other=float("-inf"))  # [BLOCK_S]
        # Asked for beside the lse, not after it: what a split left unwritten is dropped below.
        values = tl.load(at[:, None] + d[None, :], mask=live[:, None], other=0.0)
        values = tl.where((lse > float("-inf"))[:, None], values, 0.0)
        new_top = tl.maximum(top, tl.max(lse, 0))
        weights = tl.exp2(lse - new_top)
        factor = tl.exp2(top - new_top)
        # Exact products by fma: were they multiplied, a compiler might fuse them with the sum, in
        # one copy of the loop and not in another.
        weighted = tl.fma(values, tl.broadcast_to(weights[:, None], values.shape), 0.0)
        acc = tl.fma(acc, factor, tl.sum(weighted, 0))
        total = tl.fma(total, factor, tl.sum(weights, 0))
        top = new_top

    seen = total > 0.0
    nothing = float("-inf")
    if sinks_ptr is not None:
        nothing = tl.load(sinks_ptr + h * G + g)
        sink = nothing * 1.4426950408889634
        new_top = tl.maximum(top, sink)
        factor = tl.exp2(top - new_top)
        acc = acc * factor
        total = tl.fma(total, factor, tl.exp2(sink - new_top))
        top = new_top
    some = tl.where(seen, total, 1.0)
    lse = tl.where(seen, (top + tl.log2(some)) * 0.6931471805599453, nothing)
    out = tl.where(seen, acc * (1.0 / some), 0.0)
    head = h * G + g
    at = (b.to(tl.int64) * T + t) * (HKV * G) + head
    tl.store(out_ptr + at * D + d, cast(out, out_ptr.dtype.element_ty), mask=d < D)
    tl.store(lse_ptr + (b.to(tl.int64) * (HKV * G) + head) * T + t, lse)


def query_rows(query: Tensor) -> Tensor:
    """`query`, copied where its strides are no multiples of UNIT.

    Kernels are told no more about the query's strides: those of a dense tensor change with T, and
    what is specialised on them would be another kernel for another T.
    """
    b, h, t, _ = query.stride()
    return query.contiguous() if (b | h | t) % UNIT else query


def stride_unit(head_dim: int, *caches: Tensor) -> int:
    """What the strides of key and value are known to be multiples of, where that is not 16."""
    if head_dim % 16 == 0:
        return 1
    strides = (stride for cache in caches for stride in cache.stride()[:3])
    return 1 if any(stride % UNIT for stride in strides) else UNIT


def partials(product: Tensor | None) -> tuple[int, int, int]:
    """How many a product is given in (0: it is whole), and its strides by row and by partial."""
    if product is None:
        return 0, 0, 0
    if product.dim() == 2:
        return 0, product.stride(0), 0
    return product.shape[0], product.stride(1), product.stride(0)


def row_unit(*strides: int) -> int:
    """What the strides of rows are known to be multiples of, so that loads are 16 bytes wide."""
    return 1 if any(stride % ROW_UNIT for stride in strides) else ROW_UNIT


def check_grid(op: str, rows: int, Hkv: int, name: str = "key") -> None:
    """Raises where a grid's last dimension, which counts B * Hkv, would be beyond CUDA's limit.

    Args:
        rows: B, or L * B of an argument that is of L layers.
        name: of the argument to blame.
    """
    if rows * Hkv > 65535:
        of = "B * Hkv" if name == "key" else "L * B * Hkv"
        remedy = "pass the batch in several calls"
        raise bad_value(op, name, f"has {of} = {rows * Hkv}", "at most 65535 on a GPU", remedy)


def padded(head_dim: int) -> int:
    """The tile's head dim: a power of two that a matrix instruction takes."""
    return max(16, triton.next_power_of_2(head_dim))


class Spec(NamedTuple):
    """One kernel to compile ahead of time: the first four are `ASTSource`'s arguments."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    num_warps: int
    num_stages: int
    options: dict[str, Any] = {}  # of the launch, beyond those


def aot_spec(
    kernel: Any,
    types: dict[str, str],
    constexprs: dict[str, Any],
    num_warps: int,
    num_stages: int = 1,
    **options: Any,
) -> Spec:
    """Describes a kernel with the divisibility that a launch on dense tensors would find.

    Args:
        kernel: a `triton.jit` function.
        types: Triton type of every run-time argument, "*bf16", "i32", "fp32" and so on. Pointers
            and arguments named stride_* are declared divisible by 16 where the kernel asks for
            that and the head dim is: without it the loads come out 2 bytes wide, which says
            nothing about a launch.
        constexprs: the value of every other argument, None included.
        num_warps, num_stages: of the table's row.
        options: of the launch, beyond those.
    """
    names = [parameter.name for parameter in kernel.params]
    if missing := set(names) ^ {*types, *constexprs}:
        raise ValueError(f"{kernel.__name__}: not described, or unknown: {sorted(missing)}")
    signature = {name: types.get(name, "constexpr") for name in names}
    rows_of_16 = constexprs.get("D", 16) % 16 == 0
    attrs: dict[tuple[int, ...], list[list[Any]]] = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, parameter) in enumerate(zip(names, kernel.params, strict=True))
        if not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        and (
            signature[name].startswith("*")
            or (name.startswith("stride_") and name in types and rows_of_16)
        )
    }
    options = {name: value for name, value in options.items() if value}  # AMD knows none of them
    return Spec(kernel, signature, constexprs, attrs, num_warps, num_stages, options)

import math

import torch
import triton
import triton.language as tl

from std_kernels import _tuning
from std_kernels._device import PARTIAL_PAD, cast, dot, merge_kernel, tanh

INF, NAN = float("inf"), float("nan")


@triton.jit
def _cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, cast(tl.load(x_ptr + n), out_ptr.dtype.element_ty))


@triton.jit
def _tanh_kernel(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, tanh(tl.load(x_ptr + n)))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    at = n[:, None] * N + n[None, :]
    out = dot(tl.load(a_ptr + at), tl.load(b_ptr + at), tl.full([N, N], 1.0, tl.float32))
    tl.store(out_ptr + at, out)


def test_cast_rounds_to_nearest_even():
    x = torch.randn(1024) * torch.logspace(-38, 38, 1024)
    # Halfway between two bfloat16: down to even, up to even, and up over a power of two.
    x[:8] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 2 - 2**-8, -1 - 2**-8, 0.0, INF, -INF, 3.4e38])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        out = torch.empty(1024, dtype=dtype)
        _cast_kernel[(1,)](x, out, N=1024)
        assert torch.equal(out, x.to(dtype))
    x[0], out = NAN, torch.empty(1024, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, out, N=1024)
    assert out[0].isnan() and not out[1:].isnan().any()


def test_tanh_is_relatively_accurate():
    x = torch.cat((torch.linspace(-12, 12, 1023), torch.tensor([0.6249999])))
    x[:4] = torch.tensor([1e-8, -1e-4, INF, -INF])
    out = torch.empty(1024)
    _tanh_kernel[(1,)](x, out, N=1024)
    torch.testing.assert_close(out.double(), x.double().tanh(), rtol=3e-7, atol=0)


def test_dot_takes_every_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = torch.randn(2, 16, 16).to(dtype)
        out = torch.empty(16, 16)
        _dot_kernel[(1,)](a, b, out, N=16)
        expected = 1 + a.double() @ b.double()
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


def test_attention_splits_hold_whole_tiles():
    # A tile over the end of a split would count its keys twice.
    for row in _tuning.TABLE:
        if row.op in ("verify_attention", "sparse_attention"):
            assert all(split % row.block_n == 0 for _, split in row.splits), row


def test_every_device_finds_a_row():
    wanted = {(row.op, row.kernel, row.dtype, row.head_dim > 0) for row in _tuning.TABLE}
    for op, kernel, dtype, has_head_dim in wanted:
        most = 1 << 14 if op == "add_rms_norm" else 1 << 20  # features of a row, that is
        for arch in (*_tuning.TARGETS, "default", "interpreter"):
            dims = (16, 64, 72, 128, 136, 256, *(() if op == "rope_write" else (512,)))
            for head_dim in dims if has_head_dim else (0,):
                assert _tuning.config(op, kernel, arch, dtype, head_dim, most).split > 0


def test_what_a_split_left_unwritten_does_not_count():
    """The merge asks for values before it knows whether they are any."""
    rows, splits, D = 3, 5, 16
    partial = torch.randn(1, splits, rows, D + PARTIAL_PAD)
    partial[..., D:] = NAN  # padding
    lse = partial[..., D] = torch.randn(1, splits, rows)
    for split, row in ((0, 0), (3, 0), (4, 1), (2, 2)):
        lse[0, split, row] = -INF
        partial[0, split, row, :D] = NAN
    partial[..., D] = lse
    out, found = torch.empty(1, rows, 1, D), torch.empty(1, 1, rows)
    merge_kernel[(rows, 1)](
        partial, None, None, None, out, found, rows, None, splits,
        HKV=1, G=1, D=D, BLOCK_D=D, SPLIT=48, BLOCK_S=2, PDL=False,
    )  # fmt: skip
    weights = torch.softmax(lse[0].double() * math.log(2), 0)[..., None]
    expected = (weights * partial[0, ..., :D].double().nan_to_num()).sum(0)
    torch.testing.assert_close(out[0, :, 0].double(), expected, rtol=1e-5, atol=1e-6)
    whole = torch.logsumexp(lse[0].double() * math.log(2), 0)
    torch.testing.assert_close(found[0, 0].double(), whole, rtol=1e-5, atol=1e-6)

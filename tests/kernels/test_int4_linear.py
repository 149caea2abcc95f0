"""Products with 4-bit weights, on the CPU; in the interpreter: interpreter/test_triton_int4.py."""

import pytest
import torch

import std_kernels as sk
from std_kernels import reference


def weight(N, K, group, seed=0):
    """Random values, and scales and zeros of about the size that real weights have."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(256, (N, K // 2), dtype=torch.uint8, generator=generator)
    pairs = torch.rand(2, K // group, N, generator=generator) / 10
    scales = torch.stack((pairs[0] + 0.01, pairs[1] - 0.05), -1).bfloat16()
    return values, scales


def rounded(values, scales):
    """The weight [N, K] in bfloat16, for the same product in plain torch."""
    eye = torch.eye(2 * values.shape[1])
    return reference.int4_linear(eye, values, scales).T.bfloat16()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 2), (33,), (0,)])
@pytest.mark.parametrize(
    "N, K, group", [(80, 384, 128), (48, 384, 32), (64, 192, 64), (16, 32, 32)]
)
def test_the_product_is_right(assert_accurate, N, K, group, rows, dtype):
    values, scales = weight(N, K, group)
    packed = sk.pack_int4(values, group)
    given = torch.randn(*rows, 2 * K)[..., :K].to(dtype)
    bias = torch.randn(N).to(dtype)
    got = sk.int4_linear(given, packed, scales, bias)
    exact = reference.int4_linear(given, values, scales, bias)
    plain = torch.nn.functional.linear(given.bfloat16(), rounded(values, scales), bias.bfloat16())
    assert got.dtype == dtype and got.shape == (*rows, N)
    if got.numel():
        floor = torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
        assert_accurate(got, exact, plain, floor=floor)
    parts = sk.int4_linear_partials(given, packed, scales)
    assert parts.shape == (1, got.numel() // N, N) and parts.dtype == torch.float32
    torch.testing.assert_close(
        parts[0] + bias.float(), got.float().view(-1, N), rtol=2e-2, atol=5e-2
    )


@pytest.mark.parametrize("group", [32, 128])
def test_slices_of_a_packed_weight_are_packed_weights(group):
    values, scales = weight(64 + 128 + 16, 256, group)
    packed, given = sk.pack_int4(values, group), torch.randn(2, 256)
    for first, last in ((0, 64), (64, 192), (192, 208), (64, 208)):
        part = slice(first, last)
        alone = sk.pack_int4(values[part], group)
        assert torch.equal(packed[part], alone)
        got = sk.int4_linear(given, packed[part], scales[:, part])
        assert torch.equal(got, sk.int4_linear(given, alone, scales[:, part].contiguous()))


def test_a_weight_that_lies_on_the_side_is_refused():
    values, scales = weight(48, 64, 32)
    packed = sk.pack_int4(values, 32)
    with pytest.raises(ValueError, match="^int4_linear: scales has strides .*, expected an inner"):
        sk.int4_linear(torch.ones(64), packed, scales.transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(ValueError, match="^int4_linear: packed has strides .*, expected an inner"):
        sk.int4_linear(torch.ones(64), packed.repeat(1, 2)[:, :32], scales)

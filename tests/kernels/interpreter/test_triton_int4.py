import sys

import pytest
import torch

import std_kernels as sk
from std_kernels import _int4_linear_kernels as kernels
from std_kernels import reference
from tests.kernels.test_int4_linear import rounded, weight

NAN = float("nan")


def check(assert_accurate, rows, N, K, group, dtype=torch.bfloat16, bias=False):
    values, scales = weight(N, K, group, seed=rows)
    packed = sk.pack_int4(values, group)
    given = torch.randn(rows, K, generator=torch.Generator().manual_seed(N)).to(dtype)
    added = torch.linspace(-1, 1, N).to(dtype) if bias else None
    got = sk.int4_linear(given, packed, scales, added)
    exact = reference.int4_linear(given.bfloat16(), values, scales, added)
    plain = torch.nn.functional.linear(
        given.bfloat16(), rounded(values, scales), None if added is None else added.bfloat16()
    )
    assert got.dtype == dtype and got.shape == (rows, N)
    assert_accurate(got, exact, plain)
    parts = sk.int4_linear_partials(given, packed, scales)
    sums = sum(parts[1:], parts[0]) + (0 if added is None else added.float())
    assert torch.equal(sums.to(dtype), got)
    # Before the sum is rounded, the product of one row has the weights whole.
    exact = exact if added is None else exact - added.double()
    limit = 1e-4 if rows == 1 else 2.0**-8
    assert (parts.double().sum(0) - exact).abs().max() <= limit * exact.abs().max()
    return parts


def test_the_kernels_run(monkeypatch):
    calls = []
    launcher = kernels.int4_linear
    monkeypatch.setattr(sys.modules["std_kernels.int4_linear"], "_product", None)
    monkeypatch.setattr(kernels, "int4_linear", lambda *a: calls.append(1) or launcher(*a))
    values, scales = weight(16, 32, 32)
    sk.int4_linear(torch.ones(1, 32), sk.pack_int4(values, 32), scales)
    assert calls


@pytest.mark.parametrize("group", [128, 64, 32])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 33])
def test_rows_and_groups(assert_accurate, rows, group):
    check(assert_accurate, rows, 48, 384, group, bias=rows % 2 == 1)


# One tile and less than a tile, K of several splits, the last of them short.
@pytest.mark.parametrize(
    "N, K, group", [(16, 32, 32), (80, 96, 32), (16, 192, 64), (64, 1408, 128)]
)
@pytest.mark.parametrize("rows", [1, 5])
def test_shapes(assert_accurate, rows, N, K, group):
    parts = check(assert_accurate, rows, N, K, group, torch.float16, bias=N == 80)
    assert parts.shape == ({32: 1, 96: 1, 192: 1, 1408: 6}[K], rows, N)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("group", [128, 64, 32])
def test_every_nibble_stands_where_it_belongs(group, rows):
    """A diagonal weight: each column gives a number of its own, exactly, to one row."""
    K, column = 2 * group, torch.arange(2 * group)
    q = torch.zeros(K, K, dtype=torch.uint8)
    q[column, column] = column.remainder(15).to(torch.uint8) + 1
    values = q[:, ::2] << 4 | q[:, 1::2]
    scales = torch.tensor([1.0, 8.0]).bfloat16().repeat(2, K, 1)  # w = q
    given = torch.stack([(column * 7 + row).remainder(256).float() for row in range(rows)])
    got = sk.int4_linear(given, sk.pack_int4(values, group), scales)
    assert torch.equal(got, given * q.diagonal())


@pytest.mark.parametrize("rows", [1, 3])
def test_what_lies_beside_is_not_read(assert_accurate, rows):
    """A slice of a weight packed with others, an input and scales with NaN before and after."""
    values, scales = weight(16 + 48 + 16, 96, 32)
    packed, part = sk.pack_int4(values, 32), slice(16, 64)
    wide = torch.full((rows + 2, 96), NAN)
    wide[1:-1] = torch.randn(rows, 96)
    poisoned = torch.full((5, 80, 2), NAN, dtype=torch.bfloat16)
    poisoned[1:-1, part] = scales[:, part]
    got = sk.int4_linear(wide[1:-1], packed[part], poisoned[1:-1, part])
    exact = reference.int4_linear(wide[1:-1].bfloat16(), values[part], scales[:, part])
    plain = wide[1:-1].bfloat16() @ rounded(values[part], scales[:, part]).T
    assert_accurate(got, exact, plain)


def test_a_row_is_the_same_bits_beside_others():
    values, scales = weight(48, 768, 128)
    packed, given = sk.pack_int4(values, 128), torch.randn(16, 768)
    together = sk.int4_linear(given, packed, scales)
    for rows in (slice(0, 2), slice(5, 9), slice(13, 16)):
        assert torch.equal(sk.int4_linear(given[rows], packed, scales), together[rows])


@pytest.mark.parametrize(
    "N, K, kernel, splits",
    [
        (4608, 3584, "one row", 7),
        (3584, 3584, "one row", 7),
        (3584, 18944, "one row", 8),
        (37888, 3584, "one row", 1),
        (152064, 3584, "one row", 1),
        (4608, 3584, "few rows", 7),
        (3584, 18944, "many rows", 8),
    ],
)
def test_every_multiprocessor_of_an_h200_has_programs(monkeypatch, N, K, kernel, splits):
    monkeypatch.setattr(kernels, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 132)
    kernels._plan.cache_clear()
    plan = kernels._plan(torch.device("cpu"), kernel, N, K, 128)
    kernels._plan.cache_clear()
    assert plan.splits == splits
    # Every group in exactly one split, none empty.
    assert (plan.splits - 1) * plan.groups < K // 128 <= plan.splits * plan.groups


def test_dispatcher_contract():
    values, scales = weight(16, 384, 128)
    given = torch.ones(1, 384), sk.pack_int4(values, 128), scales
    utils = ("test_schema", "test_faketensor")
    ops = torch.ops.std_kernels
    torch.library.opcheck(ops.pack_int4.default, (values, 128), test_utils=utils)
    torch.library.opcheck(ops.int4_linear_partials.default, given, test_utils=utils)
    torch.library.opcheck(ops.int4_linear.default, (*given, None), test_utils=utils)

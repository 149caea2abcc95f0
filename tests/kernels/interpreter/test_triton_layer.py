"""The kernels around a layer's products: bits of transformers' eager layer, in the interpreter.

What cannot be bitwise: float32 adds the squares of a row up in another order than PyTorch, and the
interpreter's exponential is NumPy's. So norms are compared on rows whose squares add up exactly in
any order, and activations in half precision by how few of all 65,536 gates round to another
neighbour. Everything else is compared to the bit.
"""

import pytest
import torch

import std_kernels as sk
from std_kernels import _add_rms_norm_kernels, _silu_mul_kernels, _tuning, cpu_layer
from tests.kernels.layer_calls import (
    DTYPES,
    NAMES,
    VARIANTS,
    arguments,
    as_eager,
    assert_only_the_slots_are_written,
    call,
    copied,
    expected,
    results,
    variant,
)

HALVES = (torch.bfloat16, torch.float16)


def exact_squares(values):
    """The same call with rows of plus and minus 2^k, whose squares are added up exactly."""
    generator = torch.Generator().manual_seed(1)

    def powers(x):
        sign = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
        return (sign * 2.0 ** torch.randint(-2, 3, x.shape, generator=generator)).to(x.dtype)

    values = copied(values)
    for name in ("residual", "qkv"):
        if name in values:
            values[name] = powers(values[name])
    if values.get("delta") is not None:
        # Leaves the sum a power of two: nothing is added, or as much as is there.
        which = torch.randint(0, 2, values["residual"].shape, generator=generator)
        values["delta"] = (which * values["residual"]).to(values["delta"].dtype)
    return values


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_and_norms_have_eagers_bits(dtype):
    for H in (64, 1024, 2048):  # powers of two: eager on the CPU divides where CUDA multiplies
        values = arguments("add_rms_norm", dtype=dtype, B=1, H=H)
        for given in (values, {**values, "delta": None}):
            given = exact_squares({**given, "bias": None})
            for got, eager in zip(results("add_rms_norm", given), as_eager("add_rms_norm", given)):
                assert torch.equal(got, eager)


@pytest.mark.parametrize("partials", [0, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_has_eagers_bits_on_any_row(dtype, partials):
    for name in ("plain", "all"):
        values = variant("add_rms_norm", name, dtype=dtype, H=77, partials=partials)
        assert torch.equal(call("add_rms_norm", values)[0], as_eager("add_rms_norm", values)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, partials", [("plain", 0), ("bias", 5)])
def test_rotation_has_eagers_bits(name, dtype, partials):
    for B, T, D in ((2, 2, 24), (1, 1, 128)):
        values = variant("rope_write", name, dtype=dtype, B=B, T=T, D=D, partials=partials)
        wanted = as_eager("rope_write", copied(values))
        for got, eager in zip(results("rope_write", values), wanted, strict=True):
            assert torch.equal(got, eager)


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_norms_have_eagers_bits(dtype):
    values = exact_squares(variant("rope_write", "norms", dtype=dtype, B=1, T=2, D=64))
    wanted = as_eager("rope_write", copied(values))
    for got, eager in zip(results("rope_write", values), wanted, strict=True):
        assert torch.equal(got, eager)


@pytest.mark.parametrize("dtype", HALVES)
def test_activations_of_every_gate(dtype, monkeypatch):
    gates = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    # NumPy takes subnormal bfloat16 for zero.
    gates = gates[gates.isfinite() & (gates.float().abs() > 1e-37)]
    tile = _silu_mul_kernels.config("silu_mul", "piece", "interpreter", _tuning.HALF, 0, 1)
    monkeypatch.setattr(_silu_mul_kernels, "config", lambda *_: tile._replace(split=1 << 16))
    up = torch.randn(gates.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = sk.silu_mul(torch.cat((gates, up))[None])[0]
    eager = cpu_layer.silu_mul(torch.cat((gates, up))[None], None, dtype)[0]
    assert int((got != eager).sum()) <= 3  # of 65,536: a last bit of float32 is seldom seen here
    torch.testing.assert_close(got, eager, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype, partials", [(DTYPES[0], 0), (DTYPES[1], 7), (DTYPES[2], 1)])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("op", NAMES)
def test_errors_are_those_of_the_cpu_path(op, name, dtype, partials, assert_accurate):
    values = variant(op, name, dtype=dtype, B=1, H=77, D=24, partials=partials)
    plain = getattr(cpu_layer, op)(*copied(values).values())
    exact = expected(op, values)
    got = results(op, copied(values))
    for one, wanted, cpu in zip(got, exact, plain if isinstance(plain, tuple) else (plain,)):
        assert one.dtype == dtype
        assert_accurate(one, wanted, cpu)


@pytest.mark.parametrize("op", NAMES)
def test_rows_do_not_depend_on_each_other(op):
    values = arguments(op, B=1, T=3, H=45, dtype=torch.float16)
    together = results(op, copied(values))[0]
    of_rows = {"residual", "delta", "gate_up", "qkv"}
    for t in range(3):
        one = {
            name: x[t : t + 1] if name in of_rows
            else x[:, t : t + 1] if name in ("cos", "sin", "slots") else x
            for name, x in copied(values).items()
        }  # fmt: skip
        got = results(op, one)[0]
        whole = together[:, :, t : t + 1] if op == "rope_write" else together[t : t + 1]
        assert torch.equal(got, whole)


def test_strided_views_and_one_row_of_positions():
    values = arguments("rope_write", dtype=torch.bfloat16, B=2, T=3, D=32)
    for name in ("cos", "sin"):
        values[name] = values[name][:1, :, :16]  # partly rotated
    values["slots"] = values["slots"].T.contiguous().T
    values["qkv"] = torch.cat([values["qkv"]] * 2, dim=1)[:, : values["qkv"].shape[1]]
    wide = torch.zeros(2, 3, 20, 40, dtype=torch.bfloat16)
    values["keys"], values["values"] = wide[:, 1:, :, 8:], wide.clone()[:, :2, :, :32]
    wanted = as_eager("rope_write", {**copied(values), "q_norm": None, "k_norm": None})
    got = results("rope_write", {**values, "q_norm": None, "k_norm": None})
    for one, eager in zip(got, wanted, strict=True):
        assert torch.equal(one, eager)
    assert not wide[:, 0].any() and not wide[..., :8].any()


def test_only_the_slots_are_written():
    assert_only_the_slots_are_written(arguments("rope_write"))


def test_no_rows():
    for op in ("add_rms_norm", "silu_mul"):
        for made in results(op, arguments(op, B=0)):
            assert made.shape[0] == 0


def test_a_tile_holds_every_row():
    row = next(row for row in _tuning.TABLE if row.op == "add_rms_norm")
    assert all(tile >= limit for limit, tile in row.splits)
    assert row.splits[-1][0] == sk.add_rms_norm.__globals__["MAX_H"]
    assert (
        _add_rms_norm_kernels.config("add_rms_norm", "row", "sm_90", "half", 0, 3584).split == 4096
    )

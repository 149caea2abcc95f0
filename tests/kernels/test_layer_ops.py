"""add_rms_norm, rope_write, silu_mul on the CPU: transformers' bits, and what ops owe a caller."""

import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import std_kernels as sk
from tests.kernels.layer_calls import (
    DTYPES,
    NAMES,
    OPS,
    REQUIRED,
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

CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize("partials", [0, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("op", NAMES)
def test_bits_are_those_of_transformers(op, name, dtype, partials):
    # A row at a time: of several, PyTorch itself takes the exponentials of some otherwise.
    for B, T, D in ((1, 1, 16), (2, 3, 24), (3, 2, 64)) if op != "silu_mul" else ((1, 1, 0),):
        values = variant(op, name, dtype=dtype, B=B, T=T, D=D, partials=partials)
        wanted = as_eager(op, copied(values))
        for got, eager in zip(results(op, values), wanted, strict=True):
            assert got.dtype == eager.dtype == dtype
            assert torch.equal(got, eager)


@pytest.mark.parametrize("op", NAMES)
def test_the_reference_is_met(op, assert_accurate):
    for partials in (0, 3):
        values = arguments(op, partials=partials)
        exact, plain = expected(op, values), expected(op, values, torch.float32)
        for got, *wanted in zip(results(op, copied(values)), exact, plain, strict=True):
            assert_accurate(got, *wanted)


@pytest.mark.parametrize("op", NAMES)
def test_rows_do_not_depend_on_each_other(op):
    values = arguments(op, B=1, T=7, H=45, dtype=torch.bfloat16)
    together = results(op, copied(values))
    of_rows = {"residual", "delta", "gate_up", "qkv"}
    for t in range(7):
        one = {
            name: x[t : t + 1] if name in of_rows
            else x[:, t : t + 1] if name in ("cos", "sin", "slots") else x
            for name, x in copied(values).items()
        }  # fmt: skip
        for got, whole in zip(results(op, one), together):
            if got.dim() == 2:
                assert torch.equal(got[0], whole[t])
            elif got.shape[2] == 1:
                assert torch.equal(got[:, :, 0], whole[:, :, t])
            else:  # a cache
                slot = values["slots"][0, t]
                assert torch.equal(got[0, :, slot], whole[0, :, slot])


def test_partly_rotated_heads_and_one_row_of_positions():
    values = arguments("rope_write", D=24)
    for name in ("cos", "sin"):
        values[name] = values[name][:1, :, :16]
    wanted = as_eager("rope_write", copied(values))
    for got, eager in zip(results("rope_write", values), wanted, strict=True):
        assert torch.equal(got, eager)


def test_only_the_slots_are_written():
    assert_only_the_slots_are_written(arguments("rope_write", dtype=torch.float32))


def test_without_a_delta_there_is_only_the_norm():
    values = {**arguments("add_rms_norm"), "delta": None, "bias": None}
    total, normed = call("add_rms_norm", values)
    assert torch.equal(total, values["residual"])
    assert total.data_ptr() != values["residual"].data_ptr()
    assert torch.equal(normed, as_eager("add_rms_norm", values)[1])


@pytest.mark.parametrize("partials", [0, 2])
@pytest.mark.parametrize("options", [True, False])
@pytest.mark.parametrize("op", NAMES)
def test_opcheck(op, options, partials):
    values = arguments(op, partials=partials)
    if not options:
        values.update({name: None for name in ("bias", "q_norm", "k_norm") if name in values})
        if op == "add_rms_norm":
            values["delta"] = None
    overload = getattr(torch.ops.std_kernels, op).default
    order = [argument.name for argument in overload._schema.arguments]
    assert order == list(values), "the schema's order is that of the public function"
    opcheck(overload, tuple(values.values()), test_utils=CHECKS)


@pytest.mark.parametrize("op", NAMES)
def test_results_are_new_and_contiguous(op):
    for B, T in ((1, 1), (2, 3), (1, 5)):
        values = arguments(op, B=B, T=T)
        for name in ("residual", "delta", "gate_up", "qkv"):
            if name in values:
                values[name] = torch.cat([values[name]] * 2, dim=-1)[:, : values[name].shape[1]]
        inputs = {x.untyped_storage().data_ptr() for x in values.values() if torch.is_tensor(x)}
        made = call(op, values)
        for result in made if isinstance(made, tuple) else (made,):
            assert result.is_contiguous()
            assert result.untyped_storage().data_ptr() not in inputs


def test_compiles_into_one_graph():
    def layer(values):
        residual, normed = call("add_rms_norm", values["add_rms_norm"])
        out = call("silu_mul", values["silu_mul"])
        query = call("rope_write", values["rope_write"])
        return residual + 1, normed, out, query, values["rope_write"]["keys"] * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for B in (2, 3):
        values = {op: arguments(op, B=B) for op in NAMES}
        again = {op: copied(values[op]) for op in NAMES}
        torch.testing.assert_close(compiled(values), layer(again))
        torch.testing.assert_close(values["rope_write"]["values"], again["rope_write"]["values"])


@pytest.mark.parametrize("op", NAMES)
def test_autograd_is_refused(op):
    for name, x in arguments(op).items():
        if not torch.is_tensor(x) or not x.is_floating_point():
            continue
        values = {**arguments(op), name: x.requires_grad_()}
        with pytest.raises(RuntimeError, match=f"^{op}: .*requires_grad=True.*no_grad"):
            call(op, values)
        with torch.no_grad():
            call(op, values)


# Sizes that one argument alone may choose.
FREE = {("residual", 0), ("gate_up", 0)}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_wrong_tensors_are_named(data):
    op = data.draw(st.sampled_from(NAMES), label="op")
    values = {**arguments(op), "bias": None} if op == "silu_mul" else arguments(op)
    names = [name for name, x in values.items() if torch.is_tensor(x)]
    name = data.draw(st.sampled_from(names), label="name")
    x = values[name]
    way = data.draw(st.sampled_from(["no tensor", "rank", "dtype", "device", "size", "stride"]))
    error = ValueError
    if way == "no tensor":
        values[name], error = data.draw(st.sampled_from([x.tolist(), 3, "x"])), TypeError
    elif way == "rank":
        values[name] = x[0] if x.dim() != 3 else x[None]
    elif way == "dtype":
        values[name], error = (
            x.to(torch.float64 if x.is_floating_point() else torch.bool),
            TypeError,
        )
    elif way == "device":
        values[name] = x.to("meta")
        assume(op != "silu_mul")  # alone, it is on the device that it is on
    elif way == "stride":
        assume(name != "slots" and x.shape[-1] > 1)
        values[name] = torch.stack((x, x), dim=-1)[..., 0]
    else:
        dim = data.draw(st.integers(0, x.dim() - 1), label="dim")
        assume((name, dim) not in FREE or len(names) > 1)
        values[name] = torch.cat((x, x.narrow(dim, 0, 1)), dim=dim)
        assume(op != "silu_mul" or dim == 1)
    # The caller may mean either side of a disagreement.
    partner = {
        "keys": "(keys|values|slots)",
        "slots": "(slots|qkv)",
        "residual": "(residual|delta)",
    }
    pattern = f"^{op}: {partner.get(name, name)} (has|is) .*, expected .*; .+"
    with pytest.raises(error) as caught:
        call(op, values)
    assert re.match(pattern, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    "op, change, error, message",
    [
        ("add_rms_norm", dict(eps=-1.0), ValueError, "eps is -1.0, expected 0 <= eps"),
        ("add_rms_norm", dict(eps="x"), TypeError, "eps is of type str"),
        ("add_rms_norm", dict(delta=None), ValueError, "bias has shape .* None where delta"),
        ("add_rms_norm", dict(delta=torch.zeros(65, 6, 48)), ValueError, "delta has .* S <= 64"),
        ("add_rms_norm", dict(residual=torch.zeros(1, 16385)), ValueError, "residual .*<= 16384"),
        ("silu_mul", dict(gate_up=torch.zeros(2, 7)), ValueError, "gate_up has shape"),
        ("silu_mul", dict(dtype=torch.int8), TypeError, "dtype is torch.int8"),
        ("silu_mul", dict(gate_up=torch.zeros(2, 2, 8), dtype=None), TypeError, "dtype is miss"),
        ("rope_write", dict(q_norm=None), ValueError, "q_norm is None, expected both"),
        ("rope_write", dict(eps=float("nan")), ValueError, "eps is nan"),
        ("rope_write", dict(cos=torch.zeros(2, 3, 15)), ValueError, "cos has shape .* even Dr"),
        ("rope_write", dict(qkv=torch.zeros(6, 4 * 16)), ValueError, "qkv has shape .* Hq >= 1"),
    ],
)
def test_wrong_options_are_named(op, change, error, message):
    values = {**arguments(op), **change}
    if op == "silu_mul":
        values["bias"] = None
    with pytest.raises(error, match=f"^{op}: {message}.*; .+"):
        call(op, values)


def test_every_public_op_has_a_contract():
    from tests.kernels import test_contract

    assert {*test_contract.OPS, *test_contract.RECURRENT, *OPS} == set(sk.__all__)
    assert REQUIRED.keys() == OPS.keys()

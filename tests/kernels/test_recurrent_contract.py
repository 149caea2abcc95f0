"""What the ops with a state owe the dispatcher, the compiler and a caller who errs."""

import re

import pytest
import torch
from torch.library import opcheck

import std_kernels as sk
from tests.kernels.recurrence import make_tokens
from tests.kernels.test_recurrent import conv

CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def calls():
    tokens = make_tokens(Hk=1, Hv=2)
    state = tokens.call(tokens.state.clone(), [2, 5], [8, 9], 3)
    (ring, weight, kv_len, T), bias = conv(tokens, [8, 9], 3)
    names = "query key value g beta state state_len kv_len".split()
    return {
        "gated_delta_rule": dict(zip(names, state, strict=True)) | {"update": True},
        "causal_conv1d": {
            "inputs": ring, "weight": weight, "kv_len": kv_len, "tokens": T, "bias": bias,
            "silu": True,
        },
    }  # fmt: skip


OPTIONS = {"update", "bias", "silu"}


def invoke(op, values, function=None):
    given = [x for name, x in values.items() if name not in OPTIONS]
    options = {name: x for name, x in values.items() if name in OPTIONS}
    return (function or getattr(sk, op))(*given, **options)


@pytest.mark.parametrize("op", calls())
def test_opcheck(op):
    values = calls()[op]
    # What no call may look at is NaN in the other tests, which no comparison holds equal.
    values = {n: x.nan_to_num() if torch.is_tensor(x) else x for n, x in values.items()}
    overload = getattr(torch.ops.std_kernels, op).default
    order = [argument.name for argument in overload._schema.arguments]
    assert order == list(values), "the schema's order is that of the public function"
    opcheck(overload, tuple(values.values()), test_utils=CHECKS)


@pytest.mark.parametrize("op", calls())
def test_compiles_into_one_graph(op):
    compiled = torch.compile(getattr(sk, op), fullgraph=True, dynamic=True, backend="aot_eager")
    values, same = calls()[op], calls()[op]
    torch.testing.assert_close(invoke(op, values, compiled), invoke(op, same))
    torch.testing.assert_close(values, same, equal_nan=True)


@pytest.mark.parametrize("op", calls())
def test_autograd_is_refused(op):
    for name, x in calls()[op].items():
        if not torch.is_tensor(x) or not x.is_floating_point():
            continue
        values = {**calls()[op], name: x.clone().requires_grad_()}
        with pytest.raises(RuntimeError, match=f"^{op}: .*requires_grad=True.*no_grad"):
            invoke(op, values)
        with torch.no_grad():
            invoke(op, values)


@pytest.mark.parametrize("op", calls())
def test_wrong_tensors_are_named(op):
    ways = {
        "no tensor": (lambda x: x.tolist(), TypeError),
        "rank": (lambda x: x[None], ValueError),
        "dtype": (lambda x: x.double(), TypeError),
        "device": (lambda x: x.to("meta"), ValueError),
        "batch": (lambda x: torch.cat((x, x[:1])), ValueError),
        "stride": (lambda x: torch.stack((x, x), dim=-1)[..., 0], ValueError),
    }
    partner = {"query": "(query|key)", "inputs": "(inputs|weight|kv_len)"}
    for name, x in calls()[op].items():
        for wrong, error in ways.values() if torch.is_tensor(x) else ():
            values = {**calls()[op], name: wrong(x)}
            with pytest.raises(error) as caught:
                invoke(op, values)
            pattern = f"^{op}: {partner.get(name, name)} (has|is) .*, expected .*; .+"
            assert re.match(pattern, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    "op, name, wrong, error",
    [
        ("gated_delta_rule", "update", 1, TypeError),
        ("gated_delta_rule", "query", torch.zeros(2, 65, 1, 16), ValueError),
        ("gated_delta_rule", "query", torch.zeros(2, 3, 1, 20), ValueError),
        ("gated_delta_rule", "query", torch.zeros(2, 3, 1, 264), ValueError),
        ("gated_delta_rule", "value", torch.zeros(2, 16, 2, 8), ValueError),
        ("gated_delta_rule", "value", torch.zeros(2, 2, 16, 16).transpose(1, 2), ValueError),
        ("gated_delta_rule", "state", torch.zeros(2, 2, 16, 32)[..., :16], ValueError),
        ("causal_conv1d", "tokens", 0, ValueError),
        ("causal_conv1d", "tokens", 14, ValueError),
        ("causal_conv1d", "tokens", 2.0, TypeError),
        ("causal_conv1d", "silu", 1, TypeError),
        ("causal_conv1d", "weight", torch.zeros(32, 9), ValueError),
    ],
)
def test_what_is_out_of_range_is_named(op, name, wrong, error):
    with pytest.raises(error, match=f"^{op}: (key|{name}) (has|is) .*, expected .*; .+"):
        invoke(op, {**calls()[op], name: wrong})


def test_value_heads_that_key_heads_do_not_divide():
    values = calls()["gated_delta_rule"]
    values["query"] = torch.zeros(2, 3, 2, 16)
    values["key"], values["value"] = torch.zeros(2, 16, 2, 16), torch.zeros(2, 16, 3, 16)
    with pytest.raises(ValueError, match="^gated_delta_rule: value has .*, expected Hk = 2 divid"):
        invoke("gated_delta_rule", values)

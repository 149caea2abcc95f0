"""What every op owes the dispatcher, the compiler and a caller who got an argument wrong."""

import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import std_kernels as sk
from std_kernels import reference
from tests.kernels.layer_calls import NAMES as OF_A_LAYER

RECURRENT = {"causal_conv1d", "gated_delta_rule"}  # see test_recurrent_contract.py
# Those that take queries, keys or scores; test_layer_ops.py has the same for the others.
OPS = {name: getattr(sk, name) for name in sk.__all__ if name not in {*OF_A_LAYER, *RECURRENT}}
FLOAT = (torch.float16, torch.bfloat16, torch.float32)
CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


ATTENTION = [op for op in OPS if "keys" in op or "attention" in op]
VALUES = torch.randint(
    256, (48, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def arguments(op, dtype=torch.float32, B=2, T=3, D=16, N=40, seed=0):
    """A valid call of the op with every option set, and its positional argument names."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(B, 4, T, D, generator=generator).to(dtype)
    key, value = torch.randn(2, B, 2, N, D, generator=generator).to(dtype)
    full = torch.full((B,), N, dtype=torch.int32)
    common = {"scale": 0.25, "softcap": 5.0, "sinks": torch.tensor([0.0, 1.0, -1.0, 2.0])}
    if op == "select_topk":
        scores = torch.rand(3, B, 2, N, generator=generator)
        candidates, always = torch.rand(2, B, N, generator=generator) < 0.5
        return {"scores": scores, "k": 5, "candidates": candidates, "always": always}
    if op == "pack_int4":
        return {"values": VALUES.repeat(B, 1), "group": 32}
    if "int4_linear" in op:
        input = torch.randn(B, T, 64, generator=generator).to(dtype)
        scales = torch.rand(2, 48, 2, generator=generator).div(10).bfloat16()
        call = {"input": input, "packed": sk.pack_int4(VALUES, 32), "scales": scales}
        return call if "partials" in op else {**call, "bias": torch.arange(48).to(dtype)}
    if op == "renew_importance":
        importance, scores = torch.rand(2, 3, B, 2, N, generator=generator)
        return {"importance": importance, "scores": scores, "stop": full - 7, "fade": 0.5}
    if op == "score_keys":
        call = {"query": query, "key": key, "kv_len": full}
        return {**call, "kv_start": full - 20, "num_queries": full - N + 2, **common}
    call = {"query": query, "key": key, "value": value}
    if op == "sparse_attention":
        indices = torch.arange(0, 24, 3, dtype=torch.int32).repeat(B, 2, 1)
        return {**call, "indices": indices, "tail_start": full - 10, "kv_len": full, **common}
    call["kv_len"] = full - 3
    if op == "verify_attention_with_scores":
        call["score_lse"] = torch.full((B, 4, T), 2.0)
    options = {"kv_start": full - 30, "window": 9, **common}
    if op == "verify_attention_with_scores":
        options["scores"] = torch.empty(B, 2, N)
    return {**call, **options}


def required(op):
    count = {"select_topk": 2, "score_keys": 3, "sparse_attention": 6, "verify_attention": 4}
    count |= {"pack_int4": 2, "int4_linear": 3, "int4_linear_partials": 3}
    count["renew_importance"] = 4
    return count.get(op, 5)


def right(op, values):
    """By the reference, and how far the op may be from it."""
    if "int4_linear" in op:
        product = reference.int4_linear(values["input"], VALUES, values["scales"])
        # In bfloat16 whatever the input; on the CPU there is one part.
        product = product.flatten(0, -2)[None] if "partials" in op else product
        return product, dict(rtol=1e-2, atol=5e-2)
    return call(op, values, getattr(reference, op)), dict(rtol=1e-4, atol=1e-5)


def call(op, values, function=None):
    names = list(values)[: required(op)]
    options = {name: values[name] for name in values if name not in names}
    return (function or OPS[op])(*(values[name] for name in names), **options)


@pytest.mark.parametrize("options", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, options):
    values = arguments(op)
    if not options:
        unset = list(values)[required(op) :]
        values.update({name: None for name in unset if name not in ("scale", "scores")})
    overload = getattr(torch.ops.std_kernels, op).default
    order = [argument.name for argument in overload._schema.arguments]
    assert order == list(values), "the schema's order is that of the public function"
    opcheck(overload, tuple(values.values()), test_utils=CHECKS)


@pytest.mark.parametrize("op", [op for op in OPS if op != "renew_importance"])
def test_results_are_new_and_dense(op):
    """What the fake implementation promises, for every layout the real one may start from."""
    for B, T, Hq, Hkv in ((1, 1, 4, 2), (2, 3, 4, 2), (1, 5, 4, 1), (2, 3, 2, 2)):
        values = dict(list(arguments(op, B=B, T=T).items())[: required(op)])
        for name in ("query", "key", "value"):
            if name in values:
                values[name] = values[name].transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("key", "value", "indices"):
            if name in values:
                values[name] = values[name][:, :Hkv]
        for name in ("query", "score_lse"):
            if name in values:
                values[name] = values[name][:, :Hq]
        inputs = {x.untyped_storage().data_ptr() for x in values.values() if torch.is_tensor(x)}
        results = call(op, values)
        for i, result in enumerate(results if isinstance(results, tuple) else (results,)):
            # Outputs of attention lie as a model wants them back.
            assert (result.transpose(1, 2) if result.dim() == 4 and i == 0 and "att" in op
                    else result).is_contiguous()  # fmt: skip
            assert result.untyped_storage().data_ptr() not in inputs


@pytest.mark.parametrize("op", OPS)
def test_compiles_into_one_graph(op):
    compiled = torch.compile(OPS[op], fullgraph=True, dynamic=True, backend="aot_eager")
    for B, N in ((2, 40), (3, 57)):
        values, same = arguments(op, B=B, N=N), arguments(op, B=B, N=N)  # some write to them
        torch.testing.assert_close(call(op, values, compiled), call(op, same))
        torch.testing.assert_close(values, same)


def test_compiles_with_inductor():
    def draft_then_verify(query, key, value, kv_len, tail_start):
        scores = sk.score_keys(query * 2, key, kv_len)
        indices = sk.select_topk(scores, 8)
        draft, _ = sk.sparse_attention(query * 2, key, value, indices, tail_start, kv_len)
        dense, lse = sk.verify_attention(query * 2, key, value, kv_len)
        return (draft - dense).abs().sum(-1), lse + 1

    values = arguments("sparse_attention", T=1)
    args = [values[name] for name in ("query", "key", "value", "kv_len", "tail_start")]
    compiled = torch.compile(draft_then_verify, fullgraph=True)
    torch.testing.assert_close(compiled(*args), draft_then_verify(*args))


@pytest.mark.parametrize("op", [op for op in OPS if op != "pack_int4"])  # in an order of its own
def test_options_default_to_none(op):
    """Left out, None and the documented default are the same call."""
    values = arguments(op)
    few = {name: values[name] for name in list(values)[: required(op)]}
    none = {name: values[name] if name in few else None for name in values}
    expected, tolerance = right(op, few)
    if op == "renew_importance":
        none = arguments(op)  # one call has written to the others
    for result in (call(op, few), call(op, none)):
        torch.testing.assert_close(result, expected, check_dtype=False, **tolerance)


@pytest.mark.parametrize("op", OPS)
def test_autograd_is_refused(op):
    for name, x in arguments(op).items():
        if not torch.is_tensor(x) or not x.is_floating_point() or name == "score_lse":
            continue
        values = {**arguments(op), name: x.requires_grad_()}
        with pytest.raises(RuntimeError, match=f"^{op}: .*requires_grad=True.*no_grad"):
            call(op, values)
        with torch.no_grad():
            call(op, values)


def wrong_tensor(draw, name, x, leads):
    """A tensor that is wrong in one way, and the error that way deserves."""
    ways = ["no tensor", "rank", "dtype", "size"]
    if name != "values":  # alone it may be on any
        ways.append("device")
    if x.shape[-1] > 1:
        ways.append("stride")
    way = draw(st.sampled_from(ways), label="way")
    if way == "no tensor":
        return draw(st.sampled_from([x.tolist(), 3, "x"])), TypeError
    if way == "rank" and name == "input":
        return x[0, 0, 0], ValueError  # of any other
    if way == "rank":
        # Only a rank below 3 is wrong for scores that take any number of leading dimensions.
        wrong = draw(st.sampled_from([x[0, 0, 0]] if leads else [x[0], x[None]]))
        return wrong, ValueError
    if way == "dtype":
        every = (torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool, *FLOAT)
        allowed = FLOAT if name in ("query", "input") else (x.dtype,)
        return x.to(draw(st.sampled_from([t for t in every if t not in allowed]))), TypeError
    if way == "device":
        return x.to("meta"), ValueError
    if way == "stride":
        return torch.stack((x, x), dim=-1)[..., 0], ValueError
    dim = draw(st.integers(0, x.dim() - 1), label="dim")
    return torch.cat((x, x.narrow(dim, 0, 1)), dim=dim), ValueError


# Sizes one argument alone may choose: its number of selected keys, capacity, queries, layers.
FREE = {op: {("query", 2)} for op in OPS}
FREE["sparse_attention"] |= {("indices", 2)}
FREE["score_keys"] |= {("key", 2)}
FREE["select_topk"] |= {("scores", dim) for dim in range(4)}
FREE["renew_importance"] |= {("scores", 3)}
for op in ("int4_linear", "int4_linear_partials"):
    FREE[op] |= {("input", 0), ("input", 1)}


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_wrong_tensors_are_named(data):
    op = data.draw(st.sampled_from(list(OPS)), label="op")
    values = arguments(op)
    tensors = [name for name, x in values.items() if torch.is_tensor(x)]
    name = data.draw(st.sampled_from(tensors), label="name")
    leads = (op, name) == ("select_topk", "scores")
    values[name], error = wrong_tensor(data.draw, name, values[name], leads)
    sizes = arguments(op)[name].shape
    wrong = values[name]
    if torch.is_tensor(wrong) and wrong.dim() == len(sizes):
        grown = [d for d in range(len(sizes)) if wrong.shape[d] != sizes[d]]
        assume(not any((name, d) in FREE[op] for d in grown))
    # The caller may mean either side of a disagreement: key may be blamed for query.
    partner = {"query": "(query|key)", "key": "(key|value)", "scores": "(scores|candidates)"}
    partner["input"] = "(input|packed)"
    partner["importance"] = "(importance|scores)"
    pattern = f"^{op}: {partner.get(name, name)} (has|is) .*, expected .*; .+"
    with pytest.raises(error) as caught:
        call(op, values)
    assert re.match(pattern, str(caught.value)), str(caught.value)


OPTION_ERRORS = [
    ("scale", float("nan"), ValueError),
    ("scale", float("inf"), ValueError),
    ("scale", "1", TypeError),
    ("scale", torch.ones(()), TypeError),
    ("softcap", 0.0, ValueError),
    ("softcap", -1.0, ValueError),
    ("softcap", float("nan"), ValueError),
    ("softcap", "1", TypeError),
    ("window", 0, ValueError),
    ("window", -3, ValueError),
    ("window", 2.0, TypeError),
    ("group", 48, ValueError),
    ("group", 32.0, TypeError),
    ("k", 0, ValueError),
    ("k", -1, ValueError),
    ("k", 41, ValueError),
    ("k", 2.0, TypeError),
    ("k", torch.tensor(2), TypeError),
    ("fade", -0.1, ValueError),
    ("fade", float("nan"), ValueError),
    ("fade", "1", TypeError),
]


@pytest.mark.parametrize("op", OPS)
def test_wrong_options_are_named(op):
    for name, wrong, error in OPTION_ERRORS:
        values = arguments(op)
        if name not in values:
            continue
        values[name] = wrong
        with pytest.raises(error, match=f"^{op}: {name} is .*, expected .*; .+"):
            call(op, values)


@pytest.mark.parametrize("op", ATTENTION)
@pytest.mark.parametrize(
    "Hq, Hkv, T, D, name",
    [
        (4, 2, 3, 8, "query"),
        (4, 2, 3, 20, "query"),
        (4, 2, 3, 520, "query"),
        (4, 2, 0, 16, "query"),
        (4, 2, 65, 16, "query"),
        (4, 3, 3, 16, "key"),
        (4, 8, 3, 16, "key"),
        (4, 0, 3, 16, "key"),
        (0, 2, 3, 16, "key"),
        (34, 2, 3, 16, "key"),
    ],
)
def test_sizes_out_of_range(op, Hq, Hkv, T, D, name):
    values = arguments(op)
    values["query"] = torch.zeros(2, Hq, T, D)
    values["key"] = values["value"] = torch.zeros(2, Hkv, 40, D)
    if op == "score_keys":
        del values["value"]
    if op == "score_keys" and T == 65:
        assert call(op, values).shape == (2, 2, 40), "scoring takes any number of queries"
        return
    with pytest.raises(ValueError, match=rf"^{op}: {name} has shape \[2, .*, expected .*; .+"):
        call(op, values)


def test_select_topk_bounds():
    with pytest.raises(ValueError, match="^select_topk: k is 16385, expected k <= 16384; "):
        sk.select_topk(torch.zeros(1, 1, 20000), 16385)
    with pytest.raises(ValueError, match="^select_topk: scores has shape .* N <= 1048576; "):
        sk.select_topk(torch.zeros(1, 1, (1 << 20) + 1), 1)
    with pytest.raises(ValueError, match="^select_topk: scores has shape .*1 <= N"):
        sk.select_topk(torch.zeros(1, 1, 0), 1)
    message = "select_topk: k is 2048, expected 1 <= k <= N = 1024; lower k or pass more scores"
    with pytest.raises(ValueError, match=f"^{message}$"):
        sk.select_topk(torch.zeros(1, 1, 1024), 2048)


def test_stride_of_a_single_element_does_not_matter():
    lengths = torch.tensor([[3, 9], [4, 9]], dtype=torch.int32)[:1, 0]
    assert lengths.stride() == (2,)
    x = torch.ones(1, 1, 4, 16)
    sk.verify_attention(x, x, x, lengths)

"""gated_delta_rule and causal_conv1d on whatever runs them: the CPU path, or the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import std_kernels as sk
from std_kernels import reference
from tests.kernels.recurrence import NAN, make_tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(tokens, state_len, kv_len, T, assert_accurate, update=True):
    """One call beside the reference's; returns its result and the state that it left."""
    args = tokens.call(tokens.state.clone(), state_len, kv_len, T)
    exact = reference.gated_delta_rule(*args, update=update)
    plain = reference.gated_delta_rule(*args, update=update, dtype=torch.float32)
    out = sk.gated_delta_rule(*args, update=update)
    assert out.dtype == tokens.query.dtype and out.is_contiguous()
    assert_accurate(out, exact[0], plain[0].to(out.dtype))
    assert_accurate(args[5], exact[1], plain[1], floor=4e-6)
    return out, args[5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", [True, False])
def test_rows_that_accepted_differently(assert_accurate, dtype, update):
    tokens = make_tokens(dtype=dtype, B=3)
    check(tokens, [2, 5, 7], [11, 12, 9], 2, assert_accurate, update)


@pytest.mark.parametrize(
    "Hk, Hv, Dk, Dv", [(1, 1, 16, 16), (2, 2, 24, 40), (2, 6, 32, 64), (1, 2, 96, 72)]
)
@pytest.mark.parametrize("T", [1, 3])
def test_shapes(assert_accurate, Hk, Hv, Dk, Dv, T):
    check(make_tokens(Hk=Hk, Hv=Hv, Dk=Dk, Dv=Dv), [3, 4], [8, 9], T, assert_accurate)


@pytest.mark.parametrize("dims", [(128, 128), (256, 16)])
def test_large_heads(assert_accurate, dims):
    tokens = make_tokens(6, B=1, Hv=1, Dk=dims[0], Dv=dims[1], dtype=torch.bfloat16)
    check(tokens, [2], [6], 2, assert_accurate)


def test_64_tokens(assert_accurate):
    check(make_tokens(80, slots=80, Hv=1), [0, 16], [70, 80], 64, assert_accurate)


def test_a_full_ring(assert_accurate):
    check(make_tokens(40, slots=7), [30, 25], [37, 32], 3, assert_accurate)


def test_a_draft_leaves_the_state_alone(assert_accurate):
    tokens = make_tokens()
    _, state = check(tokens, [2, 5], [7, 9], 2, assert_accurate, update=False)
    assert torch.equal(state, tokens.state)


def test_nothing_new_is_accepted(assert_accurate):
    tokens = make_tokens()
    _, state = check(tokens, [4, 5], [7, 8], 3, assert_accurate)
    assert torch.equal(state, tokens.state)


def test_no_bit_depends_on_how_the_tokens_came():
    """One at a time, or drafted, rejected and drafted again: results and states are the same."""
    count = 13
    tokens = make_tokens(count, Dk=16, Dv=24)
    alone, states, state = [], [], tokens.state.clone()
    for n in range(count):
        alone.append(sk.gated_delta_rule(*tokens.call(state, [max(0, n - 1)] * 2, [n + 1] * 2, 1)))
        states.append(state.clone())  # after n tokens
    alone = torch.cat(alone, dim=1)
    state, known, length = tokens.state.clone(), [0, 0], [0, 0]
    for T, accepted in ((1, (1, 1)), (4, (4, 1)), (3, (0, 3)), (4, (2, 4)), (2, (1, 2))):
        for ahead in range(1, T):  # drafts go over everything since the state
            draft = [n + ahead for n in length]
            sk.gated_delta_rule(*tokens.call(state, known, draft, 1), update=False)
        kv_len = [n + T for n in length]
        out = sk.gated_delta_rule(*tokens.call(state, known, kv_len, T))
        known = length
        for b in range(2):
            assert torch.equal(out[b], alone[b, kv_len[b] - T : kv_len[b]])
            assert torch.equal(state[b], states[known[b]][b])
        length = [n + more for n, more in zip(length, accepted, strict=True)]


def test_a_row_has_its_bits_in_any_batch():
    tokens = make_tokens(B=3)
    state = tokens.state.clone()
    out = sk.gated_delta_rule(*tokens.call(state, [2, 5, 7], [11, 12, 9], 2))
    for b, (first, last) in enumerate(((2, 11), (5, 12), (7, 9))):
        one = make_tokens(B=3)
        for name in ("query", "key", "value", "g", "beta"):
            setattr(one, name, getattr(one, name)[b : b + 1])
        alone = tokens.state[b : b + 1].clone()
        assert torch.equal(
            sk.gated_delta_rule(*one.call(alone, [first], [last], 2)), out[b : b + 1]
        )
        assert torch.equal(alone, state[b : b + 1])


def test_views_of_one_projection():
    """Query, key and value as a model has them: parts of the convolution's result."""
    tokens = make_tokens(Hk=2, Hv=4, Dk=16, Dv=24)
    args = tokens.call(tokens.state.clone(), [2, 5], [8, 9], 3)
    expected = sk.gated_delta_rule(*args)
    wide = [x.new_full((*x.shape[:2], 40 + x.shape[2] * x.shape[3]), NAN) for x in args[:3]]
    views = []
    for x, room in zip(args[:3], wide, strict=True):
        room[..., 16:-24] = x.flatten(2)
        views.append(room[..., 16:-24].unflatten(2, x.shape[2:]))
    gates = [torch.stack((x, x), dim=1).flatten(1, 2)[:, : x.shape[1]] for x in args[3:5]]
    state = tokens.state.clone()
    assert torch.equal(sk.gated_delta_rule(*views, *gates, state, *args[6:]), expected)
    assert torch.equal(state, args[5])


def test_empty_batch():
    tokens = make_tokens(B=0)
    args = (x[:0] for x in make_tokens(B=1).call(torch.zeros(1, 2, 16, 16), [0], [3], 2))
    assert sk.gated_delta_rule(*args).shape == (0, 2, 2, 16)
    none = torch.zeros(0, dtype=torch.int32)
    inputs = torch.zeros(0, 16, 8)
    assert sk.causal_conv1d(inputs, torch.ones(8, 4), none, 2).shape == (0, 2, 8)
    assert tokens.count == 12


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_lengths(assert_accurate, data):
    T = data.draw(st.integers(1, 5), label="T")
    B = data.draw(st.integers(1, 3), label="B")
    state_len, kv_len = [], []
    for _ in range(B):
        state_len.append(data.draw(st.integers(0, 9), label="state_len"))
        kv_len.append(state_len[-1] + T + data.draw(st.integers(0, 6), label="accepted"))
    tokens = make_tokens(20, B=B, Hv=1, slots=11, seed=T)
    check(tokens, state_len, kv_len, T, assert_accurate)


def conv(tokens, kv_len, T, width=4, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    C, dtype = tokens.inputs.shape[2], tokens.inputs.dtype
    weight = torch.randn(C, width, generator=generator).to(dtype)
    last = torch.tensor(kv_len, dtype=torch.int32)
    ring = tokens.ring(tokens.inputs, last - T - width + 1, last)
    given = torch.randn(C, generator=generator).to(dtype) if bias else None
    return (ring, weight, last, T), given


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias, silu", [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("width, kv_len", [(4, [9, 12]), (4, [2, 3]), (1, [7, 2]), (8, [12, 3])])
def test_convolution(assert_accurate, dtype, bias, silu, width, kv_len):
    tokens = make_tokens(dtype=dtype, slots=9)
    args, given = conv(tokens, kv_len, 2, width, bias)
    options = {"bias": given, "silu": silu}
    exact = reference.causal_conv1d(*args, **options)
    rounded = reference.causal_conv1d(*args, bias=given).to(dtype)  # as a model has it
    plain = (torch.nn.functional.silu(rounded.float()) if silu else rounded).to(dtype)
    out = sk.causal_conv1d(*args, **options)
    assert out.dtype == dtype and out.is_contiguous()
    assert_accurate(out, exact, plain)


def test_a_token_of_a_convolution_has_its_bits_for_every_number_of_tokens():
    tokens = make_tokens(Hv=1, Dv=40)
    for T in (2, 5):
        args, given = conv(tokens, [12, 12], T)
        out = sk.causal_conv1d(*args, bias=given, silu=True)
        for t in range(T):
            one, given = conv(tokens, [13 - T + t] * 2, 1)
            assert torch.equal(sk.causal_conv1d(*one, bias=given, silu=True), out[:, t : t + 1])

"""Operators in portions: a token's bits are those that it has alone, whatever is fed with it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from std_decode.model import portions
from std_decode.model.portions import Portions, same_bits

HALF_OR_NOT = (torch.bfloat16, torch.float16, torch.float32)
plain = F.linear


def even(input, weight, bias=None):
    """One row at a time, so that the number of rows cannot matter."""
    rows = [plain(row, weight, bias) for row in input.flatten(0, -2).split(1)]
    out = torch.cat(rows) if rows else input.new_empty(0, len(weight))
    return out.view(*input.shape[:-1], len(weight))


def uneven(input, weight, bias=None):
    """A library that sums in another order where there are many rows."""
    if input.numel() // input.shape[-1] > 2:
        return even(input.roll(7, -1), weight.roll(7, -1), bias)
    return even(input, weight, bias)


@pytest.fixture(params=["the library's own", "uneven", "even"])
def library(request, monkeypatch):
    same_bits.cache_clear()
    if request.param != "the library's own":
        monkeypatch.setattr(F, "linear", {"uneven": uneven, "even": even}[request.param])
    yield request.param
    same_bits.cache_clear()


def linear(mode, *args):
    return mode.__torch_function__(F.linear, (), args)


@pytest.mark.parametrize("dtype", HALF_OR_NOT)
@pytest.mark.parametrize("batch, tokens", [(1, 5), (2, 4), (3, 1), (1, 40)])
def test_products_have_the_bits_of_plain_decoding(library, batch, tokens, dtype):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(48, 1536).to(dtype), requires_grad=False)
    for bias in (None, nn.Parameter(torch.randn(48).to(dtype), requires_grad=False)):
        states = torch.randn(batch, tokens, 1536).to(dtype)
        alone = [F.linear(states[:, t : t + 1].contiguous(), weight, bias) for t in range(tokens)]
        for shape in ((batch, tokens, -1), (batch * tokens, -1)):
            mode = Portions(batch, tokens, alone=True)
            got = linear(mode, states.view(*shape), weight, bias)
            assert torch.equal(got.view(batch, tokens, -1), torch.cat(alone, dim=1))


def test_what_is_tried_shows_another_order_of_sums(library):
    weight = torch.randn(48, 1536).bfloat16()
    product = portions._Product.of(weight, None)
    if library == "uneven":
        assert same_bits(product, 1, 2) and not same_bits(product, 1, 3)
    if library == "even":
        assert same_bits(product, 1, 3) and same_bits(product, 2, 6)


def test_products_that_are_alike_are_made_at_once(library, monkeypatch):
    rows, given = [], F.linear

    def counting(input, *others):
        rows.append(input.numel() // input.shape[-1])
        return given(input, *others)

    weight = nn.Parameter(torch.randn(8, 64), requires_grad=False)
    same_bits(portions._Product.of(weight, None), 1, 6)
    monkeypatch.setattr(F, "linear", counting)
    linear(Portions(1, 6, alone=True), torch.randn(1, 6, 64), weight)
    assert rows == {"uneven": [1] * 6, "even": [6]}.get(library, rows)
    rows.clear()
    # Passes of one shape have all products as they are.
    linear(Portions(1, 6, alone=False), torch.randn(1, 6, 64), weight)
    assert rows == [6]


@pytest.mark.parametrize("alone, batch", [(True, 1), (True, 2), (False, 2)])
def test_experts_have_each_token_as_if_no_other_chose_them(library, alone, batch):
    torch.manual_seed(1)
    experts = torch.randn(4, 24, 1536).bfloat16()
    mode = Portions(batch, 6, alone)
    states = torch.randn(5, 1536).bfloat16()
    got = linear(mode, states, experts[2])
    if not (alone and batch > 1 and mode.uneven):
        assert torch.equal(got, torch.cat([F.linear(row, experts[2]) for row in states.split(1)]))
    if library != "the library's own":
        # In plain decoding two tokens of a batch may choose one expert, or not.
        assert mode.uneven == (library == "uneven" and alone and batch > 1)


def test_experts_by_matmul_and_parts_of_a_batch(library):
    torch.manual_seed(4)
    mode, experts = Portions(1, 6, alone=True), torch.randn(4, 1536, 24).half()
    states = torch.randn(5, 1536).half()
    for function in (torch.matmul, torch.Tensor.__matmul__):
        got = mode.__torch_function__(function, (), (states, experts[1]))
        assert torch.equal(got, torch.cat([row @ experts[1] for row in states.split(1)]))
    bias, states = torch.randn(24).half(), torch.randn(6, 1536).half()
    got = mode.__torch_function__(torch.addmm, (), (bias, states, experts[0].contiguous()))
    alone = [F.linear(row, experts[0].contiguous().mT, bias) for row in states.split(1)]
    assert torch.equal(got, torch.cat(alone))
    many = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 8, 5)  # attention, as eager models have it
    assert torch.equal(mode.__torch_function__(torch.matmul, (), many), torch.matmul(*many))
    weight = nn.Parameter(torch.randn(24, 1536).bfloat16(), requires_grad=False)
    some = torch.randn(2, 4, 1536).bfloat16()  # of three rows, those with one adapter
    got = linear(Portions(3, 4, alone=True), some, weight)
    alone = [F.linear(some[:, t : t + 1].contiguous(), weight) for t in range(4)]
    assert torch.equal(got, torch.cat(alone, dim=1))


def grouped(library, input, weight, offs):
    outs, start = [], 0
    for matrix, end in zip(weight, offs.tolist()):
        outs.append(library(input[start:end], matrix.mT))
        start = end
    return torch.cat(outs)


@pytest.mark.parametrize("kind", [uneven, even])
def test_experts_in_groups(monkeypatch, kind):
    torch.manual_seed(2)
    same_bits.cache_clear()
    weight, states = torch.randn(4, 1536, 24).bfloat16(), torch.randn(9, 1536).bfloat16()
    offs = torch.tensor([4, 4, 5, 9], dtype=torch.int32)
    function = partial(grouped, kind)
    monkeypatch.setattr(portions, "_GROUPED", {function})
    mode = Portions(1, 6, alone=True)
    got = mode.__torch_function__(function, (), (states, weight), {"offs": offs})
    experts = torch.tensor([0] * 4 + [2] + [3] * 4)
    expected = [plain(row, weight[e].mT) for row, e in zip(states.split(1), experts)]
    assert torch.equal(got, torch.cat(expected))
    batch = Portions(2, 6, alone=True)
    batch.__torch_function__(function, (), (states, weight), {"offs": offs})
    assert batch.uneven == (kind is uneven)


@pytest.mark.parametrize("dtype", HALF_OR_NOT)
@pytest.mark.parametrize("width", [7, 40, 96])
def test_exponentials_do_not_depend_on_where_in_the_tensor_they_are(dtype, width):
    torch.manual_seed(3)
    for batch, tokens in ((1, 9), (3, 5)):
        states = (4 * torch.randn(batch, tokens, width)).to(dtype)
        with Portions(batch, tokens, alone=False):
            for function in (F.silu, partial(F.gelu, approximate="tanh"), torch.tanh, torch.exp):
                alone = [function(states[:, t : t + 1].contiguous()) for t in range(tokens)]
                assert torch.equal(function(states), torch.cat(alone, dim=1))
                flat = function(states.view(batch * tokens, width))
                assert torch.equal(flat.view_as(states), torch.cat(alone, dim=1))
            angles = states[None].expand(3, -1, -1, -1)  # a rotary embedding of several axes
            alone = [angles[:, :, t : t + 1].contiguous().cos() for t in range(tokens)]
            assert torch.equal(angles.cos(), torch.cat(alone, dim=2))

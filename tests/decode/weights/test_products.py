"""Products by the quickest kernel: what they are, whose they are, and when they are made so."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import std_decode
from std_decode.weights import products
from std_decode.weights.products import MOST_ROWS, PassLinear, Products
from std_decode.weights.twins import TwinnedLinear

ALL = frozenset(range(1, MOST_ROWS + 1))


@pytest.fixture
def rows(monkeypatch):
    """Has all small models take products so, and notes the rows of each."""
    seen = []
    plain = products.product
    monkeypatch.setattr(products, "LEAST_BYTES", 0)
    monkeypatch.setattr(
        products, "measured", lambda weights: {tuple(w.shape): ALL for w in weights}
    )
    monkeypatch.setattr(products, "product", lambda *a: seen.append(len(a[0])) or plain(*a))
    return seen


def kinds(model):
    return {name: type(x) for name, x in model.named_modules() if isinstance(x, nn.Linear)}


@pytest.mark.parametrize("shape", [(64, 16), (7, 5), (96, 24), (33, 8), (32, 8), (1, 3)], ids=str)
def test_a_product_is_the_usual_one_but_for_rounding(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    for count in range(1, MOST_ROWS + 1):
        given = torch.randn(count, shape[1])
        out = products.product(given, weight)
        assert out.shape == (count, shape[0]) and out.is_contiguous()
        exact = given.double() @ weight.double().T
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_what_was_not_measured_goes_the_usual_way(rows):
    layer = nn.Linear(16, 64)
    found = Products([layer])
    assert found.of_call() is found
    layer = layer.requires_grad_(False)
    given = torch.randn(2, 3, 16)
    out = found(given, layer.weight, layer.bias)
    torch.testing.assert_close(out, layer(given))
    assert out.shape == (2, 3, 64) and rows == [6]
    rows.clear()
    more = torch.randn(1, MOST_ROWS + 1, 16)
    half, other = copy.deepcopy(layer).bfloat16(), nn.Linear(16, 32).requires_grad_(False)
    apart = torch.randn(16, 64).T
    for x, w, b in (
        (more, layer.weight, layer.bias),
        (given.bfloat16(), half.weight, half.bias),
        (given, other.weight, other.bias),
        (given, apart, None),
    ):
        assert torch.equal(found(x, w, b), F.linear(x, w, b))
    assert rows == []


def test_small_half_precision_and_compiled_models_are_left_alone(make_case, monkeypatch):
    case = make_case("llama")
    before = kinds(case.model)
    with std_decode.patched(case.model):
        assert kinds(case.model) == before
    monkeypatch.setattr(products, "LEAST_BYTES", 0)
    with std_decode.patched(case.model, compile=True):
        assert kinds(case.model) == before
    case.model.bfloat16()
    with std_decode.patched(case.model):
        assert kinds(case.model) == before


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, dict(draft_weights="int4"), dict(fused_layers=True)],
    ids=["plain", "twins", "fused"],
)
def test_tokens_are_the_unpatched_models(make_case, rows, options, do_sample, monkeypatch):
    monkeypatch.setitem(make_case.text, "vocab_size", 128)
    case = make_case("qwen2_vl")  # which has biases
    expected, before = case.generate(do_sample=do_sample), kinds(case.model)
    with std_decode.patched(case.model, draft_length=3, top_k_keys=8, **options):
        twinned = "draft_weights" in options
        assert type(case.model.lm_head) is (TwinnedLinear if twinned else PassLinear)
        rows.clear()
        got = case.generate(do_sample=do_sample)
        stats = std_decode.last_stats(case.model)
    case.assert_same_tokens(expected, got, do_sample=do_sample)
    assert stats.fallback is None and stats.rounds > 1
    assert 4 in rows  # verification
    # Drafts have one row, three times as often; those with twins come elsewhere.
    assert (rows.count(1) > rows.count(4)) == (not twinned)
    assert kinds(case.model) == before


def test_a_promise_of_bits_keeps_its_products(make_case, rows):
    """Drafts change no bit, so their products need not be those of one shape."""
    case = make_case("llama", max_new_tokens=6)
    told = []
    for length in (0, 3):
        with std_decode.patched(case.model, draft_length=length, top_k_keys=8, reproducible=True):
            rows.clear()
            told.append(case.generate(output_logits=True, return_dict_in_generate=True))
            assert std_decode.last_stats(case.model).promise == "reproducible"
        assert set(rows) == ({1} if length else set())
    assert all(map(torch.equal, told[0].logits, told[1].logits))


def test_a_copy_is_given_back_as_it_was(make_case, rows):
    case = make_case("llama")
    before = kinds(case.model)
    std_decode.patch(case.model, draft_length=2)
    copied = copy.deepcopy(case.model)
    std_decode.unpatch(case.model)
    assert PassLinear in kinds(copied).values()
    std_decode.unpatch(copied)
    assert kinds(copied) == kinds(case.model) == before


def test_nothing_is_changed_where_patch_fails(make_case, rows, monkeypatch):
    case = make_case("llama")
    before = kinds(case.model)
    monkeypatch.setattr(std_decode.patching, "attach", lambda decoder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        std_decode.patch(case.model)
    assert kinds(case.model) == before


def test_the_choice_goes_by_what_was_measured(monkeypatch):
    """A turn that something got into decides nothing; a gain too small is none."""
    wide, narrow = torch.zeros(64, 8), torch.zeros(32, 8)
    turn = iter(range(10**6))

    def seconds(way, sample, inputs):
        count = len(inputs[8])
        usual = way is F.linear
        late = 50.0 if next(turn) % 4 < 2 else 0.0  # the first of two turns
        times = {(64, 8): 1.0 if usual or count > 2 else 0.5, (32, 8): 1.0 if usual else 0.95}
        return {shape: value + late for shape, value in times.items()}

    monkeypatch.setattr(products, "_seconds", seconds)
    assert products.measured([wide, narrow, wide]) == {(64, 8): {1, 2}, (32, 8): set()}


def test_each_shape_is_measured_and_no_more_than_a_part(monkeypatch):
    monkeypatch.setattr(products, "_SAMPLE", 10_000)
    monkeypatch.setattr(products, "_PART", 4_096)
    weights = [torch.zeros(n, 8) for n in (64, 512, 64, 64, 64, 32, 32)]
    found = products._sample(weights)
    assert [shape[0] for shape, _ in found] == [64, 512, 64, 64, 32]
    assert [len(part) for _, part in found] == [64, 128, 64, 64, 32]
    assert products.measured(weights).keys() == {(64, 8), (512, 8), (32, 8)}


def test_other_threads_are_measured_anew(rows, monkeypatch):
    threads, calls = SimpleNamespace(now=1), []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads.now)
    monkeypatch.setattr(products, "measured", lambda w: calls.append(threads.now) or {(4, 4): ALL})
    found = Products([nn.Linear(4, 4)])
    for threads.now in (1, 2, 1):
        assert found.of_call() is found
    assert calls == [1, 2]
    monkeypatch.setattr(products, "measured", lambda w: {(4, 4): frozenset()})
    assert Products([nn.Linear(4, 4)]).of_call() is None

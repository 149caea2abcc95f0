"""The LM head's best tokens by its own weights, and what columns count most."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import std_decode
from std_decode.weights import quantize
from std_decode.weights.moments import TEXTS, TOKENS, input_moments
from std_decode.weights.rescoring import CLASSES, rescored
from std_decode.weights.twins import TwinnedLinear

PATCH = dict(draft_weights="int4", draft_length=4, top_k_keys=10_000)


@pytest.fixture(autouse=True)
def whole(make_case, monkeypatch):
    """Every layer of these models can have a twin."""
    monkeypatch.setitem(make_case.text, "vocab_size", 128)


@pytest.mark.parametrize("dtype", quantize.FLOATS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_best_of_each_class_is_exact(dtype, bias):
    torch.manual_seed(0)
    weight, added = torch.randn(96, 64, dtype=dtype), torch.randn(96, dtype=dtype)
    given = torch.randn(2, 3, 64, dtype=dtype)
    exact = linear(given, weight, added if bias else None)
    logits = exact + torch.randn_like(exact)
    got = rescored(logits, given, weight, added if bias else None)
    for token in range(96):
        same_class = logits[..., token % CLASSES :: CLASSES]
        best = same_class.argmax(-1) == token // CLASSES
        wanted = torch.where(best, exact[..., token], logits[..., token])
        assert torch.allclose(got[..., token].float(), wanted.float(), atol=0.1, rtol=0.02)
        assert torch.equal(got[..., token][~best], logits[..., token][~best])
    assert got.dtype == dtype and got.shape == logits.shape


def test_a_draft_s_head_chooses_by_its_own_weights(make_case):
    """Twins of the head that are off by noise find the tokens all the same."""
    case = make_case("llama", 1, max_new_tokens=24)
    with std_decode.patched(case.model, **PATCH):
        for layer in case.model.modules():  # only the head is to be rounded
            if isinstance(layer, TwinnedLinear) and layer is not case.model.lm_head:
                layer._std_decode_twin.packed = None
        twin = case.model.lm_head._std_decode_twin
        rates = {}
        for twin.head in (True, False):
            case.generate()
            rates[twin.head] = std_decode.last_stats(case.model).acceptance_rate
    assert rates[True] == 1.0 and rates[False] < 0.95


def test_moments_are_those_of_the_inputs(make_case):
    case = make_case("llama", 1)
    decoder = case.model.get_decoder()
    with torch.no_grad():
        decoder.layers[1].input_layernorm.weight[5] *= 30
        decoder.norm.weight[7] *= 30
    layers = [x for x in case.model.modules() if isinstance(x, nn.Linear)]
    apart = nn.Linear(8, 8)
    before = torch.random.get_rng_state()
    found = input_moments(case.model, [*layers, apart])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert set(found) == set(layers)
    for layer, moments in found.items():
        assert moments.squares.shape == moments.mean.shape == (layer.in_features,)
        assert (moments.squares > 0).all()
        assert float(moments.squares.mean()) == pytest.approx(1.0, rel=1e-3)
        assert (moments.mean.square() < moments.squares).all()
    assert int(found[decoder.layers[1].self_attn.q_proj].squares.argmax()) == 5
    assert int(found[case.model.lm_head].squares.argmax()) == 7
    assert not any(layer._forward_pre_hooks for layer in layers)
    case.model.train()  # dropout would draw
    assert input_moments(case.model, layers) == {}


def test_moments_are_of_texts_that_the_model_goes_on_with(make_case):
    """What a layer is given while the model reads its own tokens back, the first one left out."""
    model = make_case("llama", 1).model
    layer, read, given = model.get_decoder().layers[1].mlp.down_proj, [], []
    hooks = [
        model.get_input_embeddings().register_forward_pre_hook(
            lambda _, args: read.append(args[0])
        ),
        layer.register_forward_pre_hook(lambda _, args: given.append(args[0])),
    ]
    found = input_moments(model, [layer])[layer]
    ids, ours = torch.cat(read, 1), torch.cat(given[1:]).flatten(0, 1).double()
    assert ids.shape == (TEXTS, 1 + TOKENS) and len(ours) == TEXTS * TOKENS
    given.clear()
    logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    whole = given[0][:, 1:].flatten(0, 1).double()
    scale = (whole.square().mean() * (1 + 8 / len(whole))).sqrt()
    assert torch.allclose(found.mean.double(), whole.mean(0) / scale, atol=1e-3)
    squares = whole.square().mean(0) + 8 / len(whole) * whole.square().mean()
    assert torch.allclose(found.squares.double(), squares / scale**2, rtol=1e-3)
    # Tokens that it likes, more than those of its choice at random would be.
    liked = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()
    assert liked > logits[:, :-1].log_softmax(-1).mean() + 0.5


def test_twins_are_rounded_for_what_the_layers_are_given(make_case):
    case = make_case("llama", 1)
    layer = case.model.get_decoder().layers[1].self_attn.q_proj
    with torch.no_grad():
        case.model.get_decoder().layers[1].input_layernorm.weight[5] *= 30
    moments = input_moments(case.model, [layer])[layer]
    with std_decode.patched(case.model, **PATCH):
        twin = layer._std_decode_twin
        wanted = quantize.quantize(layer.weight, *moments)
        assert torch.equal(twin.scales, wanted.scales)
        assert not torch.equal(twin.scales, quantize.quantize(layer.weight).scales)

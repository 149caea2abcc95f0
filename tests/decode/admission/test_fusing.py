"""Which layers are fused: by their parts, their code, and a trial of what they compute."""

import re

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama as llama

import std_decode
from std_decode.admission import fusing
from std_decode.admission.recognised import unlike
from std_decode.model.fused_layer import Fusion
from tests.decode.families import FAMILIES

FUSED = dict(fused_layers=True, draft_length=3, top_k_keys=8)
KNOWN = {
    *("llama", "qwen2", "qwen3", "mistral", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    *("llava_onevision", "llava", "internvl", "smolvlm"),
}
OTHERS = {
    "gemma2": "GELUTanh|activation",
    "gemma3": "GELUTanh|activation",
    "gpt_oss": "other parts",
    "ernie4_5_vl": "code of its own",
    "phi4_multimodal": "other parts",
    "chameleon": "attention with code of its own",
}


def first_layer(family):
    return FAMILIES[family].build(1)[0].get_decoder().layers[0]


@pytest.mark.parametrize("family", sorted(KNOWN))
def test_families_that_are_fused(family):
    assert unlike(first_layer(family)) is None


@pytest.mark.parametrize("family", OTHERS)
def test_families_that_are_not(family):
    assert re.search(OTHERS[family], unlike(first_layer(family)))


def test_classes_of_the_same_parts_and_another_meaning():
    """Known by their code: a multiplier, a clamp, a norm by 1 + weight, interleaved rotation."""
    from transformers import GemmaConfig, GraniteConfig, OlmoConfig
    from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer
    from transformers.models.granite.modeling_granite import GraniteDecoderLayer
    from transformers.models.olmo.modeling_olmo import OlmoDecoderLayer

    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=1)
    sizes |= dict(num_key_value_heads=2, vocab_size=9, pad_token_id=0)
    granite = GraniteDecoderLayer(GraniteConfig(**sizes), 0)
    assert unlike(granite) == "code of its own"
    gemma = GemmaConfig(**sizes, hidden_act="silu", hidden_activation="silu", head_dim=16)
    assert unlike(GemmaDecoderLayer(gemma, 0)) == "norms with code of their own"
    assert unlike(OlmoDecoderLayer(OlmoConfig(**sizes), 0)) == "attention with code of its own"


def wrap_forward(layer):
    layer.mlp.forward = layer.mlp.forward


def other_linear(layer):
    layer.mlp.up_proj.__class__ = type("Adapted", (nn.Linear,), {})


def hook(layer):
    layer.self_attn.o_proj.register_forward_hook(lambda *_: None)


def other_activation(layer):
    layer.mlp.act_fn = nn.GELU()


def mixed_dtypes(layer):
    layer.input_layernorm.double()


def own_code(layer):
    class Loud(llama.LlamaDecoderLayer):
        def forward(self, hidden_states, **kwargs):
            return super().forward(hidden_states, **kwargs)

    layer.__class__ = Loud


def own_attention(layer):
    class Clamped(llama.LlamaAttention):
        def forward(self, hidden_states, **kwargs):
            return super().forward(hidden_states.clamp(-1, 1), **kwargs)

    layer.self_attn.__class__ = Clamped


CHANGES = {
    wrap_forward: "a replaced forward",
    other_linear: "a Adapted, which is no plain nn.Linear",
    hook: "a hook",
    other_activation: "GELU as its activation",
    mixed_dtypes: "weights of several dtypes",
    own_code: "code of its own",
    own_attention: "attention with code of its own",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_is_not_known(change):
    layer = first_layer("llama")
    assert unlike(layer) is None
    change(layer)
    assert CHANGES[change] in unlike(layer)


def test_a_global_hook_is_seen():
    layer = first_layer("llama")
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "a hook" in unlike(layer)
    finally:
        handle.remove()


def tie(model):
    layers = model.model.layers
    layers[2].mlp.gate_proj.weight = layers[1].mlp.gate_proj.weight


def view(model):
    """Another parameter in the same memory."""
    model.extra = nn.Parameter(model.model.layers[1].self_attn.k_proj.weight.data[:3])


def part(model):
    linear = model.model.layers[1].mlp.up_proj
    linear.weight.data = torch.cat([linear.weight.data] * 2)[: linear.out_features]


def one_bias(model):
    attention = model.model.layers[1].self_attn
    attention.v_proj.bias = nn.Parameter(torch.randn(attention.v_proj.out_features))


@pytest.mark.parametrize("change, fused, because", [
    (tie, 1, "2 x weights that are shared"),
    (view, 2, "1 x weights that are shared"),
    (part, 2, "1 x weights that are part of a larger tensor"),
    (one_bias, 2, "1 x a bias in some"),
])  # fmt: skip
def test_weights_that_are_left_alone(make_case, change, fused, because):
    case = make_case("llama")
    change(case.model)
    expected = case.generate()
    addresses = {n: x.data_ptr() for n, x in case.model.named_parameters()}
    with std_decode.patched(case.model, **FUSED):
        got, stats = case.generate(), std_decode.last_stats(case.model)
        still = [n for n, x in case.model.named_parameters() if x.data_ptr() == addresses[n]]
    case.assert_same_tokens(expected, got)
    assert stats.fused_layers == fused and because in stats.fused_layers_because
    packed = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "gate", "up"))
    assert len([n for n in still if n.endswith(packed)]) == 5 * (3 - fused) - (change is tie)


FAULTS = {
    "scaling": lambda layer: setattr(layer.self_attn, "scaling", 0.9),
    "eps": lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 3.0),
    "weights": lambda layer: layer.mlp.gate_proj.weight.data.mul_(1.5),
}


@pytest.mark.parametrize("fault", FAULTS)
@torch.no_grad()
def test_a_trial_finds_a_layer_that_computes_something_else(make_case, monkeypatch, fault):
    """The fused form of one layer is made from another layer than the one it stands for."""
    case = make_case("llama")
    plain = Fusion.__call__

    def faulty(self, running, states, **kwargs):
        if self.name != "layers.1":
            return plain(self, running, states, **kwargs)
        state = {name: x.clone() for name, x in self.layer.state_dict().items()}
        before = self.layer.self_attn.scaling, self.layer.input_layernorm.variance_epsilon
        FAULTS[fault](self.layer)
        try:
            return plain(self, running, states, **kwargs)
        finally:
            self.layer.load_state_dict(state)
            self.layer.self_attn.scaling, self.layer.input_layernorm.variance_epsilon = before

    monkeypatch.setattr(Fusion, "__call__", faulty)
    tried = fusing.Fused(case.model, std_decode.patching.Tried(case.model).layers, True)
    assert [fusion.name for fusion in tried.fusions] == ["layers.0", "layers.2"]
    assert "another result in a trial" in tried.kept["layers.1"]


def test_a_trial_that_fails_is_no_error(make_case, monkeypatch):
    case = make_case("llama")
    expected = case.generate()

    def fail(*_, **__):
        raise ValueError("no such head dim")

    monkeypatch.setattr("std_decode.model.fused_layer.rope_write", fail)
    with std_decode.patched(case.model, **FUSED):
        assert torch.equal(expected, case.generate())
        stats = std_decode.last_stats(case.model)
    assert stats.fused_layers == 0
    assert "3 x a trial of it failed (ValueError: no such head dim)" in stats.fused_layers_because


def test_layers_of_two_models_are_fused_by_the_first(make_case):
    one, other = make_case("llama", 0), make_case("llama", 1)
    other.model.model = one.model.model
    expected = one.generate(), other.generate()
    with std_decode.patched(one.model, **FUSED), std_decode.patched(other.model, **FUSED):
        got = one.generate(), other.generate()
        stats = std_decode.last_stats(one.model), std_decode.last_stats(other.model)
    assert all(map(torch.equal, expected, got))
    assert [x.fused_layers for x in stats] == [3, 0]
    assert "shared with another patched model" in stats[1].fused_layers_because

"""What `patch` tries of a model: attention is judged alone, whatever rounding does to the rest."""

import copy
from types import MethodType

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.models.llama import modeling_llama

import std_decode
from std_decode.admission.eligibility import attention_layers
from tests.decode.deep import deepen, make_massive
from tests.decode.families import FAMILIES

DEPTH = 24
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FEW = ["llama", "gpt_oss", "gemma2", "qwen2_vl", "qwen3_vl_moe"]


def massive(family, depth=DEPTH):
    torch.manual_seed(0)
    model, _ = FAMILIES[family].build(1)
    return make_massive(deepen(model.float().eval(), depth))


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in FEW else pytest.mark.slow) for f in FAMILIES],
)
def test_deep_models_of_massive_activations_are_accepted(family):
    """In each dtype; one that is judged by its last layer is not, gpt-oss say (24% in float16)."""
    if Version(transformers.__version__) < Version(FAMILIES[family].since):
        pytest.skip(f"transformers has it since {FAMILIES[family].since}")
    model = massive(family)
    for dtype in DTYPES:
        attention_layers(model.to(dtype))


def leaning(slope, layer):
    """Attention of one layer that prefers what is near, by a little."""

    def lean(attention, args, kwargs):
        mask = kwargs["attention_mask"]
        new, past = kwargs["hidden_states"].shape[1], kwargs["position_ids"][0, 0]
        distance = torch.arange(past + new) - torch.arange(past, past + new)[:, None]
        bias = torch.where(distance > 0, float("-inf"), slope * distance)
        assert mask is None or mask.dtype == torch.bool
        return args, {**kwargs, "attention_mask": bias[None, None].to(model_dtype(attention))}

    def change(model):
        layer_of(model, layer).register_forward_pre_hook(lean, with_kwargs=True)

    return change


def model_dtype(module):
    return next(module.parameters()).dtype


def layer_of(model, layer):
    return model.model.layers[layer].self_attn


def rescaled(factor, layer):
    """A module that says another scale than it attends by."""

    def change(model, monkeypatch):
        dense = modeling_llama.eager_attention_forward

        def attend(module, *args, scaling, **kwargs):
            scaling = scaling * factor if module is layer_of(model, layer) else scaling
            return dense(module, *args, scaling=scaling, **kwargs)

        model.set_attn_implementation("eager")
        monkeypatch.setattr(modeling_llama, "eager_attention_forward", attend)
        # Or it would be refused as not transformers' own, before it is tried.
        monkeypatch.setattr("std_decode.admission.eligibility.foreign_attention", lambda *_: None)

    return change


def steered(layer):
    """Adds something to the newest token's state, which is every token while each is fed alone."""

    def change(model):
        torch.manual_seed(0)
        push = torch.randn(64).to(model.dtype) * 30

        def hook(module, args, output):
            output[:, -1] += push

        model.model.layers[layer].register_forward_hook(hook)

    return change


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", ["bias", "scale", "state"])
def test_one_layer_of_another_kind_is_found(dtype, change, monkeypatch):
    """Deep in a model whose last layer would not tell it from rounding."""
    model = massive("llama").to(dtype)
    attention_layers(model)
    if change == "bias":
        leaning(0.02, 11)(model)
    elif change == "scale":
        rescaled(1.02, 11)(model, monkeypatch)
    else:
        steered(11)(model)
    words = "layers.11 of LlamaForCausalLM makes" if change == "state" else "is not the causal"
    with pytest.raises(NotImplementedError, match=words):
        attention_layers(model)


def test_a_choice_of_experts_that_rounding_decides_once_is_no_obstacle(monkeypatch):
    """A layer has to fail with each of three texts."""
    from std_decode.admission import trial

    model = massive("gpt_oss").bfloat16()
    compare, texts = trial._Trial._compare, []

    def fails_with(wrong):
        def differing(self, name, got, wanted, scale):
            texts.append(int(self.ids[0, 0]))
            if name == "layers.3" and len(set(texts)) in wrong:
                got = got + 10 * scale
            compare(self, name, got, wanted, scale)

        texts.clear()
        monkeypatch.setattr(trial._Trial, "_compare", differing)

    fails_with({1, 2})
    attention_layers(model)
    assert len(set(texts)) == 3
    fails_with({1, 2, 3})
    with pytest.raises(NotImplementedError, match="layers.3 of GptOssForCausalLM makes"):
        attention_layers(model)


def test_logits_that_the_models_own_attention_rounds(monkeypatch):
    """To bfloat16, where they are large: what comes after attention is not to blame for it."""
    model = massive("gpt_oss")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(20)
    monkeypatch.setattr("std_decode.admission.trial.TEXTS", 1)
    attention_layers(model.bfloat16())


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen2_vl", "gemma3"])
def test_a_trial_leaves_nothing_behind(family, make_case, state_of):
    case = make_case(family, 1)
    expected, before = case.generate(), state_of(case.model)
    attention_layers(case.model)
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in case.model.modules()]
    assert state_of(case.model) == before and not any(hooks)
    assert torch.equal(case.generate(), expected)


def test_whatever_goes_wrong_names_the_model(make_case):
    """And the model is as it was."""

    def broken(self, *args, **kwargs):
        raise KeyError("something of its own")

    case = make_case("llama", 1)
    layer, expected = case.model.model.layers[1], case.generate()
    layer.mlp.forward = MethodType(broken, layer.mlp)
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM .*KeyError: 'something of"):
        std_decode.patch(case.model)
    del layer.mlp.forward
    model = copy.copy(case.model)
    model.get_decoder = lambda: model.lm_head
    with pytest.raises(
        NotImplementedError, match="LlamaForCausalLM gives a Linear as its decoder"
    ):
        std_decode.patch(model)
    assert torch.equal(case.generate(), expected) and not std_decode.is_patched(case.model)
    std_decode.patch(case.model)


def test_memory_that_ends_in_a_trial_says_so(make_case, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    case = make_case("llama", 1)
    monkeypatch.setattr(case.model.model.layers[1].mlp, "forward", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        std_decode.patch(case.model)

"""The class of a patched instance, and other instances of it, which were never patched."""

import copy
import inspect
import json
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import std_decode

PATCH = dict(draft_length=4, top_k_keys=8)


def with_weights_of(model, other):
    other.load_state_dict(model.state_dict())
    return other.eval()


def built(model, folder):
    return with_weights_of(model, type(model)(model.config))


def loaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def derived(model, folder):
    kind = type("Derived", (type(model),), {})
    return with_weights_of(model, kind(model.config))


MAKERS = {
    "type(model)(config)": built,
    "from_pretrained": loaded,
    "_from_config": lambda model, _: with_weights_of(
        model, type(model)._from_config(model.config)
    ),
    "a class derived from it": derived,
}


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
@pytest.mark.parametrize("how", MAKERS)
def test_another_instance_of_the_class_is_not_patched(make_case, tmp_path, how, family):
    case = make_case(family, seed=1)
    original, expected = case.model, case.generate()
    beams = case.generate(num_beams=2)
    std_decode.patch(original, **PATCH)
    case.generate()
    stats = std_decode.last_stats(original)
    case.model = other = MAKERS[how](original, tmp_path)
    assert isinstance(other, type(original)) and not std_decode.is_patched(other)
    assert torch.equal(case.generate(), expected)
    assert torch.equal(case.generate(num_beams=2), beams)
    assert std_decode.last_stats(original) is stats
    for of in (std_decode.last_stats, std_decode.unpatch):
        with pytest.raises(RuntimeError, match=f"{type(other).__name__} is not patched"):
            of(other)


@pytest.mark.parametrize("how", ["type(model)(config)", "from_pretrained"])
def test_another_instance_of_the_class_can_be_patched(make_case, tmp_path, how):
    case = make_case("qwen2_vl", seed=2)
    original, expected, kind = case.model, case.generate(), type(case.model)
    std_decode.patch(original, **PATCH)
    case.model = MAKERS[how](original, tmp_path)
    std_decode.patch(case.model, **PATCH)
    assert type(case.model).__mro__[2:] == kind.__mro__  # nothing is mixed in twice
    assert torch.equal(case.generate(), expected)
    assert std_decode.last_stats(case.model).rounds > 0
    assert std_decode.last_stats(original) is None
    std_decode.unpatch(case.model)
    assert type(case.model) is kind and std_decode.is_patched(original)
    assert torch.equal(case.generate(), expected)


def test_an_instance_of_a_derived_class_is_refused(make_case, state_of):
    """Its own methods would be called around ours, and have to be called within."""
    case = make_case("llama", seed=3)
    std_decode.patch(case.model)
    other = derived(case.model, None)
    before = state_of(other)
    with pytest.raises(NotImplementedError, match="Derived derives from the class of a patched"):
        std_decode.patch(other)
    assert state_of(other) == before


def test_a_class_derived_from_it_keeps_the_instance_patched(make_case):
    """As FSDP's fully_shard does it, which gives an instance a class that derives from its own."""
    case = make_case("llama", seed=4)
    kind, expected = type(case.model), case.generate()
    std_decode.patch(case.model, **PATCH)
    case.model.__class__ = type("Sharded", (type(case.model),), {})
    assert std_decode.is_patched(case.model)
    assert torch.equal(case.generate(), expected)
    assert std_decode.last_stats(case.model).rounds > 0
    std_decode.unpatch(case.model)
    assert type(case.model) is kind


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_a_copy_of_another_instance_is_of_the_own_class(make_case, protocol):
    case = make_case("llama", seed=5)
    kind, expected = type(case.model), case.generate()
    std_decode.patch(case.model, **PATCH)
    other = built(case.model, None)
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other, protocol))):
        assert type(copied) is kind
        case.model = copied
        assert torch.equal(case.generate(), expected)


def test_another_instance_saves_as_its_own_class(make_case, tmp_path):
    case = make_case("llama", seed=6)
    std_decode.patch(case.model)
    built(case.model, None).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]


def test_peft_on_another_instance(make_case):
    from peft import LoraConfig, get_peft_model

    case = make_case("llama", seed=7)
    std_decode.patch(case.model, **PATCH)
    other = built(case.model, None)
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    case.model = get_peft_model(other, lora).eval()
    assert not std_decode.is_patched(case.model)
    expected = case.generate()
    with std_decode.patched(case.model, **PATCH):
        assert torch.equal(case.generate(), expected)
        assert std_decode.last_stats(case.model).rounds > 0


def test_the_class_can_be_registered(make_case):
    class OwnConfig(LlamaConfig):
        model_type = "std_decode_test"

    case = make_case("llama", seed=8)
    std_decode.patch(case.model)
    AutoConfig.register("std_decode_test", OwnConfig)
    type(case.model).config_class = OwnConfig
    AutoModelForCausalLM.register(OwnConfig, type(case.model))
    small = dict(vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    other = AutoModelForCausalLM.from_config(OwnConfig(**small, num_attention_heads=2))
    ids = torch.arange(5)[None]
    assert other.generate(ids, max_new_tokens=3).shape == (1, 8)
    assert not std_decode.is_patched(other)


def layers_of_decoration(function):
    found = [function]
    while hasattr(found[-1], "__wrapped__"):
        found.append(found[-1].__wrapped__)
    return found


def test_generate_looks_like_the_original(make_case):
    case = make_case("llama")
    plain = layers_of_decoration(type(case.model).generate)
    std_decode.patch(case.model)
    ours = layers_of_decoration(type(case.model).generate)
    assert len(ours) == len(plain) >= 2  # torch.no_grad among them
    for one, other in zip(ours, plain):
        assert inspect.signature(one) == inspect.signature(other)
        assert one.__doc__ == other.__doc__ and one.__name__ == "generate"


def test_a_changed_model_with_a_generating_part_generates_itself(make_case):
    """Our generate is not taken for one of its own, which would run its part's."""
    case, other = make_case("llama", seed=9), make_case("llama", seed=10)
    case.model.part = other.model
    expected = case.generate()
    with std_decode.patched(case.model, **PATCH):
        first = case.model.get_decoder().layers[0]
        first.mlp = copy.deepcopy(first.mlp)
        assert torch.equal(case.generate(), expected)
        assert std_decode.last_stats(case.model).fallback is None

"""Whose attention a model runs, and what is done with attention that is somebody else's."""

import copy
import functools
import pickle
from types import MethodType

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.llama import modeling_llama

import std_decode

PATCH = dict(draft_length=4, top_k_keys=8)


def stats_of(case):
    case.generate()
    return std_decode.last_stats(case.model)


def wrapped(forward):
    """As a decorator does it, which keeps the name that it covers."""

    @functools.wraps(forward)
    def run(*args, **kwargs):
        return forward(*args, **kwargs)

    return run


@pytest.fixture
def registered():
    """Registers functions, and puts back what was there."""
    kept = [
        (kind, dict(kind._global_mapping)) for kind in (AttentionInterface, AttentionMaskInterface)
    ]

    def register(name, function, mask=sdpa_mask):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask)

    yield register
    for kind, mapping in kept:
        kind._global_mapping.clear()
        kind._global_mapping.update(mapping)


@pytest.mark.parametrize("family", ["llama", "llava_onevision"])
def test_a_name_that_is_not_transformers(make_case, registered, family):
    """Also of a function that is: the mask that goes with it may be any."""
    registered("mine", sdpa_attention_forward)
    case = make_case(family, 1)
    nested = family != "llama"

    def attend(name):
        case.model.set_attn_implementation({"text_config": name} if nested else name)

    attend("mine")
    with pytest.raises(NotImplementedError, match="attends by 'mine'.*set_attn_implementation"):
        std_decode.patch(case.model, **PATCH)
    attend("sdpa")
    std_decode.patch(case.model, **PATCH)
    attend("mine")
    assert "changed after patch" in stats_of(case).fallback
    assert "attends by 'mine'" in std_decode.last_stats(case.model).fallback
    attend("eager")
    assert stats_of(case).fallback is None
    assert std_decode.last_stats(case.model).rounds > 0


@pytest.mark.parametrize("what", ["function", "mask"])
def test_another_function_under_transformers_name(make_case, registered, what):
    case = make_case("llama", 1)
    std_decode.patch(case.model, **PATCH)
    if what == "function":
        registered("sdpa", wrapped(sdpa_attention_forward))
        words = "attends by transformers.integrations.sdpa_attention.sdpa_attention_forward in"
    else:
        registered("sdpa", sdpa_attention_forward, wrapped(sdpa_mask))
        words = "masks by transformers.masking_utils.sdpa_mask, which was registered as 'sdpa'"
    assert words in stats_of(case).fallback
    registered("sdpa", sdpa_attention_forward)
    assert stats_of(case).fallback is None


def test_the_eager_function_of_the_models_file(make_case, monkeypatch):
    case = make_case("llama", 1)
    case.model.set_attn_implementation("eager")
    std_decode.patch(case.model, **PATCH)
    assert stats_of(case).fallback is None
    own = wrapped(modeling_llama.eager_attention_forward)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", own)
    assert "eager_attention_forward in layer 0" in stats_of(case).fallback
    case.model.set_attn_implementation("sdpa")
    assert stats_of(case).fallback is None


PARTS = {
    "decoder": lambda model: model.model,
    "layers.1": lambda model: model.model.layers[1],
    "layers.2.self_attn": lambda model: model.model.layers[2].self_attn,
}


@pytest.mark.parametrize("where", ["instance", "class", "another class"])
@pytest.mark.parametrize("part", PARTS)
def test_another_forward(make_case, monkeypatch, part, where):
    case = make_case("llama", 1)
    module = PARTS[part](case.model)
    forward = wrapped(type(module).forward)

    def replace():
        if where == "instance":
            module.forward = MethodType(forward, module)
        elif where == "class":
            monkeypatch.setattr(type(module), "forward", forward)
        else:
            names = {"forward": forward, "__module__": __name__}
            module.__class__ = type("Pruned", (type(module),), names)

    expected = case.generate()
    for length in ("auto", 4, 0):
        with std_decode.patched(case.model, draft_length=length):
            stats_of(case)
            replace()
            assert torch.equal(case.generate(), expected)
            # A class is named that stands before the part itself: all layers are of it.
            told = std_decode.last_stats(case.model).fallback
            named = "layers.0" if where == "class" and "." in part else part
            assert "changed after patch" in told and f"its {named}" in told
        with pytest.raises(NotImplementedError, match="^patch: LlamaForCausalLM has .* its "):
            std_decode.patch(case.model)
        monkeypatch.undo()
        module.__dict__.pop("forward", None)
        if where == "another class":
            module.__class__ = type(module).__mro__[1]
        std_decode.patch(case.model)
        std_decode.unpatch(case.model)


def test_a_forward_that_torch_compiles_is_the_models_own(make_case):
    """As transformers' documentation has it: ``model.forward = torch.compile(model.forward)``."""
    case = make_case("llama", 1)
    for module in (case.model, case.model.model, case.model.model.layers[1].self_attn):
        module.forward = torch.compile(module.forward, backend="eager")
    std_decode.patch(case.model, **PATCH)
    assert stats_of(case).fallback is None


def test_a_forward_that_accelerate_wraps_is_the_models_own(make_case):
    from accelerate.hooks import ModelHook, add_hook_to_module

    case = make_case("llama", 1)
    layer = case.model.model.layers[1].self_attn
    add_hook_to_module(layer, ModelHook())
    std_decode.patch(case.model, **PATCH)
    assert stats_of(case).fallback is None
    layer._old_forward = MethodType(wrapped(type(layer).forward), layer)
    layer.forward = functools.partial(layer.forward.func, layer)
    assert "has transformers.models.llama" in stats_of(case).fallback


def test_a_module_of_somebody_elses_in_the_models_place(make_case):
    case = make_case("llama", 1)
    std_decode.patch(case.model, **PATCH)
    own = type("Attention", (modeling_llama.LlamaAttention,), {"__module__": __name__})
    layer = case.model.model.layers[0]
    new = own(layer.self_attn.config, 0).eval()
    new.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = new
    assert f"a Attention of {__name__} as its layers.0.self_attn" in stats_of(case).fallback


class Whole(modeling_llama.LlamaForCausalLM):
    """A model of the user's own, with attention of its own file."""


class Own(modeling_llama.LlamaAttention):
    pass


def test_attention_of_the_models_own_file(make_case):
    case = make_case("llama", 1)
    case.model.__class__ = Whole
    for layer in case.model.model.layers:
        layer.self_attn.__class__ = Own
    std_decode.patch(case.model, **PATCH)
    assert stats_of(case).fallback is None


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_looks_for_itself(make_case, how, registered):
    case = make_case("llama", 1)
    std_decode.patch(case.model, **PATCH)
    expected = case.generate()
    if how == "deepcopy":
        case.model = copy.deepcopy(case.model)
    else:
        case.model = pickle.loads(pickle.dumps(case.model))
    assert torch.equal(case.generate(), expected)
    assert std_decode.last_stats(case.model).rounds > 0
    registered("mine", sdpa_attention_forward)
    case.model.set_attn_implementation("mine")
    assert "attends by 'mine'" in stats_of(case).fallback


def test_a_prompt_that_loses_tokens_on_its_way_is_not_gone_on_with(make_case, monkeypatch):
    """Token pruning in a part whose forward may be anybody's."""
    case = make_case("llama", 1)
    forward = modeling_llama.LlamaForCausalLM.forward

    def prune(self, input_ids=None, position_ids=None, **kwargs):
        if input_ids.shape[1] > 20:
            input_ids, position_ids = input_ids[:, -20:], position_ids[:, -20:]
            kwargs["attention_mask"] = None
        return forward(self, input_ids=input_ids, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", prune)
    std_decode.patch(case.model, **PATCH)
    with pytest.raises(
        RuntimeError, match="keys of 20 tokens for a prompt of 90, expected as many"
    ):
        case.generate()

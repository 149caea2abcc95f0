"""patch and unpatch: what they refuse, and that nothing is left behind when they do."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import std_decode


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(top_k_keys=0), ValueError, "top_k_keys is 0, expected at least 1"),
        (dict(top_k_keys=2.5), TypeError, "top_k_keys is 2.5, expected an int"),
        (dict(top_k_keys=True), TypeError, "top_k_keys is True, expected an int"),
        (dict(draft_length=-1), ValueError, "draft_length is -1, expected 0 <= draft_length"),
        (dict(draft_length=64), ValueError, "draft_length is 64, expected"),
        (dict(draft_length="many"), TypeError, "draft_length is 'many', expected an int or"),
        (dict(reselect=1), TypeError, "reselect is 1, expected True or False"),
        (
            dict(visual_token_ids=7),
            TypeError,
            r"ids is 7, expected a list of ints; for one id giv",
        ),
        (dict(visual_token_ids=""), TypeError, "visual_token_ids is '', expected a list of int"),
        (dict(visual_token_ids=[7, 8.0]), TypeError, "expected a list of ints"),
        (dict(visual_token_ids=[True]), TypeError, "expected a list of ints"),
        (dict(visual_mask=[True]), TypeError, "visual_mask is .True., expected a bool tensor"),
        (dict(visual_mask=torch.ones(3)), TypeError, "visual_mask is torch.float32, expected a b"),
        (dict(gamma=4), TypeError, "unexpected keyword argument 'gamma'"),
    ],
    ids=str,
)
def test_bad_options_name_what_was_expected(make_case, state_of, options, error, words):
    case = make_case("llama")
    before = state_of(case.model)
    with pytest.raises(error, match=words.replace("(", r"\(")):
        std_decode.patch(case.model, **options)
    assert state_of(case.model) == before and not std_decode.is_patched(case.model)


@pytest.mark.parametrize("thing", [None, "model", nn.Linear(2, 2)], ids=["None", "str", "Linear"])
def test_what_is_no_generative_model_is_refused(thing):
    with pytest.raises(TypeError, match="expected a transformers model that can generate"):
        std_decode.patch(thing)
    with pytest.raises(RuntimeError, match="is not patched"):
        std_decode.unpatch(thing)


def test_a_base_model_without_a_head_is_refused(make_case):
    with pytest.raises(TypeError, match="LlamaModel, expected"):
        std_decode.patch(make_case("llama").model.model)


def test_patching_twice_and_unpatching_the_unpatched(make_case):
    case = make_case("llama")
    with pytest.raises(RuntimeError, match="unpatch: LlamaForCausalLM is not patched"):
        std_decode.unpatch(case.model)
    with pytest.raises(RuntimeError, match="last_stats: LlamaForCausalLM is not patched"):
        std_decode.last_stats(case.model)
    std_decode.patch(case.model, top_k_keys=5)
    with pytest.raises(RuntimeError, match=r"patched already.*unpatch\(model\) first"):
        std_decode.patch(case.model, top_k_keys=6)
    assert case.model._std_decode.top_k_keys == 5
    std_decode.unpatch(case.model)
    assert not std_decode.is_patched(case.model)


def test_a_patched_model_looks_like_the_original(make_case):
    case = make_case("qwen2_vl")
    kind, state = type(case.model), case.model.state_dict()
    assert std_decode.patch(case.model) is case.model
    patched_kind = type(case.model)
    assert isinstance(case.model, kind) and patched_kind is not kind
    for name in ("__name__", "__module__", "__qualname__"):
        assert getattr(patched_kind, name) == getattr(kind, name)
    assert std_decode.last_stats(case.model) is None
    assert case.model.get_decoder().config._attn_implementation == "sdpa"
    assert all(torch.equal(a, b) for a, b in zip(state.values(), case.model.state_dict().values()))


def test_a_patched_model_saves_and_loads_as_the_original(make_case, tmp_path):
    case = make_case("llama")
    expected = case.generate()
    with std_decode.patched(case.model, draft_length=2):
        case.generate()
        case.model.save_pretrained(tmp_path)
    assert "std_decode" not in (tmp_path / "config.json").read_text()
    case.model = type(case.model).from_pretrained(tmp_path)
    assert torch.equal(case.generate(), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_prefill_goes_through_the_attention_the_model_had(make_case, attention):
    case = make_case("llama")
    case.model.set_attn_implementation(attention)
    expected = case.generate()
    with std_decode.patched(case.model, draft_length=4, top_k_keys=8):
        got = case.generate()
    assert torch.equal(expected, got)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_patched_model_is_patched_and_its_own(make_case, how, family):
    case = make_case(family, seed=1)
    expected, original = case.generate(), case.model
    kind = type(original)
    std_decode.patch(original, draft_length=3, top_k_keys=8)
    case.generate()
    copied = COPIES[how](original)
    assert std_decode.is_patched(copied) and isinstance(copied, kind)
    own = set(copied._std_decode.layers.values())
    assert own <= set(copied.modules())
    assert own.isdisjoint(original._std_decode.layers.values())
    std_decode.unpatch(original)
    assert std_decode.is_patched(copied) and type(original) is kind
    assert torch.equal(case.generate(), expected)
    case.model = copied
    assert torch.equal(case.generate(), expected)
    stats = std_decode.last_stats(copied)
    assert stats.rounds > 0 and set(stats.draft_lengths) <= {1, 2, 3}
    std_decode.patch(original)
    std_decode.unpatch(copied)
    assert std_decode.is_patched(original) and type(copied) is kind
    assert torch.equal(case.generate(), expected)


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, lora).eval()


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "PEFT": with_lora,
    "compiled": compiled,
    "PEFT in PEFT": lambda model: with_lora(with_lora(model)),
    "PEFT, compiled": lambda model: compiled(with_lora(model)),
    "compiled, in PEFT": lambda model: with_lora(compiled(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_is_looked_through(make_case, name):
    case = make_case("qwen2_vl", seed=1)
    plain, inner = case.generate(), case.model
    kind = type(inner)
    case.model = WRAPPERS[name](inner)
    outer = type(case.model)
    expected = case.generate()
    assert torch.equal(plain, expected) == ("PEFT" not in name)
    with std_decode.patched(case.model, draft_length=4, top_k_keys=8) as model:
        assert model is case.model and type(model) is outer
        assert std_decode.is_patched(model) and std_decode.is_patched(inner)
        with pytest.raises(RuntimeError, match=f"patch: {kind.__name__} is patched already"):
            std_decode.patch(model)
        got = case.generate()
        assert std_decode.last_stats(model).rounds > 0
        assert std_decode.last_stats(model) is std_decode.last_stats(inner)
    assert torch.equal(expected, got)
    assert type(inner) is kind and not std_decode.is_patched(case.model)


@pytest.mark.eager  # what is counted is not called again in a replay
def test_a_model_compiled_in_place(make_case, monkeypatch):
    """Its passes go through the compiled call; that this runs them as they are is tested in
    test_features.py."""
    passes = []

    def compile(call, **_):
        return lambda *args, **kwargs: passes.append(1) or call(*args, **kwargs)

    case = make_case("llama", seed=1)
    expected = case.generate()
    monkeypatch.setattr(torch, "compile", compile)
    case.model.compile()
    with std_decode.patched(case.model, draft_length=4, top_k_keys=8):
        got = case.generate()
        calls = std_decode.last_stats(case.model).calls
    assert torch.equal(expected, got)
    assert len(passes) == sum(calls.values()) - calls["select"] and calls["verify"] > 0


def test_patched_undoes_itself_after_an_error(make_case):
    case = make_case("llama")
    with pytest.raises(ZeroDivisionError), std_decode.patched(case.model):
        raise ZeroDivisionError
    assert not std_decode.is_patched(case.model)


def test_stats_count_what_happened(make_case):
    from dataclasses import asdict

    case = make_case("qwen2_vl", seed=2, rows=3, eos=True)
    prompt = case.inputs["input_ids"].shape[1]
    expected = case.generate()[:, prompt:]
    ends = torch.isin(expected, torch.tensor(case.options["eos_token_id"])).int().argmax(1) + 1
    with std_decode.patched(case.model, draft_length=3, top_k_keys=8):
        case.generate()
        stats = std_decode.last_stats(case.model)
    assert stats.mode == "ragged" and stats.fallback is None and stats.lockstep_because is None
    assert stats.prompt_tokens == prompt
    assert stats.emitted == int(ends.sum())
    assert stats.rounds == len(stats.draft_lengths) == stats.calls["verify"]
    assert stats.calls["draft"] == sum(stats.draft_lengths)
    assert stats.calls["prefill"] == 1
    assert 0 <= stats.accepted <= stats.drafted <= 3 * sum(stats.draft_lengths)
    assert stats.acceptance_rate == stats.accepted / stats.drafted
    # Each row takes part in the passes up to its end, and so in no more than there were.
    passes = stats.calls["verify"] + stats.calls["dense"]
    assert (stats.emitted - 3) / (3 * passes) <= stats.mean_accepted_length <= 4
    assert stats.peak_memory_bytes > 2**20
    assert asdict(stats)["seconds"]["verify"] > 0
    assert "acceptance rate" in str(stats)

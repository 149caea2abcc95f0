"""patch and unpatch: what they refuse, and that nothing is left behind when they do."""

import pytest
import torch
from torch import nn

import std_decode


def state_of(model):
    """All that patch could leave behind on a model."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return (
        type(model),
        {key: value for key, value in vars(model).items() if not key.startswith("_modules")},
        decoder.config._attn_implementation,
        model.config.to_dict(),
    )


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
        (dict(gamma=4), TypeError, "unexpected keyword argument 'gamma'"),
    ],
    ids=str,
)
def test_bad_options_name_what_was_expected(make_case, options, error, words):
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


def unsupported(name):
    import transformers

    small = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    if name == "t5":
        config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=2)
        return transformers.T5ForConditionalGeneration(config)
    if name == "bloom":  # ALiBi: an additive bias
        config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2)
        return transformers.BloomForCausalLM(config)
    if name == "llama4":
        config = transformers.Llama4TextConfig(
            **small, intermediate_size=32, intermediate_size_mlp=32, num_key_value_heads=2,
            head_dim=16, num_local_experts=2, attention_chunk_size=8,
        )  # fmt: skip
        return transformers.Llama4ForCausalLM(config)
    if name == "mamba":
        config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)
        return transformers.MambaForCausalLM(config)
    if name == "deepseek_v3":  # K and V of different widths
        config = transformers.DeepseekV3Config(
            **small, intermediate_size=32, moe_intermediate_size=16, n_routed_experts=4,
            n_group=1, topk_group=1, num_experts_per_tok=2, num_key_value_heads=2,
            kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16,
            v_head_dim=8, first_k_dense_replace=1,
        )  # fmt: skip
        return transformers.DeepseekV3ForCausalLM(config)
    config = transformers.LlamaConfig(
        **{**small, "num_attention_heads": 8}, intermediate_size=32, num_key_value_heads=4,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)  # head dim 4


@pytest.mark.parametrize("name", ["t5", "bloom", "llama4", "mamba", "deepseek_v3", "narrow heads"])
def test_unsupported_models_are_named_and_left_alone(name):
    torch.manual_seed(0)
    model = unsupported(name).eval()
    before = state_of(model)
    with pytest.raises(NotImplementedError, match="supported are") as raised:
        std_decode.patch(model)
    assert type(model).__name__ in str(raised.value)
    assert state_of(model) == before


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


def test_a_peft_model_is_looked_through(make_case):
    from peft import LoraConfig, get_peft_model

    case = make_case("qwen2_vl", seed=1)
    plain = case.generate()
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    case.model = get_peft_model(case.model, lora)
    expected = case.generate()
    assert not torch.equal(plain, expected)
    with std_decode.patched(case.model, draft_length=4, top_k_keys=8) as model:
        assert model is case.model and std_decode.is_patched(model)
        got = case.generate()
        assert std_decode.last_stats(model).rounds > 0
    assert torch.equal(expected, got)


def test_a_compiled_model_is_looked_through(make_case):
    case = make_case("llama", seed=1)
    expected = case.generate()
    case.model = torch.compile(case.model, backend="eager")
    with std_decode.patched(case.model, draft_length=4, top_k_keys=8):
        got = case.generate()
        assert std_decode.last_stats(case.model).rounds > 0
    assert torch.equal(expected, got)


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

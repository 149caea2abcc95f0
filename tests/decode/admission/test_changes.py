"""A model that is changed after patch, and settings of PyTorch around it: the tokens it would have
given unpatched, drafted where that is safe.
"""

import copy
import warnings

import pytest
import torch
from torch import nn

import std_decode

PATCH = dict(draft_length=4, top_k_keys=8)


def both(case, **options):
    return [case.generate(do_sample=sampled, **options) for sampled in (False, True)]


def assert_unpatched_tokens(make, change, call=both, **options):
    """`change` one model after patch and another that is never patched; the stats of the first."""
    plain, patched = make(), make()
    std_decode.patch(patched.model, **PATCH)
    both(patched)
    change(plain), change(patched)
    expected, got = call(plain, **options), call(patched, **options)
    for one, other in zip(expected, got):
        assert torch.equal(one, other)
    return std_decode.last_stats(patched.model)


def steer(case):
    """Adds something to the newest token's state, which is every token while each is fed alone."""
    torch.manual_seed(0)
    push = torch.randn(64)

    def hook(module, args, output):
        output[:, -1] += push

    case.model.model.layers[1].register_forward_hook(hook)


def prune(case):
    case.model.model.layers = case.model.model.layers[:2]
    case.model.config.num_hidden_layers = 2


def prune_half_way(case):
    """And not tell the configuration."""
    case.model.model.layers = case.model.model.layers[:2]


def replace_attention(case):
    for layer in case.model.model.layers:
        old = layer.self_attn
        layer.self_attn = type(old)(old.config, old.layer_idx).eval()
        layer.self_attn.load_state_dict(old.state_dict())


def copy_decoder(case):
    case.model.model = copy.deepcopy(case.model.model)


class Coarse(nn.Module):
    """Rounds its input by the largest value in it, as dynamic quantisation does."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, states):
        step = states.abs().max() / 15
        return self.linear((states / step).round() * step)


def quantize(case):
    for layer in case.model.model.layers:
        layer.mlp.up_proj = Coarse(layer.mlp.up_proj).eval()


def widen(case):
    case.model.double()


CHANGES = {
    steer: "a hook was put on model.layers.1 after patch",
    prune: None,
    prune_half_way: "changed after patch: LlamaForCausalLM has 2 causal attention modules",
    replace_attention: None,
    copy_decoder: None,
    quantize: "changed after patch: model.layers.0.mlp.up_proj (Coarse) gives a token another",
    widen: "query has dtype float64",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_was_changed_after_patch(make_case, change):
    stats = assert_unpatched_tokens(lambda: make_case("llama", 1, 2), change)
    reason = CHANGES[change]
    if reason is None:
        assert stats.fallback is None and stats.rounds > 0
    else:
        assert reason in stats.fallback and "supported are" not in stats.fallback


def test_a_change_is_tried_once_and_may_be_undone(make_case, monkeypatch):
    case = make_case("llama", 1, 2)
    std_decode.patch(case.model, **PATCH)
    layer, trials = case.model.model.layers[0], []
    trial = std_decode.admission.changes.attention_layers
    monkeypatch.setattr(
        std_decode.admission.changes,
        "attention_layers",
        lambda *args: trials.append(1) or trial(*args),
    )
    expected, plain = case.generate(), layer.mlp.up_proj
    layer.mlp.up_proj = Coarse(plain).eval()
    both(case)
    assert len(trials) == 1 and std_decode.last_stats(case.model).fallback is not None
    layer.mlp.up_proj = plain
    assert torch.equal(case.generate(), expected)
    assert len(trials) == 2 and std_decode.last_stats(case.model).rounds > 0
    both(case)
    assert len(trials) == 2


def test_what_patch_itself_does_is_not_tried_again(make_case, monkeypatch):
    """4-bit copies change the classes of layers; so may the user, who is noticed."""
    case = make_case("llama", 1)
    std_decode.patch(case.model, draft_weights="int4", **PATCH)
    tried, trial = [], std_decode.admission.changes.attention_layers
    monkeypatch.setattr(
        std_decode.admission.changes,
        "attention_layers",
        lambda *args: tried.append(1) or trial(*args),
    )
    case.generate()
    assert not tried and std_decode.last_stats(case.model).draft_weights == "int4"
    mlp = case.model.model.layers[0].mlp
    mlp.__class__ = type("Other", (type(mlp),), {"__module__": __name__})
    case.generate()
    assert tried


def test_a_hook_that_was_there_at_patch_is_tried(make_case):
    """One that only looks is no obstacle, one that goes by what is fed at once is."""
    case, seen = make_case("llama", 1), []
    case.model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    std_decode.patch(case.model, **PATCH)
    case.generate()
    assert std_decode.last_stats(case.model).rounds > 0 and len(seen) > 16
    std_decode.unpatch(case.model)
    steer(case)
    with pytest.raises(NotImplementedError, match="layers.1 of LlamaForCausalLM makes something"):
        std_decode.patch(case.model, **PATCH)


# --- adapters ---


def lora(**options):
    import peft

    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        target_modules=["q_proj", "v_proj"],
        **options,
    )


def adapt(case, evaluated=True, **options):
    import peft

    torch.manual_seed(0)
    case.model = peft.get_peft_model(case.model, lora(**options))
    return case.model.eval() if evaluated else case.model


def test_rows_with_adapters_of_their_own(make_case):
    """PEFT tells the layers by hooks that it puts on for each call."""

    def adapt_twice(case):
        adapt(case).add_adapter("other", lora())
        case.model.eval()

    stats = assert_unpatched_tokens(
        lambda: make_case("llama", 1, 2), adapt_twice, adapter_names=["__base__", "other"]
    )
    assert stats.fallback is None and stats.rounds > 0


def test_an_activated_adapter(make_case):
    """It begins so many tokens from the end of what is fed: here the last two of the prompt."""

    def activate(case):
        adapt(case, alora_invocation_tokens=case.inputs["input_ids"][0, -2:].tolist())

    stats = assert_unpatched_tokens(lambda: make_case("llama", 0), activate)
    assert "a hook was put on" in stats.fallback


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_an_adapter_that_is_still_in_training_mode(make_case, dropout, first):
    """As PEFT leaves it in a model that is not."""

    def make():
        case = make_case("llama", 1)
        if first == "adapter":
            adapt(case, evaluated=False, lora_dropout=dropout)
        return case

    def change(case):
        if first == "patch":
            adapt(case, evaluated=False, lora_dropout=dropout)

    stats = assert_unpatched_tokens(make, change)
    if dropout:
        assert "lora_dropout.default is in training mode; call model.eval()" in stats.fallback
    else:
        assert stats.fallback is None and stats.rounds > 0


def dropping(case):
    for layer in case.model.model.layers:
        layer.self_attn.attention_dropout = 0.3


def test_a_model_is_patched_in_training_mode(make_case):
    """Between two epochs, say; and each of its parts is in the mode it was in."""
    case = make_case("llama", 1)
    dropping(case)
    expected = both(case)
    case.model.train()
    case.model.model.layers[0].eval()
    modes = [module.training for module in case.model.modules()]
    std_decode.patch(case.model, **PATCH)
    assert [module.training for module in case.model.modules()] == modes
    case.model.eval()
    for one, other in zip(expected, both(case)):
        assert torch.equal(one, other)
    assert std_decode.last_stats(case.model).rounds > 0


def test_layers_in_training_mode_in_a_model_that_is_not(make_case):
    def change(case):
        dropping(case)
        case.model.model.layers[1].train()

    stats = assert_unpatched_tokens(lambda: make_case("llama", 1), change)
    assert "layers.1 is in training mode" in stats.fallback


# --- settings ---


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_autocast(make_case, family):
    """Keys and values come in different dtypes then, which only plain attention puts up with."""

    def call(case):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return both(case)

    stats = assert_unpatched_tokens(lambda: make_case(family, 1), lambda case: None, call)
    assert "autocast is on" in stats.fallback


def test_patch_under_autocast(make_case):
    case = make_case("qwen3", 1)
    expected = both(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        std_decode.patch(case.model, **PATCH)
    for one, other in zip(expected, both(case)):
        assert torch.equal(one, other)
    assert std_decode.last_stats(case.model).rounds > 0


@pytest.mark.parametrize("seed", [4, 9])
def test_another_default_dtype(make_case, seed):
    """As people set to load a model in it; it is no affair of the random numbers."""

    def call(case):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return [case.generate(do_sample=True, temperature=3.0, max_new_tokens=60)]
        finally:
            torch.set_default_dtype(before)

    stats = assert_unpatched_tokens(lambda: make_case("llama", seed, 4), lambda case: None, call)
    assert stats.mode == "ragged" and stats.rounds > 0


def test_while_something_compiles(make_case, monkeypatch):
    def call(case):
        with monkeypatch.context() as patches:
            patches.setattr(torch.compiler, "is_compiling", lambda: True)
            return both(case)

    stats = assert_unpatched_tokens(lambda: make_case("llama", 1), lambda case: None, call)
    assert stats.fallback == "generate is being compiled"


@pytest.mark.slow
def test_generate_inside_a_compiled_function(make_case):
    def call(case):
        def ask():
            return case.generate(max_new_tokens=2)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dynamo has much to say of generate
            return [torch.compile(ask, backend="eager")()]

    stats = assert_unpatched_tokens(lambda: make_case("llama", 1), lambda case: None, call)
    assert stats.fallback == "generate is being compiled"

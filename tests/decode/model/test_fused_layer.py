"""Fused decoder layers: the same tokens, and a model that is whole while weights are slices."""

import copy
import io
import pickle

import pytest
import torch

import std_decode
from std_decode.model import fused_layer
from std_decode.model.fused_layer import FusedLayer, FusedNorm, Fusion

FUSED = dict(fused_layers=True, draft_length=4, top_k_keys=8)
FAMILIES = ["llama", "qwen2_vl", "qwen3_vl", "mistral", "llava_onevision"]


@pytest.fixture
def calls(monkeypatch):
    """Counts layers that ran fused, so that no test passes by not fusing."""
    seen = []
    plain = Fusion.__call__
    monkeypatch.setattr(Fusion, "__call__", lambda *a, **k: seen.append(a[0]) or plain(*a, **k))
    return seen


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_unpatched_models(make_case, calls, family, rows, do_sample):
    case = make_case(family, 0, rows, eos=rows > 1)
    expected = case.generate(do_sample=do_sample)
    with std_decode.patched(case.model, **FUSED):
        calls.clear()
        for _ in range(2):  # the second goes by captured passes, with --captured
            got = case.generate(do_sample=do_sample)
            stats = std_decode.last_stats(case.model)
    case.assert_same_tokens(expected, got, do_sample=do_sample)
    assert stats.fallback is None and stats.fused_layers_because is None
    assert stats.fused_layers == len(set(calls)) == 3 and stats.rounds > 1


def test_every_draft_is_accepted_when_every_key_is_selected(make_case):
    case = make_case("qwen3", 1, rows=2)
    expected = case.generate()
    with std_decode.patched(case.model, fused_layers=True, draft_length=4, top_k_keys=10_000):
        got = case.generate()
        stats = std_decode.last_stats(case.model)
    case.assert_same_tokens(expected, got)
    assert stats.accepted == stats.drafted == 24 and stats.fused_layers == 3


def test_a_norm_is_worked_out_by_the_layer_before(make_case, monkeypatch):
    """And by nobody else: with the first layer's there are 2 L + 1 in a pass."""
    case = make_case("llama")
    count = []
    plain = fused_layer.add_rms_norm
    monkeypatch.setattr(
        fused_layer, "add_rms_norm", lambda *a, **k: count.append(a[1] is None) or plain(*a, **k)
    )
    with std_decode.patched(case.model, fused_layers=True, draft_length=0, cuda_graphs=False):
        count.clear()
        case.generate(max_new_tokens=2)  # the prompt, and one dense step
        assert count == [True] + 6 * [False]


def test_a_state_that_was_changed_on_the_way_is_normed_anew(make_case, monkeypatch):
    """What the layer before has worked out is of another state then."""
    plain = Fusion.__call__

    def changed(self, running, states, **kwargs):
        states = states.roll(1, -1) if self.name == "layers.1" else states
        return plain(self, running, states, **kwargs)

    answers = []
    for always_anew in (True, False):
        case = make_case("llama", max_new_tokens=30)
        with std_decode.patched(case.model, **FUSED), monkeypatch.context() as patches:
            patches.setattr(Fusion, "__call__", changed)
            if always_anew:
                patches.setattr(fused_layer, "handed_on", lambda *_: None)
            answers.append(case.generate())
            assert std_decode.last_stats(case.model).fused_layers == 3
    assert torch.equal(*answers)
    assert not torch.equal(answers[0], make_case("llama", max_new_tokens=30).generate())


def parameters(model):
    return {name: x.detach().clone() for name, x in model.named_parameters()}


def slices(model):
    """How many of its weights lie in a larger tensor."""
    return sum(x.untyped_storage().nbytes() > x.nbytes for x in model.parameters())


def same(model, weights):
    return all(torch.equal(x, weights[name]) for name, x in model.named_parameters())


def test_weights_are_slices_until_unpatch(make_case, state_of):
    case = make_case("qwen2")  # with biases
    model, before = case.model, state_of(case.model)
    weights, objects = parameters(model), {n: id(x) for n, x in model.named_parameters()}
    kinds = [type(module) for module in model.modules()]
    std_decode.patch(model, **FUSED)
    assert slices(model) == 3 * (3 + 3 + 2) and same(model, weights)
    total = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in model.parameters()
    }
    assert sum(total.values()) == sum(x.nbytes for x in model.parameters())  # nothing twice
    std_decode.unpatch(model)
    assert slices(model) == 0 and same(model, weights) and state_of(model) == before
    assert {n: id(x) for n, x in model.named_parameters()} == objects
    assert [type(module) for module in model.modules()] == kinds
    assert not any("_std_decode_fusion" in vars(module) for module in model.modules())


def test_an_error_half_way_leaves_the_model_as_it_was(make_case, monkeypatch, state_of):
    case = make_case("llama")
    before, weights = state_of(case.model), parameters(case.model)
    plain, packed = torch.cat, []

    def fail(tensors, *args, **kwargs):
        if all(isinstance(x, torch.Tensor) and x.dim() == 2 for x in tensors):
            packed.append(1)
            if len(packed) == 4:
                raise KeyboardInterrupt
        return plain(tensors, *args, **kwargs)

    with monkeypatch.context() as patches:
        patches.setattr("std_decode.model.packed.torch.cat", fail)
        patches.setattr("std_decode.admission.fusing._differing", lambda *_: {})
        with pytest.raises(KeyboardInterrupt):
            std_decode.patch(case.model, **FUSED)
    assert len(packed) == 4
    assert slices(case.model) == 0 and same(case.model, weights)
    assert state_of(case.model) == before
    assert not any(isinstance(x, (FusedLayer, FusedNorm)) for x in case.model.modules())


def test_without_memory_a_layer_stays_as_it_is(make_case, monkeypatch):
    case = make_case("llama")
    expected = case.generate()

    def fail(self):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr("std_decode.model.packed.Joint.pack", fail)
    with std_decode.patched(case.model, **FUSED):
        assert torch.equal(expected, case.generate())
        stats = std_decode.last_stats(case.model)
    assert stats.fused_layers == 0 and "3 x no memory" in stats.fused_layers_because


def test_state_dicts_and_files_while_patched(make_case, tmp_path):
    case = make_case("qwen2")
    weights = parameters(case.model)
    plain = copy.deepcopy(case.model)
    with std_decode.patched(case.model, **FUSED):
        state = case.model.state_dict()
        assert state.keys() == plain.state_dict().keys()
        case.model.save_pretrained(tmp_path)
        torch.save(state, tmp_path / "state.pt")
    again = type(case.model).from_pretrained(tmp_path, dtype=torch.float32)
    assert same(again, weights)
    plain.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert same(plain, weights)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, saved])
def test_copies_of_a_patched_model_are_fused_by_themselves(make_case, calls, way):
    case = make_case("qwen2")
    expected = case.generate()
    std_decode.patch(case.model, **FUSED)
    model = case.model
    copied = way(model)
    own = {x.untyped_storage().data_ptr() for x in copied.parameters()}
    assert not own & {x.untyped_storage().data_ptr() for x in model.parameters()}
    case.model = copied
    calls.clear()
    assert torch.equal(case.generate(), expected)
    assert std_decode.last_stats(copied).fused_layers == 3 and calls
    std_decode.unpatch(copied)
    assert slices(copied) == 0
    case.model = std_decode.unpatch(model)
    assert torch.equal(case.generate(), expected)


def test_a_pickle_gives_the_same_tokens(make_case):
    """Pickle itself stores a slice's whole tensor with each slice, which is left alone then."""
    case = make_case("qwen2")
    expected = case.generate()
    with std_decode.patched(case.model, **FUSED):
        case.model, original = pickle.loads(pickle.dumps(case.model)), case.model
        assert torch.equal(case.generate(), expected)
        stats = std_decode.last_stats(case.model)
        case.model = original
    assert stats.fallback is None and "part of a larger" in stats.fused_layers_because


def load(model, other):
    model.load_state_dict(other.state_dict())


def in_place(model, other):
    with torch.no_grad():
        for own, new in zip(model.parameters(), other.parameters()):
            own.copy_(new)


def assign(model, other):
    model.load_state_dict(copy.deepcopy(other).state_dict(), assign=True)


def replace_a_module(model, other):
    attention = model.model.layers[1].self_attn
    attention.k_proj = copy.deepcopy(other.model.layers[1].self_attn.k_proj)
    load(model, other)


def there_and_back(model, other):
    load(model, other)
    model.double().float()


@pytest.mark.parametrize("change", [load, in_place, assign, replace_a_module, there_and_back])
def test_weights_that_change_are_followed(make_case, calls, change):
    case, other = make_case("qwen2", 0), make_case("qwen2", 1)
    case_of_other = copy.deepcopy(other.model)
    with std_decode.patched(case.model, **FUSED):
        before = case.generate()
        change(case.model, other.model)
        calls.clear()
        got = case.generate()
        stats = std_decode.last_stats(case.model)
        assert stats.fallback is None and stats.fused_layers == 3
        assert calls or stats.graph_replays  # a replay calls no layer
        assert slices(case.model) == 3 * (3 + 3 + 2)
    case.model = case_of_other
    expected = case.generate()
    assert not torch.equal(before, expected)
    case.assert_same_tokens(expected, got)


def test_a_hook_on_a_part_turns_fusing_off_for_the_call(make_case, calls):
    case = make_case("llama")
    expected = case.generate()
    with std_decode.patched(case.model, **FUSED):
        part = case.model.model.layers[1].mlp.up_proj
        seen = []
        hook = part.register_forward_hook(lambda *_: seen.append(1))
        hook_of = case.model._std_decode.tried.hooks
        hook_of.add(hook.id)  # as one that was there at patch, or that does no harm
        calls.clear()
        assert torch.equal(case.generate(), expected)
        stats = std_decode.last_stats(case.model)
        assert stats.fallback is None and stats.fused_layers == 2 and len(set(calls)) == 2
        assert "1 x a hook" in stats.fused_layers_because and len(seen) > 5
        hook.remove()
        assert torch.equal(case.generate(), expected)
        assert std_decode.last_stats(case.model).fused_layers == 3


def test_hidden_states_and_other_calls_are_the_layers_own(make_case, calls):
    case = make_case("llama")
    plain = case.generate(return_dict_in_generate=True, output_hidden_states=True)
    logits = case.model(**case.inputs).logits
    with std_decode.patched(case.model, **FUSED):
        calls.clear()
        got = case.generate(return_dict_in_generate=True, output_hidden_states=True)
        assert std_decode.last_stats(case.model).fallback is not None
        assert torch.equal(case.model(**case.inputs).logits, logits)
        assert not calls
    assert torch.equal(got.sequences, plain.sequences)
    assert len(got.hidden_states) == len(plain.hidden_states)


@pytest.mark.parametrize("wanted, because", [
    (False, "fused_layers is False"),
    ("auto", "the model is on the CPU"),
])  # fmt: skip
def test_not_wanted(make_case, calls, wanted, because):
    case = make_case("llama")
    with std_decode.patched(case.model, **{**FUSED, "fused_layers": wanted}):
        case.generate()
        stats = std_decode.last_stats(case.model)
        assert slices(case.model) == 0
    assert stats.fused_layers == 0 and because in stats.fused_layers_because and not calls


def test_a_promise_of_the_unpatched_models_bits_is_kept_unfused(make_case, calls):
    case = make_case("llama")
    case.model.bfloat16()
    expected = case.generate()
    with std_decode.patched(case.model, **FUSED, reproducible="unpatched"):
        calls.clear()
        assert torch.equal(case.generate(), expected)
        stats = std_decode.last_stats(case.model)
    assert stats.promise == "unpatched" and stats.fused_layers == 0 and not calls
    assert "promise" in stats.fused_layers_because


def test_a_reproducible_call_is_fused_and_its_promise_tried_so(make_case, calls):
    case = make_case("llama")
    case.model.bfloat16()
    answers = []
    for length in (0, 3):
        options = {**FUSED, "draft_length": length, "reproducible": True}
        calls.clear()
        with std_decode.patched(case.model, **options):
            tried = len(calls)
            answers.append(case.generate())
            stats = std_decode.last_stats(case.model)
        assert stats.promise == "reproducible" and stats.fused_layers == 3 and tried > 20
    assert torch.equal(*answers)


@pytest.mark.parametrize("option", ["yes", 1, None])
def test_a_wrong_option_is_named(make_case, option):
    with pytest.raises(TypeError, match="^patch: fused_layers is .*, expected .*True or False"):
        std_decode.patch(make_case("llama").model, fused_layers=option)


def test_twins_are_read_in_drafts(make_case, calls):
    case = make_case("llama", 0, max_new_tokens=12)
    expected = case.generate()
    with std_decode.patched(case.model, **FUSED, draft_weights="int4"):
        assert torch.equal(case.generate(), expected)
        stats = std_decode.last_stats(case.model)
        made = [twin.packed for twin in case.model._std_decode.draft_weights.twins.twins]
        assert torch.equal(case.generate(), expected)
        again = [twin.packed for twin in case.model._std_decode.draft_weights.twins.twins]
    assert stats.draft_weights == "int4" and stats.fused_layers == 3 and calls
    assert stats.twinned_layers > 0
    assert all(one is other for one, other in zip(made, again)), "made anew"

"""patch(draft_weights=...): what it makes of a model, what it leaves alone, and what it says."""

import copy
import gc
import pickle
import re
import threading
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn

import std_decode
from bench.models.build import model_class_and_config
from bench.models.dimensions import SHAPES
from std_decode.passes import engine, graphs
from std_decode.weights import draft_weights, quantize, room, twin_cache
from std_decode.weights.twins import TwinnedLinear, Twins
from tests.decode.recorder import Recording

PATCH = dict(draft_weights="int4", draft_length=4, top_k_keys=10_000)


@pytest.fixture(autouse=True)
def whole(make_case, monkeypatch):
    """Every layer of these models can have a twin."""
    monkeypatch.setitem(make_case.text, "vocab_size", 128)


def twinned(model):
    return {name for name, x in model.named_modules() if isinstance(x, TwinnedLinear)}


def traces(model):
    return [(name, type(x), sorted(vars(x))) for name, x in model.named_modules()]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            dict(draft_weights="int8"),
            ValueError,
            "draft_weights is 'int8', expected None, \"int4\"",
        ),
        (dict(draft_weights=4), ValueError, "draft_weights is 4, expected"),
        (dict(draft_weights=["int4"]), ValueError, "draft_weights is ..int4.., expected"),
        (dict(draft_weights="int4", draft_weights_cache=7), TypeError, "cache is 7, expected a p"),
        (dict(draft_weights_cache="twins"), ValueError, "expected None without draft_weights"),
        (
            dict(draft_weights="int4", draft_weights_cache="/nowhere/twins"),
            ValueError,
            "'/nowhere/twins', expected a file in an existing folder",
        ),
    ],
    ids=str,
)
def test_bad_options_name_what_was_expected(make_case, options, error, words):
    case = make_case("llama")
    before = traces(case.model)
    with pytest.raises(error, match=words):
        std_decode.patch(case.model, **options)
    assert traces(case.model) == before and not std_decode.is_patched(case.model)


def test_twins_are_of_the_text_decoder_and_the_head_and_leave_no_trace(make_case, tmp_path):
    case = make_case("qwen2_vl")
    before, state = traces(case.model), case.model.state_dict()
    std_decode.patch(case.model, **PATCH)
    found = twinned(case.model)
    assert len(found) == 3 * 7 + 1 and "lm_head" in found
    assert all("language_model" in name or name == "lm_head" for name in found)
    case.generate()
    assert case.model.state_dict().keys() == state.keys()
    case.model.save_pretrained(tmp_path)
    packed = weakref.ref(case.model.lm_head._std_decode_twin.packed)
    std_decode.unpatch(case.model)
    assert packed() is None  # at once
    assert traces(case.model) == before
    loaded = type(case.model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), loaded.state_dict().values()))


def test_stats_name_the_weights_and_their_bytes(make_case):
    case = make_case("llama")
    with std_decode.patched(case.model, **PATCH):
        case.generate()
        stats = std_decode.last_stats(case.model)
        made = [x._std_decode_twin for x in case.model.modules() if isinstance(x, TwinnedLinear)]
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
    # Of 64 columns one group a row, of 96 three.
    expected = sum(n * k // 2 + 4 * n * {64: 1, 96: 3}[k] for n, k in [*shapes * 3, (128, 64)])
    assert stats.draft_weight_bytes == expected and len(made) == stats.twinned_layers == 22
    assert stats.draft_weights_because is None and "int4, 0.1 MiB, 22 layers" in str(stats)
    with std_decode.patched(case.model, draft_length=4):
        case.generate()
        stats = std_decode.last_stats(case.model)
    assert stats.draft_weights is None and "the model's own" in str(stats)


def test_layers_that_the_kernel_refuses_keep_their_weights(make_case, monkeypatch):
    monkeypatch.setitem(make_case.text, "vocab_size", 120)
    monkeypatch.setitem(make_case.text, "intermediate_size", 72)
    case = make_case("llama")
    case.model.model.layers[0].self_attn.q_proj.forward = lambda x: 0 * x
    case.model.model.layers[0].self_attn.k_proj.double()
    case.model.model.layers[0].self_attn.v_proj.to("meta")
    found = Twins(case.model, compiles=True)
    assert {twin.name for twin in found.twins} == {
        f"model.layers.{i}.self_attn.{x}_proj" for i in range(3) for x in "qkvo"[3 * (not i) :]
    }
    words = found.why_kept()
    assert "1 x a replaced forward, which compile" in words and "1 x a weight of float64" in words
    assert "1 x weights are offloaded" in words
    assert "6 x [72, 64], where the kernel takes multiples of [16, 32]" in words
    assert "1 x [120, 64]" in words and "3 x [64, 72]" in words


def test_a_replaced_forward_reads_the_twin_too(make_case, monkeypatch):
    """As under tensor parallelism: what it does around the product stays, captured or not."""
    case, calls = make_case("llama", 1), []
    for layer in case.model.modules():
        if type(layer) is nn.Linear:
            layer.forward = lambda x, inner=layer.forward: calls.append(1) or inner(x) + 0.0
    expected, before = case.generate(), traces(case.model)
    recording = Recording()
    monkeypatch.setattr(graphs, "unavailable", lambda devices: None)
    monkeypatch.setattr(graphs, "capture", recording)
    for captured in (False, True):
        with std_decode.patched(case.model, cuda_graphs=captured, **PATCH):
            assert not twinned(case.model)
            for _ in range(3):
                case.assert_same_tokens(expected, case.generate())
            stats = std_decode.last_stats(case.model)
            assert (stats.twinned_layers, stats.kept_layers) == (22, 0)
            assert 0 < stats.acceptance_rate < 1 and (stats.graph_replays > 0) == captured
            for twin in case.model._std_decode.draft_weights.twins.twins:
                twin.scales.fill_(float("nan"))
            case.assert_same_tokens(expected, case.generate())
            assert std_decode.last_stats(case.model).accepted <= 1
        assert traces(case.model) == before


def test_quantised_models_draft_with_what_they_have(make_case):
    class Quantised(nn.Linear):
        pass

    case = make_case("llama")
    for layer in case.model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Quantised
    expected, before = case.generate(), traces(case.model)
    with pytest.warns(UserWarning, match="22 x a Quantised, which is no plain nn.Linear"):
        std_decode.patch(case.model, **PATCH)
    assert traces(case.model)[1:] == before[1:]
    case.assert_same_tokens(expected, case.generate())
    stats = std_decode.last_stats(case.model)
    assert stats.draft_weights is None and stats.kept_layers == 22
    assert "22 x a Quantised" in stats.draft_weights_because
    std_decode.unpatch(case.model)


def test_a_tied_embedding_is_left_alone(make_case, monkeypatch):
    monkeypatch.setitem(make_case.text, "tie_word_embeddings", True)
    case = make_case("llama")
    assert case.model.lm_head.weight is case.model.model.embed_tokens.weight
    expected, before = case.generate(), case.model.lm_head.weight.clone()
    with std_decode.patched(case.model, **PATCH):
        assert "lm_head" in twinned(case.model)
        case.assert_same_tokens(expected, case.generate())
        assert case.model.lm_head.weight is case.model.model.embed_tokens.weight
    assert torch.equal(case.model.lm_head.weight, before)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_has_twins_of_its_own(make_case, how):
    case = make_case("qwen2_vl", 1)
    expected, original = case.generate(), case.model
    std_decode.patch(original, **PATCH)
    case.generate()
    accepted = std_decode.last_stats(original).accepted
    copied = COPIES[how](original)
    std_decode.unpatch(original)
    assert all(twin.packed is None for twin in copied._std_decode.draft_weights.twins.twins)
    case.model = copied
    for _ in range(2):
        assert torch.equal(case.generate(), expected)
        stats = std_decode.last_stats(copied)
        assert stats.draft_weights == "int4" and stats.accepted == accepted
        assert stats.draft_weight_bytes > 0
    std_decode.unpatch(copied)
    assert not twinned(copied)


def test_two_models_in_two_threads(make_case):
    """One drafts with twins, the other with its weights; they share their decoder."""
    first, second = make_case("llama", 3, max_new_tokens=40), make_case("llama", 3)
    second.options = first.options
    second.model.model = first.model.model
    expected = first.generate(), second.generate()
    std_decode.patch(first.model, **PATCH)
    second_options = {**PATCH, "draft_weights": None, "draft_length": 3}
    std_decode.patch(second.model, **second_options)
    got, rates = {}, {}

    def run(case, name):
        got[name] = [
            case.model.generate(**case.inputs, max_new_tokens=40, do_sample=False)
            for _ in range(4)
        ]
        rates[name] = std_decode.last_stats(case.model).acceptance_rate

    threads = [
        threading.Thread(target=run, args=(case, name))
        for name, case in enumerate((first, second))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for case in (first, second):
        std_decode.unpatch(case.model)
    for name, case in enumerate((first, second)):
        for tokens in got[name]:
            case.assert_same_tokens(expected[name], tokens)
    assert rates[1] == 1.0 > rates[0]  # every key, so its own weights are always right


@pytest.mark.parametrize("leaves_first", [0, 1])
def test_two_models_do_not_draft_with_each_others_twins(make_case, leaves_first):
    cases = make_case("llama", 3), make_case("llama", 3)
    cases[1].model.model = cases[0].model.model
    expected = [case.generate() for case in cases]
    for case in cases:
        std_decode.patch(case.model, **PATCH)
    for layer in cases[0].model.model.modules():
        if isinstance(layer, TwinnedLinear):
            layer._std_decode_twin.scales.fill_(float("nan"))
    for case, tokens, accepts in zip(cases, expected, (False, True)):
        case.assert_same_tokens(tokens, case.generate())
        assert (std_decode.last_stats(case.model).accepted > 2) == accepts
    assert "21 x a layer shared" in std_decode.last_stats(cases[1].model).draft_weights_because
    for which in (leaves_first, 1 - leaves_first):
        std_decode.unpatch(cases[which].model)
    assert not twinned(cases[0].model) and not twinned(cases[1].model)
    assert all("_std_decode_twin" not in vars(x) for x in cases[0].model.modules())


# Adapters and changed weights


def with_lora(model, **options):
    torch.manual_seed(0)
    names = ["q_proj", "v_proj"]
    lora = LoraConfig(
        r=32, lora_alpha=512, target_modules=names, init_lora_weights=False, **options
    )
    return get_peft_model(model, lora).eval()


def errors(model):
    """How far each twin is from its layer's weights, over their size."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, TwinnedLinear):
            twin, weight = layer._std_decode_twin, layer.weight.detach()
            eye = torch.eye(layer.in_features)
            rounded = quantize.linear(eye, twin.packed, twin.scales, None).T
            found[name] = float((rounded - weight).norm() / weight.norm())
    return found


def test_adapters_stay_beside_the_twin(make_case):
    case = make_case("qwen2_vl", 1)
    case.model = with_lora(case.model)
    expected = case.generate()
    with std_decode.patched(case.model, **PATCH):
        found = twinned(case.model)
        assert len(found) == 22 and not any("lora" in name for name in found)
        assert sum(name.endswith("base_layer") for name in found) == 6
        case.assert_same_tokens(expected, case.generate())
        accepted = std_decode.last_stats(case.model).accepted
        assert accepted > 3  # as if the adapter were not there, none would be


@pytest.mark.parametrize("change", ["merge", "unmerge", "in place", "moved", "elsewhere"])
def test_twins_follow_the_weights(make_case, change):
    case = make_case("llama", 2)
    case.model = with_lora(case.model)
    tuner, layer = case.model.base_model, case.model.base_model.model.model.layers[1].mlp.up_proj
    if change == "unmerge":
        tuner.merge_adapter()
    std_decode.patch(case.model, **PATCH)
    case.generate()
    assert max(errors(case.model).values()) < 0.15
    with torch.no_grad():
        if change == "merge":
            tuner.merge_adapter()
        elif change == "unmerge":
            tuner.unmerge_adapter()
        elif change == "in place":
            layer.weight.mul_(-1)
        elif change == "moved":
            layer.weight.data = -layer.weight.data
        else:
            layer.weight = nn.Parameter(-layer.weight)
    assert max(errors(case.model).values()) > 0.3
    got = case.generate()
    assert max(errors(case.model).values()) < 0.15
    assert std_decode.last_stats(case.model).draft_weights == "int4"
    std_decode.unpatch(case.model)
    case.assert_same_tokens(case.generate(), got)


def test_only_what_changed_is_made_again(make_case, monkeypatch):
    case, made = make_case("llama", 2), []
    plain = quantize.quantize
    monkeypatch.setattr(quantize, "quantize", lambda *given: made.append(1) or plain(*given))
    with std_decode.patched(case.model, **PATCH):
        assert len(made) == 22
        case.generate()
        case.generate()
        assert len(made) == 22
        with torch.no_grad():
            case.model.lm_head.weight.mul_(2)
        case.generate()
        assert len(made) == 23


def test_weights_that_were_quantised_after_patch_lose_their_twin(make_case):
    case = make_case("llama", 2)
    case.model.lm_head.register_forward_pre_hook(
        lambda head, args: (args[0].to(head.weight.dtype),)
    )
    with std_decode.patched(case.model, **PATCH):
        case.model.lm_head.weight = nn.Parameter(case.model.lm_head.weight.double())
        case.generate()
        stats = std_decode.last_stats(case.model)
    assert (stats.twinned_layers, stats.kept_layers) == (21, 1)
    assert "1 x a weight of float64" in stats.draft_weights_because


def test_a_model_in_inference_mode(make_case):
    with torch.inference_mode():
        case = make_case("llama", 2)
        expected = case.generate()
        std_decode.patch(case.model, **PATCH)
        case.assert_same_tokens(expected, case.generate())
    case.assert_same_tokens(expected, case.generate())
    with torch.inference_mode():
        case.model.lm_head.weight = nn.Parameter(-case.model.lm_head.weight)
    got = case.generate()  # twins are written to outside of the mode
    assert max(errors(case.model).values()) < 0.15
    std_decode.unpatch(case.model)
    case.assert_same_tokens(case.generate(), got)


# Memory


@pytest.mark.parametrize("wanted", ["int4", "auto"])
def test_too_little_memory(make_case, monkeypatch, wanted):
    monkeypatch.setattr(draft_weights, "CACHED", 0)
    monkeypatch.setattr(room, "free_memory", lambda device: 60_000)
    monkeypatch.setattr(draft_weights, "free_memory", lambda device: 60_000)
    case = make_case("llama")
    before = traces(case.model)
    if wanted == "int4":
        words = (
            r"4-bit weights of 22 layers take 0.00 GB, and 0.00 GB more while they are made, "
            r"expected at most the 0.00 GB free on cpu; free memory or use draft_weights=None"
        )
        with pytest.raises(MemoryError, match=words):
            std_decode.patch(case.model, draft_weights="int4")
        assert traces(case.model) == before and not std_decode.is_patched(case.model)
        return
    with std_decode.patched(case.model, draft_weights="auto"):
        assert traces(case.model)[1:] == before[1:]
        case.generate()
        stats = std_decode.last_stats(case.model)
    assert stats.draft_weights is None
    assert "more than 50% of the 0.00 GB free on cpu" in stats.draft_weights_because


def test_memory_that_is_gone_when_weights_have_moved(make_case, monkeypatch):
    case = make_case("llama", 2)
    expected = case.generate()
    with std_decode.patched(case.model, **PATCH):
        case.model = copy.deepcopy(case.model)
        monkeypatch.setattr(room, "free_memory", lambda device: 1000)
        assert torch.equal(case.generate(), expected)
        stats = std_decode.last_stats(case.model)
        assert stats.draft_weights is None and stats.draft_weight_bytes == 0
        assert "free on cpu" in stats.draft_weights_because
        monkeypatch.undo()
        assert torch.equal(case.generate(), expected)
        assert std_decode.last_stats(case.model).draft_weights == "int4"
        original = case.model
    std_decode.unpatch(original)


def test_a_captured_draft_does_not_outlive_its_twins(make_case, recording, monkeypatch):
    """It would read memory that is no longer theirs."""
    case = make_case("llama", 2)
    expected = case.generate()
    with std_decode.patched(case.model, **PATCH):
        for _ in range(2):
            assert torch.equal(case.generate(), expected)
        for twin in case.model._std_decode.draft_weights.twins.twins:
            twin.drop()
        monkeypatch.setattr(room, "free_memory", lambda device: 1000)
        assert torch.equal(case.generate(), expected)
        stats = std_decode.last_stats(case.model)
    assert stats.draft_weights is None and stats.graph_captures > 0


def test_copies_take_what_the_roofline_counts(monkeypatch):
    """At a real model's dimensions, to the byte: weights read by a draft, and memory for twins."""
    monkeypatch.setattr(quantize, "no_kernel", lambda device: None)
    for name in ("qwen2-vl-7b", "qwen3-vl-8b", "llama-3-8b"):
        shape = SHAPES[name]
        cls, config = model_class_and_config(shape)
        with torch.device("meta"):
            model = cls._from_config(config, dtype=torch.bfloat16)
        found = Twins(model)
        workload = draft_weights.workload_of(model, 1024, found)
        assert not found.kept
        assert found.planned_bytes == shape.stored_bytes(True) - shape.stored_bytes(False)
        assert workload.weight_bytes == shape.weight_bytes(1)
        assert workload.draft_weight_bytes == shape.weight_bytes(1, True)
        assert workload.kv_bytes == 2 * shape.kv_values


def test_a_step_reads_the_experts_that_the_roofline_counts():
    shape = SHAPES["qwen3-vl-30b-a3b"]
    cls, config = model_class_and_config(shape)
    with torch.device("meta"):
        model = cls._from_config(config, dtype=torch.bfloat16)
    workload = draft_weights.workload_of(model, 1024)
    for tokens in (1, 5, 64, 1000):
        expected = pytest.approx(shape.weight_bytes(tokens), rel=1e-12)
        assert workload.read(workload.weight_bytes, tokens) == expected
    assert workload.parameters == shape.active


@pytest.mark.parametrize("family", ["gpt_oss", "aria", "ernie4_5_vl", "glm4v_moe", "qwen3_omni"])
def test_each_family_s_experts_are_found(make_case, family):
    experts, share = draft_weights.experts_of(make_case(family).model)
    assert len(experts) >= 4 and share == 0.5  # two of four; two weights a layer


def test_a_model_without_experts_reads_all(make_case):
    assert draft_weights.experts_of(make_case("llama").model) == ([], 1.0)


def test_layers_with_a_window_keep_what_is_in_it(make_case):
    """A draft reads all of that, too; of the others' keys it reads a few."""
    model = make_case("gemma3").model
    config = model.get_decoder().config
    full = config.layer_types.count("full_attention")
    token = 2 * config.num_key_value_heads * config.head_dim * 4
    workload = draft_weights.workload_of(model, 8)
    assert 0 < full < config.num_hidden_layers
    assert workload.kv_bytes == full * token
    windowed = config.num_hidden_layers - full
    assert workload.window_bytes == windowed * token * config.sliding_window


# "auto"


def test_auto_says_no_to_a_model_that_fits_a_cache(make_case):
    case = make_case("llama")
    with std_decode.patched(case.model, draft_weights="auto"):
        case.generate()
        stats = std_decode.last_stats(case.model)
    assert stats.draft_weights is None and stats.twinned_layers == 0
    assert "0.4 MiB of weights are read from a cache" in stats.draft_weights_because
    assert "the model's own: auto: 0.4 MiB" in str(stats)


def test_auto_goes_by_the_bytes_of_a_step(make_case, monkeypatch):
    monkeypatch.setattr(draft_weights, "CACHED", 0)
    case = make_case("llama", rows=3)
    with std_decode.patched(case.model, draft_weights="auto", top_k_keys=8, draft_length=4):
        case.generate()
        stats = std_decode.last_stats(case.model)
        assert stats.draft_weights == "int4"
        assert "x with 4-bit drafts" in stats.draft_weights_because
        monkeypatch.setitem(draft_weights.MOST_ROWS, "cpu", 2)
    with std_decode.patched(case.model, draft_weights="auto", top_k_keys=8, draft_length=4):
        case.generate()
        stats = std_decode.last_stats(case.model)
        assert stats.draft_weights is None
        assert stats.draft_weights_because.startswith("not for a batch of 3: 4 bits gain nothing")
    monkeypatch.setattr(draft_weights, "LEAST_GAIN", 100.0)
    with std_decode.patched(case.model, draft_weights="auto"):
        case.generate()
        stats = std_decode.last_stats(case.model)
        assert stats.draft_weights is None and not twinned(case.model)


def test_auto_does_not_stay_with_the_acceptance_it_supposed(make_case, monkeypatch):
    """From the first rounds on it says what these drafts came to, one after another."""
    monkeypatch.setattr(draft_weights, "CACHED", 0)
    case = make_case("llama", max_new_tokens=40)
    told = []
    for length in (4, "auto"):
        with std_decode.patched(
            case.model, draft_weights="auto", top_k_keys=1, draft_length=length, reselect=False
        ):
            policy = case.model._std_decode.policy
            for _ in range(4):
                case.generate()
            told.append(std_decode.last_stats(case.model).draft_weights_because)
            agreed, predicted = policy.agreed, case.model._std_decode.draft_weights.predicted
    four = told[0]
    assert "if 80% of the drafts agree)" in four
    share = re.search(
        r"measured: (\d+)% of ([\d,]+) drafts agree, at which (.*)x is predicted", four
    )
    assert share is not None and int(share[1]) < 85 and int(share[2]) >= 32
    workload, device = predicted.args
    assert float(share[3]) == pytest.approx(
        draft_weights.best_speedup(workload, device, int(share[1]) / 100), abs=0.05
    )
    assert ("measured" in told[1]) == (agreed.tried >= draft_weights.ENOUGH)


def test_auto_predicts_what_the_roofline_does(monkeypatch):
    from bench.roofline.devices import GPUS
    from bench.roofline.predictions import Cell

    monkeypatch.setattr(quantize, "no_kernel", lambda device: None)
    shape = SHAPES["qwen2-vl-7b"]
    cls, config = model_class_and_config(shape)
    with torch.device("meta"):
        model = cls._from_config(config, dtype=torch.bfloat16)
    monkeypatch.setattr(draft_weights, "free_memory", lambda device: 20e9)
    gains, because = draft_weights.decide(model, Twins(model), 1024)
    cell = Cell(shape, GPUS["h200"].device, 1, 1, 25_000, 1024)
    own, four_bit = (cell.drafting(kind, 0.8).speedup for kind in (False, True))
    assert gains
    assert f"predicted {four_bit:.2f}x with 4-bit drafts, {own:.2f}x with the mod" in because
    monkeypatch.setattr(draft_weights, "free_memory", lambda device: 6e9)
    gains, because = draft_weights.decide(model, Twins(model), 1024)
    assert not gains and "take 3.76 GB, more than 50% of the 6.00 GB free" in because


@pytest.fixture
def qwen_on(monkeypatch):
    """`decide` of Qwen2-VL-7B as if a GPU held it: `qwen_on(gpu)`."""
    monkeypatch.setattr(quantize, "no_kernel", lambda device: None)
    monkeypatch.setattr(draft_weights, "free_memory", lambda device: 20e9)
    cls, config = model_class_and_config(SHAPES["qwen2-vl-7b"])
    with torch.device("meta"):
        model = cls._from_config(config, dtype=torch.bfloat16)

    def decide(gpu):
        monkeypatch.setattr(draft_weights, "held_by", lambda twins: gpu)
        return draft_weights.decide(model, Twins(model), 1024)

    return decide


def test_auto_goes_by_what_is_expected_of_a_gpu(qwen_on):
    from bench.roofline import expected
    from bench.roofline.devices import GPUS
    from bench.roofline.predictions import Cell

    h200 = GPUS["h200"].device
    cell = Cell(SHAPES["qwen2-vl-7b"], h200, 1, 1, 25_000, 1024)
    own, four_bit = (
        max(expected.drafting(cell, kind, 0.8, n).speedup for n in range(1, 17))
        for kind in (False, True)
    )
    gains, because = qwen_on(h200)
    assert gains and 1.2 < four_bit < cell.drafting(True, 0.8).speedup
    assert f"predicted {four_bit:.2f}x with 4-bit drafts, {own:.2f}x with the mod" in because
    # So slow at unpacking that 4-bit weights take longer than whole ones: bytes would not tell.
    gains, because = qwen_on(replace(h200, cycles=h200.cycles / 4))
    assert not gains and "predicted 0." in because


def test_a_gpu_is_what_its_driver_says(monkeypatch):
    from std_decode.costs import hardware

    h200 = dict(memory_clock_rate=3_201_000, memory_bus_width=6144, clock_rate=1_980_000)
    told = SimpleNamespace(multi_processor_count=132, **h200)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)
    found = hardware.gpu(torch.device("cuda"))
    assert found.bandwidth == pytest.approx(4.9e12, rel=0.01)
    assert found.cycles == pytest.approx(132 * 1.98e9)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert hardware.gpu(torch.device("cuda")) == hardware.H100
    monkeypatch.undo()
    told = SimpleNamespace(multi_processor_count=132)  # as older releases of PyTorch have it
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)
    assert hardware.gpu(torch.device("cuda")) == hardware.H100


def test_only_a_gpu_is_asked_of(make_case):
    twins = Twins(make_case("llama").model)
    assert draft_weights.held_by(twins) is None


# Captured and compiled passes


@pytest.mark.parametrize("rows", [1, 3])
def test_captured_drafts_have_the_twins_in_them(make_case, monkeypatch, rows):
    """And captured verifications the weights, so that nothing is left to switch."""
    recording = Recording()
    monkeypatch.setattr(graphs, "unavailable", lambda devices: None)
    monkeypatch.setattr(graphs, "capture", recording)
    case = make_case("qwen2_vl", 1, rows)
    expected = case.generate()
    with std_decode.patched(case.model, **PATCH):
        for _ in range(3):
            case.assert_same_tokens(expected, case.generate())
            stats = std_decode.last_stats(case.model)
        assert stats.graph_captures == 0 and stats.graph_replays > 2
        assert 0 < stats.accepted < stats.drafted
        twin = case.model.lm_head._std_decode_twin
        where = twin.packed.data_ptr(), twin.scales.data_ptr()
        with torch.no_grad():
            case.model.lm_head.weight.neg_()
        got = case.generate()
        stats = std_decode.last_stats(case.model)
        # Made again in its place, where the captured draft reads it.
        assert (twin.packed.data_ptr(), twin.scales.data_ptr()) == where
        assert stats.graph_captures == 0 and stats.accepted > 0
    case.assert_same_tokens(case.generate(), got)


@pytest.mark.parametrize("family", ["qwen2_vl", "llama"])
def test_compiled_passes_are_whole(make_case, uncaptured, monkeypatch, family):
    used = []

    def backend(graph, inputs):
        used.append(sum("int4_linear" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(
        engine,
        "compile_pass",
        lambda forward: torch.compile(forward, fullgraph=True, dynamic=False, backend=backend),
    )
    case = make_case(family, 1, max_new_tokens=24)
    expected = case.generate()
    with std_decode.patched(case.model, compile=True, **PATCH):
        for _ in range(2):
            case.assert_same_tokens(expected, case.generate())
    assert used == [22, 0]  # a draft, a verification


# The file


def test_a_cache_is_written_once_and_read_later(make_case, tmp_path, monkeypatch):
    file = tmp_path / "twins.safetensors"
    case = make_case("llama", 2)
    with std_decode.patched(case.model, draft_weights_cache=file, **PATCH):
        expected = case.generate()
        made = errors(case.model)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    plain = quantize.quantize
    monkeypatch.setattr(quantize, "quantize", None)
    with std_decode.patched(case.model, draft_weights_cache=str(file), **PATCH):
        assert errors(case.model) == made
        assert torch.equal(case.generate(), expected)
    monkeypatch.setattr(quantize, "quantize", plain)
    with torch.no_grad():
        case.model.lm_head.weight.mul_(-1)
    before = file.read_bytes()
    with std_decode.patched(case.model, draft_weights_cache=file, **PATCH):
        assert max(errors(case.model).values()) < 0.15
    assert file.read_bytes() != before


def test_a_file_of_an_older_format_is_replaced(make_case, tmp_path, monkeypatch):
    file, case = tmp_path / "twins", make_case("llama", 2)
    with std_decode.patched(case.model, draft_weights_cache=file, **PATCH):
        new = errors(case.model)
    with monkeypatch.context() as older:
        plain = quantize.quantize
        older.setattr(twin_cache, "FORMAT", twin_cache.OLDER[-1])
        older.setattr(quantize, "quantize", lambda weight, *_: plain(0 * weight))
        file.unlink()
        with std_decode.patched(case.model, draft_weights_cache=file, **PATCH):
            assert min(errors(case.model).values()) > 0.9
    with std_decode.patched(case.model, draft_weights_cache=file, **PATCH):
        assert errors(case.model) == new
    with safe_open(file, "pt") as found:
        assert found.metadata()["format"] == twin_cache.FORMAT


@pytest.mark.parametrize("content", ["words", "cut short", "a model"])
def test_a_file_that_is_no_cache_is_named_and_left_alone(make_case, tmp_path, content):
    from safetensors.torch import save_file

    file, case = tmp_path / "twins", make_case("llama", 2)
    if content == "words":
        file.write_text("not tensors")
    elif content == "a model":
        save_file({"lm_head.values": torch.ones(2)}, file)
    else:
        with std_decode.patched(case.model, draft_weights_cache=file, **PATCH):
            pass
        file.write_bytes(file.read_bytes()[:-1000])
    before, model = file.read_bytes(), traces(case.model)
    with pytest.raises(
        ValueError, match=f"draft_weights_cache is '{file}', no file of 4-bit weig"
    ):
        std_decode.patch(case.model, draft_weights_cache=file, **PATCH)
    assert file.read_bytes() == before and traces(case.model) == model


def test_what_is_interrupted_leaves_no_file(make_case, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("std_decode.weights.twin_cache.os.replace", fail)
    case = make_case("llama", 2)
    before = traces(case.model)
    with pytest.raises(OSError, match="disk full"):
        std_decode.patch(case.model, draft_weights_cache=tmp_path / "twins", **PATCH)
    assert not list(tmp_path.iterdir()) and traces(case.model) == before


def test_twins_are_gone_after_unpatch(make_case):
    case = make_case("llama", 2)
    with std_decode.patched(case.model, **PATCH):
        case.generate()
        found = [weakref.ref(x._std_decode_twin) for x in case.model.modules()
                 if isinstance(x, TwinnedLinear)]  # fmt: skip
    gc.collect()
    assert len(found) == 22 and not any(ref() for ref in found)

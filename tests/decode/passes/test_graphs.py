"""Captured passes: the same tokens, captured once, replayed often, released in the end."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import std_decode
from std_decode.model.cache import BufferLayer
from std_decode.passes import graphs
from tests.decode.observers import Watches

PATCH = dict(draft_length=4, top_k_keys=6)
FAMILIES = ("qwen2_vl", "llava_onevision", "llama", "gemma3")


@pytest.mark.parametrize(
    ("family", "rows", "mode"),
    [
        *((family, 1, "ragged") for family in FAMILIES),
        *((family, 3, "ragged") for family in FAMILIES),
        ("qwen2_vl", 3, "lockstep"),
        ("gemma3", 1, "lockstep"),
    ],
)
def test_replayed_passes_say_the_same(make_case, recording, family, rows, mode):
    """Operator by operator on the tensors of the capture, through several calls."""
    lockstep = dict(logits_processor=LogitsProcessorList([Watches()]))
    for seed, do_sample in ((0, False), (1, True)):
        case = make_case(family, seed, rows, eos=rows > 1, do_sample=do_sample)
        case.options.update(lockstep if mode == "lockstep" else {})
        expected = case.generate()
        for draft_length, top_k_keys in ((0, 1), (4, 4)):
            options = dict(draft_length=draft_length, top_k_keys=top_k_keys)
            with std_decode.patched(case.model, **options):
                for _ in range(3):
                    case.assert_same_tokens(expected, case.generate())
                    stats = std_decode.last_stats(case.model)
                    assert stats.mode == mode and stats.eager_because is None
            # However short the text, by now nothing runs but replays.
            passes = sum(stats.calls[stage] for stage in ("draft", "verify", "dense"))
            assert stats.graph_replays == passes and stats.graph_captures == 0
    assert recording.replays > recording.captures > 0


def test_passes_are_captured_once_and_used_for_other_prompts(make_case, recording):
    case = make_case("llama", 0)
    prompts = [torch.randint(7, 99, (1, n)) for n in (300, 400, 480, 100, 120)]
    expected = [case.model.generate(ids, max_new_tokens=20) for ids in prompts]
    with std_decode.patched(case.model, draft_length=3, top_k_keys=32):
        for count, (ids, tokens) in enumerate(zip(prompts, expected)):
            assert torch.equal(case.model.generate(ids, max_new_tokens=20), tokens)
            stats = std_decode.last_stats(case.model)
            # All of a short prompt's keys are selected, so verification has no scores to give.
            assert stats.graph_captures == (2, 0, 0, 1, 0)[count], count


def test_replayed_drafts_read_the_newest_selection(make_case, recording, monkeypatch):
    """Tokens do not depend on it, acceptance does."""
    case = make_case("llama", 2)
    case.inputs = {"input_ids": torch.randint(7, 99, (2, 700))}

    def accepted():
        with std_decode.patched(case.model, **PATCH):
            for _ in range(2):
                case.generate(max_new_tokens=40)
            stats = std_decode.last_stats(case.model)
            assert stats.calls["select"] > 5
            return stats.rounds, stats.accepted

    replayed = accepted()
    monkeypatch.setattr(graphs, "capture", lambda step, pool: step)
    assert replayed == accepted()


def test_every_key_of_the_past_call_is_forgotten(make_case, recording):
    """Buffers are used again: neither its keys nor its importance may reach the next call."""
    case = make_case("llama", 2, max_new_tokens=20)
    long, short = (torch.randint(7, 99, (1, n)) for n in (150, 60))
    stats = []
    for prompts in ((short,), (long, short)):
        with std_decode.patched(case.model, **PATCH):
            for ids in prompts:
                case.model.generate(ids, max_new_tokens=20)
            stats.append(std_decode.last_stats(case.model))
    assert stats[0].accepted == stats[1].accepted and stats[0].rounds == stats[1].rounds


def test_buffers_are_made_once_for_many_calls(make_case, recording, monkeypatch):
    made, plain = [], BufferLayer.lazy_initialization
    monkeypatch.setattr(
        BufferLayer, "lazy_initialization", lambda *args: made.append(1) or plain(*args)
    )
    case = make_case("llama", 3)
    expected = case.generate()
    with std_decode.patched(case.model, **PATCH):
        made.clear()  # of the trial that patch runs
        for _ in range(5):
            assert torch.equal(case.generate(), expected)
        assert len(made) == 3  # layers
        case.generate(max_new_tokens=600)  # in another bucket
        assert len(made) == 6
        assert torch.equal(case.generate(), expected)  # which is large enough for this
        assert len(made) == 6


def test_growth_captures_anew(make_case, recording, monkeypatch):
    monkeypatch.setattr("std_decode.model.cache.BUCKET", 16)
    monkeypatch.setattr("std_decode.generation.MOST_NEW_TOKENS", 4)
    case = make_case("qwen2_vl", 1, max_new_tokens=80)
    expected = case.generate()
    with std_decode.patched(case.model, **PATCH):
        for _ in range(2):
            case.assert_same_tokens(expected, case.generate())
        assert recording.captures > 2


def test_what_a_graph_relies_on_is_checked(make_case, recording):
    """Weights elsewhere, adapters on or off, another dtype, a hook: the old graphs will not do."""
    from peft import LoraConfig, get_peft_model

    case = make_case("llama", 4)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    case.model = get_peft_model(case.model, lora)
    std_decode.patch(case.model, **PATCH)

    def check():
        got = case.generate()
        replays = std_decode.last_stats(case.model).graph_replays
        std_decode.unpatch(case.model)
        case.assert_same_tokens(case.generate(), got)
        std_decode.patch(case.model, **PATCH)
        return replays

    # Within one patch: generate, change, generate.
    def changed(change, undo=lambda: None):
        case.generate()
        change()
        got, stats = case.generate(), std_decode.last_stats(case.model)
        std_decode.unpatch(case.model)
        expected = case.generate()
        undo()
        std_decode.patch(case.model, **PATCH)
        case.assert_same_tokens(expected, got)
        return stats

    layers = case.model.base_model.model.model.layers
    tuner = case.model.base_model
    assert changed(tuner.disable_adapter_layers, tuner.enable_adapter_layers).graph_captures > 0
    assert changed(tuner.merge_adapter, tuner.unmerge_adapter).graph_replays > 0

    def move():
        weight = layers[0].mlp.up_proj.weight
        weight.data = weight.data * 0.5

    assert changed(move).graph_captures > 0
    seen = []
    std_decode.unpatch(case.model)
    hook = layers[1].register_forward_hook(lambda *_: seen.append(1))
    std_decode.patch(case.model, **PATCH)
    stats = changed(lambda: None, hook.remove)
    assert "hook" in stats.eager_because and stats.graph_replays == 0 and len(seen) > 16


def scale_adapters(model):
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)


def set_on(kind, name, value):
    def change(model):
        for module in model.modules():
            if kind in type(module).__name__:
                setattr(module, name, value)

    return change


def damp(model):
    layer = model.base_model.model.model.layers[1].mlp
    forward = layer.forward
    layer.forward = lambda states: forward(states) * 0.2


NUMBERS = {
    "adapters' scaling": scale_adapters,
    "a norm's epsilon": set_on("RMSNorm", "variance_epsilon", 0.5),
    "attention's scaling": set_on("Attention", "scaling", 0.1),
    "another activation": set_on("MLP", "act_fn", torch.nn.ReLU()),
    "another forward": damp,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_captured_pass_does_not_outlive_the_numbers_in_it(make_case, recording, name):
    import peft

    case = make_case("llama", 1)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["v_proj", "up_proj"], init_lora_weights=False
    )
    case.model = peft.get_peft_model(case.model, config).eval()
    std_decode.patch(case.model, **PATCH)
    before = case.generate()
    case.generate()
    assert std_decode.last_stats(case.model).graph_replays > 0
    NUMBERS[name](case.model)
    got = case.generate()
    stats = std_decode.last_stats(case.model)
    std_decode.unpatch(case.model)
    expected = case.generate()
    assert not torch.equal(before, expected)
    assert stats.fallback is None and stats.graph_captures > 0
    case.assert_same_tokens(expected, got)


def test_a_captured_pass_does_not_outlive_a_configuration(make_case, recording):
    case = make_case("gemma2", 1)
    std_decode.patch(case.model, **PATCH)
    case.generate(), case.generate()
    case.model.config.final_logit_softcapping = 3.0
    case.model.config.sliding_window = 9
    for layer in case.model.model.layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = 9
    got = case.generate(do_sample=True)
    std_decode.unpatch(case.model)
    case.assert_same_tokens(case.generate(do_sample=True), got, do_sample=True)


def test_what_cannot_be_captured_runs_as_it_is(make_case, recording, monkeypatch):
    case = make_case("qwen2_vl", 5)
    expected = case.generate()

    def refuse(step, pool):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "capture", refuse)
    with std_decode.patched(case.model, **PATCH):
        with pytest.warns(UserWarning, match="could not be captured"):
            assert torch.equal(case.generate(), expected)
        stats = std_decode.last_stats(case.model)
        assert "operation not permitted" in stats.eager_because and "more" not in str(stats)
        assert torch.equal(case.generate(), expected)


@pytest.mark.eager
@pytest.mark.parametrize("wanted", ["auto", True, False])
def test_on_the_cpu_nothing_is_captured_and_the_stats_say_so(make_case, wanted):
    case = make_case("llama", 6)
    with std_decode.patched(case.model, cuda_graphs=wanted, **PATCH):
        case.generate()
        stats = std_decode.last_stats(case.model)
    words = "cuda_graphs is False" if wanted is False else "the model is on the CPU"
    assert words in stats.eager_because and words in str(stats)


@pytest.mark.eager
def test_layers_on_several_devices_are_not_captured():
    devices = {torch.device("cuda", 0), torch.device("cuda", 1)}
    assert "several devices" in graphs.unavailable(devices)
    assert graphs.unavailable({torch.device("cuda", 0)}) is None


@pytest.mark.eager
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_decoded_pass_by_pass(make_case, tmp_path, where):
    import accelerate

    case = make_case("qwen2_vl", 6)
    expected = case.generate()
    if where == "cpu":
        accelerate.cpu_offload(case.model, execution_device="cpu")
    else:
        accelerate.disk_offload(case.model, tmp_path, execution_device="cpu")
    with std_decode.patched(case.model, **PATCH):
        assert torch.equal(case.generate(), expected)
        stats = std_decode.last_stats(case.model)
    assert stats.rounds > 0 and stats.eager_because == "weights are offloaded"


def test_unpatch_releases_the_buffers(make_case, recording):
    case = make_case("llama", 7)
    std_decode.patch(case.model, **PATCH)
    case.generate()
    buffer = weakref.ref(case.model._std_decode.engines.idle.cache.layers[0].keys)
    assert buffer() is not None
    std_decode.unpatch(case.model)
    assert buffer() is None  # at once, not when garbage is collected


def test_an_error_in_mid_call_drops_the_buffers(make_case, recording):
    case = make_case("llama", 8)
    expected = case.generate()

    class Explodes(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            if self.calls == 7:
                raise ZeroDivisionError
            return scores

    with std_decode.patched(case.model, **PATCH):
        case.generate()
        with pytest.raises(ZeroDivisionError):
            case.generate(logits_processor=LogitsProcessorList([Explodes()]))
        assert case.model._std_decode.engines.idle is None
        assert torch.equal(case.generate(), expected)


def test_few_graphs_live_at_a_time():
    kept = graphs.Graphs(torch.device("cpu"))
    for key in range(30):
        kept.captured[key] = lambda key=key: torch.tensor(key)
    assert int(kept.run(29, lambda: None)) == 29
    assert len(kept.captured) == graphs.MOST_GRAPHS and 29 in kept.captured


def test_passes_of_ever_new_shapes_pile_up_nothing(make_case, recording):
    """Such as those of a model that takes a growing tensor at every step."""
    case = make_case("llama", 3)
    with std_decode.patched(case.model, draft_length=0):
        case.generate()
        engine = case.model._std_decode.engines.idle
        stats = std_decode.last_stats(case.model)
        engine.start(
            lambda **inputs: SimpleNamespace(logits=inputs["growing"] * 2),
            DynamicCache(),
            None,
            None,
            stats,
        )
        for length in range(2, 40):
            ids = torch.zeros(1, 1, dtype=torch.int64)
            growing = torch.arange(1.0, length)
            for _ in range(3):  # as it is, captured, replayed
                got = engine.step("verify", ids, ids, 0, {"growing": growing})
                assert torch.equal(got, growing * 2)
        assert len(engine.graphs.captured) == graphs.MOST_GRAPHS
        assert len(engine.inputs) <= graphs.MOST_GRAPHS + 1
        assert recording.captures > 30


def live_bytes():
    """Of the storages of all tensors that Python knows."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not isinstance(thing, FakeTensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_eighty_calls_leave_nothing_behind(make_case, recording, cuda_graphs):
    """Prompts of many lengths, greedy and sampled, the cache kept and given away."""
    case = make_case("llama", 9)
    ids = case.inputs["input_ids"]
    with std_decode.patched(case.model, cuda_graphs=cuda_graphs, **PATCH):
        for call in range(100):
            how = dict(do_sample=call % 2 == 0, return_dict_in_generate=call % 5 == 0)
            case.model.generate(ids[:, : 20 + call % 20], max_new_tokens=6, **how)
            if call == 19:
                early = live_bytes()
        assert live_bytes() == early
        stats = std_decode.last_stats(case.model)
        assert stats.first_use_seconds == 0 and (stats.graph_replays > 0) == cuda_graphs

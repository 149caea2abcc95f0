"""Drafts of models whose weights are in main memory or on a disk: what they fetch, and keep."""

import copy
from collections import Counter
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from safetensors.torch import load_file
from torch import nn

import std_decode
from std_decode.passes.engine import Engine
from std_decode.rounds.policy import OFFLOADED_LENGTHS
from std_decode.weights import draft_weights, quantize, room
from std_decode.weights.rows import Rows
from tests.decode.weights.links import dense_bytes, hooks, offload, traces

PATCH = dict(draft_weights="int4", draft_length=4, top_k_keys=10_000)


@pytest.fixture(autouse=True)
def whole(make_case, monkeypatch):
    """Every layer of these models can have a twin."""
    monkeypatch.setitem(make_case.text, "vocab_size", 128)


@pytest.fixture
def stages(monkeypatch):
    """What is fetched in each pass, and made: ``(phase, bytes, logits)``, given the link."""
    noted, plain = [], Engine.compute

    def compute(self, phase, *others, **more):
        before = stages.link.nbytes
        result = plain(self, phase, *others, **more)
        noted.append((phase, stages.link.nbytes - before, result))
        return result

    def stages(link):
        stages.link = link
        monkeypatch.setattr(Engine, "compute", compute)
        return noted

    return stages


QUICK = [("llama", "disk"), ("qwen2_vl", "cpu"), ("gemma3", "disk")]
SLOW = [
    pytest.param(family, where, marks=pytest.mark.slow)
    for family in ("llama", "qwen2_vl", "gemma3", "qwen3", "gpt_oss")
    for where in ("disk", "cpu")
    if (family, where) not in QUICK
]


@pytest.mark.parametrize(("family", "where"), [*QUICK, *SLOW])
def test_tokens_are_those_of_the_model_in_memory(make_case, tmp_path, stages, family, where):
    case = make_case(family, 2)
    expected = {sample: case.generate(do_sample=sample) for sample in (False, True)}
    noted = stages(SimpleNamespace(nbytes=0))
    with std_decode.patched(case.model, **PATCH):
        noted.clear()
        case.generate()
    in_memory = next(logits for phase, _, logits in noted if phase == "draft")
    link = offload(case.model, where, tmp_path)
    before = traces(case.model)
    stages(link)
    with std_decode.patched(case.model, **PATCH):
        noted.clear()
        for sample, tokens in expected.items():
            assert torch.equal(case.generate(do_sample=sample), tokens)
            stats = std_decode.last_stats(case.model)
            assert stats.rounds > 0 and stats.draft_weights == "int4"
    fetched = {phase: {n for p, n, _ in noted if p == phase} for phase in ("draft", "verify")}
    assert fetched == {"draft": {0}, "verify": {dense_bytes(case.model)}}
    first = next(logits for phase, _, logits in noted if phase == "draft")
    assert (first - in_memory).abs().max() < 0.03 * in_memory.abs().max()
    assert traces(case.model) == before
    assert torch.equal(case.generate(), expected[False])


@pytest.mark.parametrize("promise", [True, "unpatched"])
def test_bits_that_are_promised(make_case, tmp_path, promise):
    case = make_case("llama", 3)
    case.model.bfloat16()
    with std_decode.patched(case.model, reproducible=promise, draft_length=0):
        expected = case.generate(do_sample=True)
    offload_folder = tmp_path / "weights"
    accelerate.disk_offload(case.model, offload_folder, execution_device="cpu")
    with std_decode.patched(case.model, reproducible=promise, **PATCH):
        assert torch.equal(case.generate(do_sample=True), expected)
        stats = std_decode.last_stats(case.model)
    assert stats.rounds > 0 and stats.draft_weights == "int4"
    assert stats.promise == ("reproducible" if promise is True else promise)


def test_lengths_that_are_chosen(make_case, tmp_path):
    case = make_case("llama", 2, max_new_tokens=60)
    expected = case.generate()
    offload(case.model, "disk", tmp_path)
    with std_decode.patched(case.model, **{**PATCH, "draft_length": "auto"}):
        assert torch.equal(case.generate(), expected)
        assert case.model._std_decode.policy.lengths == OFFLOADED_LENGTHS
    assert max(OFFLOADED_LENGTHS) == 63
    with std_decode.patched(case.model, top_k_keys=8):  # whose drafts fetch all weights, too
        assert case.model._std_decode.policy.most < 63


def test_a_module_at_a_time_is_there_while_copies_are_made(make_case, tmp_path, monkeypatch):
    case = make_case("llama", 2)
    link = offload(case.model, "disk", tmp_path)
    largest = max(x.nbytes for x in case.model.parameters())
    most, plain = [], quantize.quantize

    def quantized(weight, *others):
        link.most = max(link.most, sum(link.live.values()))
        return plain(weight, *others)

    make = draft_weights.Twins.make

    def making(self, *args, **kwargs):
        assert not link.live
        link.most = 0
        make(self, *args, **kwargs)
        most.append(link.most)

    monkeypatch.setattr(quantize, "quantize", quantized)
    monkeypatch.setattr(draft_weights.Twins, "make", making)
    std_decode.patch(case.model, **PATCH)
    assert most == [largest]
    kept = case.model._std_decode.draft_weights.twins.nbytes
    assert not link.live and kept < 0.4 * dense_bytes(case.model)  # float32


def test_two_layers_are_there_in_a_pass(make_case, tmp_path, monkeypatch):
    monkeypatch.setitem(make_case.text, "num_hidden_layers", 6)
    case = make_case("llama", 2)
    link = offload(case.model, "disk", tmp_path)
    layer = sum(x.nbytes for x in case.model.model.layers[0].parameters())
    head = case.model.lm_head.weight.nbytes
    assert head < layer
    with std_decode.patched(case.model, **PATCH):
        case.generate()
        link.most = 0
        case.generate()
        assert layer < link.most <= 2 * layer
        assert not link.live


def test_the_next_layer_is_fetched_by_a_thread(make_case, tmp_path):
    case = make_case("llama", 2)
    link = offload(case.model, "disk", tmp_path)
    with std_decode.patched(case.model, **PATCH):
        case.generate(max_new_tokens=2)
        link.taken.clear()
        case.generate(max_new_tokens=2)
    by = Counter((name, "fetches" in thread) for name, thread in link.taken)
    assert by.pop(("model.embed_tokens.weight", False)) > 1  # what comes first in a pass
    assert len(by) == 3 * 9 + 2 and all(fetched_ahead for _, fetched_ahead in by)


def test_what_does_not_fit_is_said_with_numbers_and_changes_nothing(
    make_case, tmp_path, monkeypatch
):
    case = make_case("llama", 2)
    offload(case.model, "disk", tmp_path)
    before = traces(case.model)
    with monkeypatch.context() as small:
        small.setattr(room, "free_memory", lambda device: 100_000)
        with pytest.raises(MemoryError) as raised:
            std_decode.patch(case.model, **PATCH)
    said = str(raised.value)
    assert "4-bit weights of 22 layers take 0.00 GB, what else drafts read of offloaded" in said
    assert "expected at most the 0.00 GB free on cpu; free memory or use draft_weights=No" in said
    assert traces(case.model) == before and not std_decode.is_patched(case.model)
    # All together count: copies alone would fit.
    with std_decode.patched(case.model, **PATCH):
        twins = case.model._std_decode.draft_weights.twins
        copies = sum(twin.nbytes for twin in twins.twins)
        beside = twins.offload.nbytes
    assert twins.offload.found and beside > 0
    needed = next(iter(room.needed(twins.twins, [*twins.offload.found.values()])))
    assert needed.copies == copies and needed.beside == beside
    monkeypatch.setattr(room, "free_memory", lambda device: sum(needed[2:]) - 1)
    with pytest.raises(MemoryError):
        std_decode.patch(case.model, **PATCH)
    monkeypatch.setattr(room, "free_memory", lambda device: sum(needed[2:]))
    std_decode.patch(case.model, **PATCH)


def test_auto_makes_copies_where_weights_are_fetched(make_case, tmp_path, monkeypatch):
    case = make_case("llama", 2)
    size = dense_bytes(case.model)
    offload(case.model, "disk", tmp_path)
    auto = {**PATCH, "draft_weights": "auto"}
    with std_decode.patched(case.model, **auto):
        case.generate()
        stats = std_decode.last_stats(case.model)
        found = case.model._std_decode.draft_weights
        assert found.twins.offload.fetched_bytes == size and found.most_rows is None
    assert stats.draft_weights == "int4"
    assert stats.draft_weights_because == "auto: a dense pass fetches 0.00 GB of offloaded weights"
    monkeypatch.setattr(draft_weights, "free_memory", lambda device: 100_000)
    with std_decode.patched(case.model, **auto):
        case.generate()
        stats = std_decode.last_stats(case.model)
    assert stats.draft_weights is None and "more than 50% of the" in stats.draft_weights_because


def test_a_cache_of_the_model_in_memory_is_one_of_the_offloaded(make_case, tmp_path, monkeypatch):
    case, file = make_case("llama", 2), tmp_path / "copies"
    with std_decode.patched(case.model, draft_weights_cache=file, **PATCH):
        expected = case.generate()
    made = load_file(file)
    link = offload(case.model, "disk", tmp_path / "weights")
    with monkeypatch.context() as known:
        known.setattr(quantize, "quantize", None)
        with std_decode.patched(case.model, draft_weights_cache=file, **PATCH):
            assert torch.equal(case.generate(), expected)
    file.unlink()
    before = link.nbytes
    with std_decode.patched(case.model, draft_weights_cache=file, **PATCH):
        assert torch.equal(case.generate(), expected)
    again = load_file(file)
    assert made.keys() == again.keys() and all(torch.equal(made[x], again[x]) for x in made)
    assert link.nbytes > before


def test_copies_follow_weights_that_change_in_memory(make_case, tmp_path):
    case = make_case("llama", 2)
    accelerate.cpu_offload(case.model, execution_device="cpu")
    with std_decode.patched(case.model, **PATCH):
        case.generate()
        twins = case.model._std_decode.draft_weights.twins
        before = {twin.name: twin.packed.clone() for twin in twins.twins}
        norm = twins.offload.found[case.model.model.norm]
        layer = case.model.model.layers[1].mlp.up_proj
        with torch.no_grad():
            layer._hf_hook.weights_map["weight"].mul_(-1)
            case.model.model.norm._hf_hook.weights_map["weight"].fill_(3)
        case.generate()
        changed = {twin.name for twin in twins.twins if not before[twin.name].equal(twin.packed)}
        assert changed == {"model.layers.1.mlp.up_proj"}
        assert torch.equal(norm.kept["weight"], torch.full_like(norm.kept["weight"], 3))
        got = case.generate()
    assert torch.equal(got, case.generate())


def test_a_model_that_is_partly_there(make_case, tmp_path, stages):
    """Layers in memory, with a hook all the same, draft with copies as well."""
    case = make_case("llama", 2)
    expected = case.generate()
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
              "model.layers.2": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu",
              "lm_head": "disk"}  # fmt: skip
    accelerate.dispatch_model(case.model, places, main_device="cpu", offload_dir=tmp_path)
    before = traces(case.model)
    with std_decode.patched(case.model, **PATCH):
        assert torch.equal(case.generate(), expected)
        stats = std_decode.last_stats(case.model)
        found = case.model._std_decode.draft_weights.twins
        assert not any(twin.wrapped for twin in found.twins)
        assert len(found.offload.found) == 2 * 9 + 1
    assert stats.twinned_layers == 22 and stats.acceptance_rate > 0
    assert traces(case.model) == before


def test_keys_and_values_are_offloaded_as_well(make_case, tmp_path, stages):
    case = make_case("llama", 2, rows=2)
    expected = case.generate(do_sample=True)
    noted = stages(offload(case.model, "cpu", tmp_path))
    with std_decode.patched(case.model, kv_cache="offloaded", **PATCH):
        noted.clear()
        assert torch.equal(case.generate(do_sample=True), expected)
        stats = std_decode.last_stats(case.model)
    assert stats.rounds > 0 and stats.fallback is None and stats.draft_weights == "int4"
    assert {fetched for phase, fetched, _ in noted if phase == "draft"} == {0}


def test_hooks_that_are_removed_or_put_on_after_patch(make_case, tmp_path, stages):
    case = make_case("llama", 2)
    expected = case.generate()
    accelerate.cpu_offload(case.model, execution_device="cpu")
    std_decode.patch(case.model, **PATCH)
    case.generate()
    remove_hook_from_submodules(case.model)
    assert {x.device.type for x in case.model.parameters()} == {"cpu"}
    assert torch.equal(case.generate(), expected)
    assert std_decode.last_stats(case.model).draft_weights == "int4"
    noted = stages(offload(case.model, "disk", tmp_path))
    assert torch.equal(case.generate(), expected)
    stats = std_decode.last_stats(case.model)
    assert stats.draft_weights == "int4" and stats.fallback is None
    assert {fetched for phase, fetched, _ in noted if phase == "draft"} == {0}
    std_decode.unpatch(case.model)
    assert torch.equal(case.generate(), expected)
    kinds = {type(module) for module in case.model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {nn.Linear} and all(type(hook).__name__ == "AlignDevicesHook"
                                        and "_std_decode_offloaded" not in vars(hook)
                                        for _, hook in hooks(case.model))  # fmt: skip


def test_a_copy_of_a_patched_model_makes_its_own(make_case, tmp_path):
    case = make_case("llama", 2)
    expected = case.generate()
    accelerate.cpu_offload(case.model, execution_device="cpu")
    std_decode.patch(case.model, **PATCH)
    case.generate()
    other = copy.deepcopy(case.model)
    twins = other._std_decode.draft_weights.twins
    assert twins.nbytes == 0
    std_decode.unpatch(case.model)
    case.model = other
    assert torch.equal(case.generate(), expected)
    assert std_decode.last_stats(other).draft_weights == "int4"


def test_rows_that_two_have_are_kept_once(make_case, tmp_path, monkeypatch):
    monkeypatch.setitem(make_case.text, "tie_word_embeddings", True)
    case = make_case("llama", 2)
    offload(case.model, "disk", tmp_path)
    with std_decode.patched(case.model, **PATCH):
        found = case.model._std_decode.draft_weights.twins.offload.found
        embedding, head = found[case.model.model.embed_tokens], found[case.model.lm_head]
        assert embedding.rows is head.rows is not None


def test_the_best_tokens_are_scored_by_rows_of_the_head(make_case, tmp_path):
    case = make_case("llama", 2)
    weight = case.model.lm_head.weight.detach().clone()
    offload(case.model, "disk", tmp_path)
    states = torch.randn(8, 64)
    exact = states @ weight.t()
    with std_decode.patched(case.model, **PATCH), torch.no_grad():
        twin = case.model.lm_head._std_decode_twin
        logits = twin.multiply(states, None)
        by_4_bits = quantize.linear(states, twin.packed, twin.scales, None)
    best = logits.argmax(-1, keepdim=True)
    errors = [(x - exact).gather(1, best).abs().max() for x in (logits, by_4_bits)]
    assert errors[0] < 0.02 * exact.abs().max() and errors[0] < errors[1] / 3


def test_rows_are_rounded_to_8_bits():
    torch.manual_seed(0)
    weight = (torch.randn(300, 64) * torch.rand(300, 1).exp()).bfloat16()
    weight[7] = 0
    rows = Rows(weight)
    assert rows.nbytes == Rows.planned_bytes(weight) == 300 * 64 + 4 * 300
    read = rows[torch.tensor([[3, 7], [299, 3]])]
    assert read.dtype == torch.bfloat16 and read.shape == (2, 2, 64)
    every = rows[torch.arange(300)].float()
    step = weight.float().abs().amax(dim=1, keepdim=True) / 127
    assert ((every - weight.float()).abs() <= 0.5 * step + weight.float().abs() / 128).all()
    assert torch.equal(every[[3, 7]], read[0].float())

"""What a call keeps in memory is what its stats say, and rounds add nothing that grows with N."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

import std_decode
from std_decode import generation
from std_decode.model import cache
from std_decode.rounds.loop import Decoding

PATCH = dict(draft_length=4, top_k_keys=16)


def long_prompt(make_case, tokens, rows=1, **options):
    case = make_case("llama", 1, rows, max_new_tokens=20, **options)
    case.inputs = {"input_ids": torch.randint(7, 99, (rows, tokens))}
    return case


class Allocations(TorchDispatchMode):
    """Sizes of all storages that operators return, but for those of our own (whose workspace is
    theirs to state) and the ones they were given."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.namespace == "std_kernels":
            return results
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                if storage.data_ptr() not in given:
                    self.sizes.append((str(func), storage.nbytes()))
        return results


def test_a_round_allocates_nothing_that_grows_with_the_context(make_case, monkeypatch):
    """Neither drafting, nor verifying, nor selecting again, nor choosing and keeping tokens."""
    plain, seen = Decoding.round, []

    def watched(self):
        with Allocations() as allocations:
            plain(self)
        seen.append(allocations.sizes)

    monkeypatch.setattr(Decoding, "round", watched)
    rounds = {}
    for tokens in (600, 2400):
        case = long_prompt(make_case, tokens, rows=2)
        for do_sample in (False, True):
            with std_decode.patched(case.model, **PATCH):
                seen.clear()
                case.generate(do_sample=do_sample)
                assert std_decode.last_stats(case.model).calls["select"] > 1
            rounds[tokens, do_sample] = seen[0]  # all have the same gamma, but perhaps the last
    for do_sample in (False, True):
        assert rounds[600, do_sample] == rounds[2400, do_sample] != []


def test_buffers_are_made_once_and_grow_by_bucket(make_case, monkeypatch):
    made, plain = [], cache.BufferLayer.grow
    monkeypatch.setattr(
        cache.BufferLayer, "grow", lambda self, room: made.append(room) or plain(self, room)
    )
    case = long_prompt(make_case, 200)
    with std_decode.patched(case.model, **PATCH):
        case.generate(max_new_tokens=40)
        stats = std_decode.last_stats(case.model)
    # 200 + 40 + 5 tokens in a bucket of 256; 3 layers, K and V, 2 heads of 16 float32.
    assert made == [] and stats.kv_cache_bytes == 256 * 3 * 2 * 2 * 16 * 4
    monkeypatch.setattr(generation, "MOST_NEW_TOKENS", 8)
    with std_decode.patched(case.model, **PATCH):
        case.generate(max_new_tokens=400)
        stats = std_decode.last_stats(case.model)
    assert made == [512] * 3 + [768] * 3
    assert stats.kv_cache_bytes == 768 * 3 * 2 * 2 * 16 * 4


@pytest.mark.eager  # captured passes have importance for whole buckets
def test_the_stats_state_what_selection_and_noise_keep(make_case):
    case = long_prompt(make_case, 300, rows=2)
    with std_decode.patched(case.model, **PATCH):
        case.generate()
        greedy = std_decode.last_stats(case.model)
        case.generate(do_sample=True)
        sampled = std_decode.last_stats(case.model)
    assert greedy.selected_keys == 4 + 64 + 16
    keys, layers, heads = 2 * 300, 3, 2
    scored = 2 * 512  # 300 + 120 tokens and 5 in a bucket
    assert greedy.workspace_bytes == 4 * layers * heads * (
        keys + scored + 2 * greedy.selected_keys
    )
    assert sampled.workspace_bytes == greedy.workspace_bytes + 4 * 32 * 2 * 120
    assert "KV cache" in str(greedy) and "workspace" in str(greedy)
    with std_decode.patched(case.model, draft_length=0):
        case.generate()
        assert std_decode.last_stats(case.model).workspace_bytes == 0


def buffers(model):
    """What is kept between calls for the next one."""
    idle = model._std_decode.engines.idle
    if idle is None:
        return []
    layers = [x for layer in idle.cache.layers for x in (layer.keys, layer.values)]
    return layers + [x for group in idle.groups for x in (group.importance, group.indices,
                                                          group.scores, group.lse)]  # fmt: skip


class Memory:
    """What the CPU's allocator did in a call, inside of operators too."""

    def __init__(self, profiled):
        events = sorted(profiled.profiler.kineto_results.events(), key=lambda e: e.start_ns())
        self.changes, self.live, self.first_round = [], [0], None
        for event in events:
            if event.name() == "round" and self.first_round is None:
                self.first_round = len(self.changes)
            if event.name() == "[memory]":
                self.changes.append(event.nbytes())
                self.live.append(self.live[-1] + event.nbytes())

    def peak(self):
        """The most that a round saw, above what there was before the call."""
        return max(self.live[self.first_round :])

    def largest(self):
        """The largest block that a round asked for."""
        return max(self.changes[self.first_round :])


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_the_peak_is_weights_buffers_and_the_stated_workspace(
    make_case, recording, monkeypatch, cuda_graphs
):
    """And no round copies the keys or values of a layer, nor moves them."""
    plain, places = Decoding.round, []

    def marked(self):
        with record_function("round"):
            plain(self)
        places.append([(x.keys.data_ptr(), x.values.data_ptr()) for x in self.engine.cache.layers])

    monkeypatch.setattr(Decoding, "round", marked)
    # What comes and goes is of one layer, such as the scores that the ops for the CPU hold.
    monkeypatch.setitem(make_case.text, "num_hidden_layers", 6)
    monkeypatch.setitem(make_case.text, "hidden_size", 128)
    case = long_prompt(make_case, 3000, rows=2)
    weights = sum(parameter.nbytes for parameter in case.model.parameters())
    with std_decode.patched(case.model, cuda_graphs=cuda_graphs, **PATCH):
        for _ in range(2):  # afterwards nothing but replays, where there are any
            case.generate()
        kept = sum(live.nbytes for live in buffers(case.model))
        places.clear()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            case.generate()
        stats = std_decode.last_stats(case.model)
    assert (stats.graph_replays > 0) == cuda_graphs and stats.rounds > 4
    assert places == [places[0]] * len(places) and len(places) >= stats.rounds
    memory = Memory(profiled)
    assert memory.largest() < stats.kv_cache_bytes // (2 * 6)  # the keys of one layer
    stated = weights + stats.kv_cache_bytes + stats.workspace_bytes
    assert weights + kept + memory.peak() == pytest.approx(stated, rel=0.1)

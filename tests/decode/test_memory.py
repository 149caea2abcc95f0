"""What a call keeps in memory is what its stats say, and rounds add nothing that grows with N."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import std_decode
from std_decode import cache, generation
from std_decode.loop import Decoding

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


def test_the_stats_state_what_selection_and_noise_keep(make_case):
    case = long_prompt(make_case, 300, rows=2)
    with std_decode.patched(case.model, **PATCH):
        case.generate()
        greedy = std_decode.last_stats(case.model)
        case.generate(do_sample=True)
        sampled = std_decode.last_stats(case.model)
    assert greedy.selected_keys == 4 + 64 + 16
    keys, layers, heads = 2 * 300, 3, 2
    assert greedy.workspace_bytes == 4 * layers * heads * (keys + 2 * greedy.selected_keys)
    assert sampled.workspace_bytes == greedy.workspace_bytes + 4 * 32 * 2 * 120
    assert "KV cache" in str(greedy) and "workspace" in str(greedy)
    with std_decode.patched(case.model, draft_length=0):
        case.generate()
        assert std_decode.last_stats(case.model).workspace_bytes == 0

"""generate(prefill_chunk_size=...): a prompt read in several passes, then drafted for as ever."""

import pytest
import torch

import std_decode
from std_decode.model.cache import CACHE
from std_decode.passes.engine import Engine
from tests.decode.model.test_holes import riddled
from tests.decode.test_second_question import ask_twice, same_cache

PATCH = dict(draft_length=4, top_k_keys=6)
# Until 5.23 transformers cuts 3D positions by the batch, and begins with an empty cache.
NEW = pytest.mark.skipif(CACHE != "cache", reason="transformers itself reads other tokens")
SLOW = pytest.mark.slow


def passes(case, chunk):
    return -(-case.inputs["input_ids"].shape[1] // chunk)


@pytest.mark.parametrize(("family", "rows", "chunk"), [
    pytest.param("qwen2_vl", 3, 32, marks=NEW), ("gemma3", 3, 7), ("qwen3_next", 1, 7),
    pytest.param("qwen2_vl", 1, 7, marks=(NEW, SLOW)), pytest.param("llama", 3, 7, marks=SLOW),
    pytest.param("gemma3", 1, 32, marks=SLOW), pytest.param("qwen3_next", 3, 32, marks=SLOW),
])  # fmt: skip
def test_same_tokens_as_unpatched(make_case, family, rows, chunk):
    for do_sample in (False, True):
        options = dict(prefill_chunk_size=chunk, do_sample=do_sample)
        case = make_case(family, 1, rows, eos=rows > 1)
        expected = case.generate(**options)
        with std_decode.patched(case.model, **PATCH):
            got = case.generate(**options)
            stats = std_decode.last_stats(case.model)
        assert stats.fallback is None and stats.rounds > 0
        assert stats.calls["prefill"] == passes(case, chunk) > 1
        case.assert_same_tokens(expected, got, **options)


def selected(case, monkeypatch, **options):
    """What the prompt's keys compete by after prefill, and which are selected, by layer."""
    found, select = [], Engine.select

    def watched(engine, selection):
        select(engine, selection)
        layers = engine.cache.selecting_layers
        found.append([(x.importance.clone(), x.indices.clone()) for x in layers])

    with monkeypatch.context() as patches, std_decode.patched(case.model, **PATCH):
        patches.setattr(Engine, "select", watched)
        case.generate(**options)
        assert std_decode.last_stats(case.model).fallback is None
    return found[0]


@pytest.mark.parametrize(("rows", "chunk", "holes"), [(1, 5, False), (3, 89, False), (3, 5, True)])
def test_the_selection_is_that_of_a_prompt_read_at_once(
    make_case, monkeypatch, rows, chunk, holes
):
    """Up to 64 queries vote, of the last pass and of as many before it as that takes."""
    case = make_case("llama", 2, rows)
    if holes:
        case.inputs["attention_mask"] = riddled(case.inputs["attention_mask"], 0.1)
    expected = selected(case, monkeypatch)
    got = selected(case, monkeypatch, prefill_chunk_size=chunk)
    assert len(expected) == len(got) > 1
    for (importance, indices), (other, chosen) in zip(expected, got):
        torch.testing.assert_close(importance, other, atol=1e-6, rtol=1e-4)
        assert torch.equal(indices, chosen)


@pytest.mark.parametrize(("family", "given"), [
    ("llama", "new tokens"), pytest.param("llama", "everything", marks=SLOW),
    pytest.param("qwen2_vl", "everything", marks=(NEW, SLOW)),
    pytest.param("qwen2_vl", "new tokens", marks=(NEW, SLOW)),
])  # fmt: skip
def test_a_second_question(make_case, family, given):
    """The seven tokens that are new come in three passes."""
    case = make_case(family, 3, rows=3, eos=True)
    options = dict(prefill_chunk_size=3)
    try:
        *expected, plain = ask_twice(case, given, **options)
    except (ValueError, RuntimeError):  # of the old transformers, whose chunks begin at 0
        assert CACHE != "cache"
        return
    with std_decode.patched(case.model, **PATCH):
        *got, ours = ask_twice(case, given, **options)
        stats = std_decode.last_stats(case.model)
    assert all(map(torch.equal, expected, got))
    if CACHE == "cache":
        assert stats.fallback is None and stats.rounds > 0 and stats.reused_tokens > 0
        assert stats.calls["prefill"] == 3
        same_cache(plain, ours, case.inputs["attention_mask"])
    else:
        assert "as though the cache given were empty" in stats.fallback


def test_in_lockstep_too(make_case):
    options = dict(prefill_chunk_size=9, output_scores=True, return_dict_in_generate=True)
    case = make_case("llama", 4, rows=2, eos=True)
    expected = case.generate(**options)
    with std_decode.patched(case.model, **PATCH):
        got = case.generate(**options)
        stats = std_decode.last_stats(case.model)
    assert stats.mode == "lockstep" and stats.rounds > 0 and stats.calls["prefill"] > 1
    case.assert_same_tokens(expected.sequences, got.sequences, prefill_chunk_size=9)

"""generate(past_key_values=...): going on from a cache, without reading the video again."""

import copy

import pytest
import torch
from transformers import DynamicCache

import std_decode
from std_decode import generation
from tests.decode.observers import interposed

PATCH = dict(draft_length=4, top_k_keys=6)
VIDEO_INPUTS = ("pixel_values_videos",)
FAMILIES = ("qwen2_vl", "llava_onevision", "llama", "gemma3")


def conversation(case, question, first, given):
    """The inputs of a second question after the answer `first`, whole or only what is new."""
    rows = len(first)
    past = first.shape[1] - 1  # the last token of an answer is not in the cache
    ids = torch.cat([first, question], dim=1)
    mask = case.inputs["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(rows, ids.shape[1] - mask.shape[1])], dim=1)
    inputs = {k: v for k, v in case.inputs.items() if k not in VIDEO_INPUTS}
    if given == "new tokens":
        inputs = {k: v for k, v in inputs.items() if k not in ("mm_token_type_ids",)}
        inputs.pop("video_grid_thw", None)
        return {**inputs, "input_ids": ids[:, past:], "attention_mask": mask}
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        more = types.new_zeros(rows, ids.shape[1] - types.shape[1])
        inputs["mm_token_type_ids"] = torch.cat([types, more], dim=1)
    return {**inputs, "input_ids": ids, "attention_mask": mask}


def ask_twice(case, given, **options):
    """Answer, answer to a second question, and the cache after that."""
    rows = len(case.inputs["input_ids"])
    options["return_dict_in_generate"] = True
    first = case.generate(**options)
    cache = first.past_key_values
    assert type(cache) is DynamicCache
    torch.manual_seed(99)
    question = torch.randint(7, 99, (rows, 6))
    inputs = conversation(case, question, first.sequences, given)
    second = case.model.generate(**inputs, past_key_values=cache, **{**case.options, **options})
    assert second.past_key_values is cache
    return first.sequences, second.sequences, cache


def same_cache(plain, ours, mask):
    assert plain.get_seq_length() == ours.get_seq_length()
    for a, b in zip(plain.layers, ours.layers):
        assert type(a) is type(b) and a.keys.shape == b.keys.shape
        kept = a.keys.shape[2]
        seen = torch.nn.functional.pad(mask, (0, a.get_seq_length() - mask.shape[1]), value=1)
        seen = seen.bool()[:, -kept:]
        for name in ("keys", "values"):
            left, right = (getattr(x, name).transpose(1, 2)[seen] for x in (a, b))
            torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("given", ["everything", "new tokens"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_question_is_answered_the_same_from_the_returned_cache(
    make_case, family, rows, given
):
    """Ragged; rows have ended at different steps, so some of the cache is padding."""
    for seed, do_sample in ((1, False), (2, True)):
        case = make_case(family, seed, rows, eos=rows > 1)
        *expected, plain = ask_twice(case, given, do_sample=do_sample)
        with std_decode.patched(case.model, **PATCH):
            *got, ours = ask_twice(case, given, do_sample=do_sample)
            stats = std_decode.last_stats(case.model)
        assert all(map(torch.equal, expected, got))
        assert stats.fallback is None and stats.rounds > 0 and stats.mode == "ragged"
        assert stats.reused_tokens == expected[0].shape[1] - 1
        same_cache(plain, ours, case.inputs["attention_mask"])


def test_in_lockstep_too(make_case):
    options = dict(output_scores=True)
    case = make_case("qwen2_vl", 3, rows=2, eos=True)
    *expected, plain = ask_twice(case, "everything", **options)
    with std_decode.patched(case.model, **PATCH):
        *got, ours = ask_twice(case, "everything", **options)
        stats = std_decode.last_stats(case.model)
    assert all(map(torch.equal, expected, got))
    assert stats.mode == "lockstep" and stats.reused_tokens > 0
    same_cache(plain, ours, case.inputs["attention_mask"])


@pytest.mark.parametrize("given", ["everything", "new tokens"])
def test_the_video_is_not_read_again_and_the_selection_is_made_for_the_new_question(
    make_case, monkeypatch, given
):
    case = make_case("qwen2_vl", 4)
    plans, plan = [], generation.plan_selection

    def planned(visual, kv_start, top_k_keys, new_tokens):
        plans.append((visual, plan(visual, kv_start, top_k_keys, new_tokens)))
        return plans[-1][1]

    monkeypatch.setattr(generation, "plan_selection", planned)
    lengths = []
    with std_decode.patched(case.model, **PATCH):
        with interposed(
            case.model.get_decoder(), lambda **kw: lengths.append(kw["inputs_embeds"].shape[1])
        ):
            first, _, cache = ask_twice(case, given)
    prompt, past = case.inputs["input_ids"].shape[1], first.shape[1] - 1
    assert lengths[0] == prompt and max(lengths[1:]) == 7  # the last token, then six new ones
    (visual, _), (again, selection) = plans
    assert again.shape == (1, past + 7)
    assert torch.equal(again[:, :prompt], visual) and not again[:, prompt:].any()
    assert int(selection.observers) == 7
    assert not selection.candidates[:, prompt - 8 :].any()  # text after the video is kept


def test_a_prefix_cache_of_the_callers_own(make_case):
    """The usual way to ask many questions: prefill once, copy the cache for each."""
    case = make_case("llama", 5)
    ids = case.inputs["input_ids"]
    prefix = DynamicCache(config=case.model.config)
    with torch.no_grad():
        case.model(ids[:, :60], past_key_values=prefix)
    questions = [torch.randint(7, 99, (1, 5)) for _ in range(3)]

    def ask(question):
        cache = copy.deepcopy(prefix)
        inputs = torch.cat([ids[:, :60], question], dim=1)
        answer = case.model.generate(inputs, past_key_values=cache, max_new_tokens=12)
        return answer, cache.get_seq_length()

    expected = [ask(question) for question in questions]
    with std_decode.patched(case.model, **PATCH):
        got = [ask(question) for question in questions]
        stats = std_decode.last_stats(case.model)
    assert stats.reused_tokens == 60 and stats.rounds > 0
    for (a, length), (b, ours) in zip(expected, got):
        assert torch.equal(a, b) and length == ours
    assert prefix.get_seq_length() == 60


def test_without_a_note_every_token_of_the_cache_competes(make_case, monkeypatch):
    """New tokens alone do not tell where the video was in a cache that was made elsewhere."""
    case = make_case("llama", 6)
    ids = case.inputs["input_ids"]

    def ask():
        cache = DynamicCache()  # of no config, so layers are made as they come
        with torch.no_grad():
            case.model(ids, past_key_values=cache)
        mask = torch.ones(1, ids.shape[1] + 5, dtype=torch.long)
        torch.manual_seed(0)
        question = torch.randint(7, 99, (1, 5))
        return case.model.generate(
            question, attention_mask=mask, past_key_values=cache, max_new_tokens=12
        )

    expected = ask()
    plans, plan = [], generation.plan_selection
    monkeypatch.setattr(
        generation, "plan_selection", lambda *a: plans.append(plan(*a)) or plans[-1]
    )
    with std_decode.patched(case.model, **PATCH):
        assert torch.equal(ask(), expected)
    always = plans[0].always[0].nonzero()[:, 0].tolist()
    assert always == [0, 1, 2, 3, *range(90, 95)]


def test_an_error_leaves_the_given_cache_as_it_was(make_case):
    case = make_case("gemma3", 7)
    first = case.generate(return_dict_in_generate=True)
    cache = first.past_key_values
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    question = torch.randint(7, 99, (1, 6))
    ids = torch.cat([first.sequences, question], dim=1)
    ask = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)
    expected = case.model.generate(**ask, past_key_values=copy.deepcopy(cache))
    calls = []

    def explode(*_, **__):
        calls.append(1)
        if len(calls) == 5:
            raise ZeroDivisionError

    with std_decode.patched(case.model, **PATCH):
        layer = case.model.get_decoder().layers[1]
        with interposed(layer, explode), pytest.raises(ZeroDivisionError):
            case.model.generate(**ask, past_key_values=cache)
        assert cache.get_seq_length() == first.sequences.shape[1] - 1
        for layer, (keys, values) in zip(cache.layers, before):
            assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        got = case.model.generate(**ask, past_key_values=cache)
    assert torch.equal(expected, got)

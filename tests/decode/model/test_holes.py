"""Masks with holes: a batched chat whose answers ended early, and tokens masked by the caller."""

import copy

import pytest
import torch
from transformers import DynamicCache

import std_decode
from std_decode.model import attention
from std_decode.model.cache import SparseToDenseCache
from std_decode.passes.engine import Engine
from tests.decode.families import PAD, VIDEO
from tests.decode.observers import interposed

PATCH = dict(draft_length=4, top_k_keys=6)
EVERY_KEY = dict(draft_length=4, top_k_keys=10_000)
SLOW = pytest.mark.slow
KEYS = ("llama", "qwen2_vl", "llava_onevision")
FAMILIES = (*KEYS, "qwen3_next", pytest.param("qwen3_5", marks=SLOW))


def question(lengths):
    """Of another length in each row, padded to the left."""
    texts = [torch.randint(7, 99, (length,)).tolist() for length in lengths]
    ids = torch.tensor([[PAD] * (max(lengths) - len(text)) + text for text in texts])
    return ids, (ids != PAD).long()


def chat(case, given, **options):
    """The answers of three turns, and the cache after the last; padding in between is masked."""
    options = {**case.options, "return_dict_in_generate": True, **options}
    inputs, text, mask = dict(case.inputs), case.inputs["input_ids"], case.inputs["attention_mask"]
    cache = DynamicCache(config=case.model.config.get_text_config(decoder=True))
    answers = []
    torch.manual_seed(case.seed)
    for turn in range(3):
        told = case.model.generate(**inputs, past_key_values=cache, **options)
        assert told.past_key_values is cache
        answers.append(told.sequences[:, inputs["input_ids"].shape[1] :])
        asked, seen = question([6 - turn, 3, 7])
        # The EOS id that ends an answer is part of it.
        ended = torch.isin(answers[-1], torch.tensor(options["eos_token_id"])).cumsum(1)
        said = torch.nn.functional.pad((ended == 0).long(), (1, -1), value=1)
        text, mask = torch.cat([text, answers[-1], asked], 1), torch.cat([mask, said, seen], 1)
        new = slice(cache.get_seq_length() if given == "new tokens" else None, None)
        inputs = dict(input_ids=text[:, new], attention_mask=mask)
        if given == "everything" and "mm_token_type_ids" in case.inputs:
            inputs["video_grid_thw"] = case.inputs["video_grid_thw"]
            types = case.inputs["mm_token_type_ids"]
            more = text.shape[1] - types.shape[1]
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, more))
    return answers, cache


def same_cache(plain, ours):
    """Every token where it was, the masked ones too."""
    for a, b in zip(plain.layers, ours.layers, strict=True):
        assert type(a) is type(b)
        stateful = hasattr(a, "recurrent_states")
        for name in ("conv_states", "recurrent_states") if stateful else ("keys", "values"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("mode", "do_sample", "given"),
    [
        ("ragged", False, "everything"),
        ("ragged", True, "new tokens"),
        ("lockstep", False, "new tokens"),
        ("lockstep", True, "everything"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_of_three_turns(make_case, family, mode, do_sample, given):
    options = dict(do_sample=do_sample, output_scores=mode == "lockstep")
    case = make_case(family, 1, rows=3, max_new_tokens=20, pad_token_id=PAD)
    case.options["eos_token_id"] = list(range(20, 32))
    expected, plain = chat(case, given, **options)
    assert all((told == PAD).any() for told in expected[:2]), "no answer ended early"
    with std_decode.patched(case.model, **PATCH):
        got, ours = chat(case, given, **options)
        stats = std_decode.last_stats(case.model)
    assert stats.fallback is None and stats.rounds > 0 and stats.mode == mode
    assert stats.reused_tokens > case.inputs["input_ids"].shape[1]
    assert all(map(torch.equal, expected, got))
    same_cache(plain, ours)


def riddled(mask, share, keep=None):
    """Without so many of its ones, of those that may go; the last stays."""
    holes = torch.rand(mask.shape) < share
    if keep is not None:
        holes &= ~keep
    holes[:, -1] = False
    return mask * ~holes


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "family", [*KEYS, *(pytest.param(f, marks=SLOW) for f in ("qwen3_next", "qwen3_5"))]
)
def test_random_holes_in_a_prompt(make_case, family, rows, share):
    for seed, do_sample in ((1, False), (2, True)):
        case = make_case(family, seed, rows, do_sample=do_sample)
        mask = case.inputs["attention_mask"]
        visual = case.inputs["input_ids"] > 99  # Qwen's video models count them to number tokens
        counted = "vl" in family or family == "qwen3_5"
        case.inputs["attention_mask"] = riddled(mask, share, visual if counted else None)
        expected = case.generate(return_dict_in_generate=True)
        for options in (PATCH, EVERY_KEY):
            with std_decode.patched(case.model, **options):
                got = case.generate(return_dict_in_generate=True)
                stats = std_decode.last_stats(case.model)
            assert stats.fallback is None and stats.rounds > 0
            ties = case.assert_same_tokens(expected.sequences, got.sequences)
            if options is EVERY_KEY:
                assert stats.accepted == stats.drafted > 0
            if not ties:
                same_cache(expected.past_key_values, got.past_key_values)


def test_a_model_that_drafts_nothing(make_case):
    case = make_case("llama", 3, rows=3)
    case.inputs["attention_mask"] = riddled(case.inputs["attention_mask"], 0.4)
    expected = case.generate()
    with std_decode.patched(case.model, draft_length=0):
        got = case.generate()
        stats = std_decode.last_stats(case.model)
    assert stats.fallback is None and stats.rounds == 0
    case.assert_same_tokens(expected, got)


def poison(mask, monkeypatch):
    """Make holes NaN to those who vote, and once the prompt is read to all. Returns the votes."""
    finish, score, votes = SparseToDenseCache.finish_prefill, attention._score_prompt, []

    def finished(cache, new):
        finish(cache, new)
        for layer in cache.buffers:
            for row, holes in enumerate((mask == 0).sum(1).tolist()):
                layer.keys[row, :, :holes] = layer.values[row, :, :holes] = float("nan")

    def scored(cache, selection, query, key, options):
        votes.append(selection.observers.tolist())
        key = key.masked_fill((mask == 0)[:, None, :, None], float("nan"))
        scores = score(cache, selection, query, key, options)
        assert scores.isfinite().all() and (scores.sum(2) > 0.9).all()
        return scores

    monkeypatch.setattr(SparseToDenseCache, "finish_prefill", finished)
    monkeypatch.setattr(attention, "_score_prompt", scored)
    return votes


@pytest.mark.parametrize("family", FAMILIES)
def test_holes_are_never_read(make_case, monkeypatch, family):
    case = make_case(family, 4, rows=3)
    visual = case.inputs["input_ids"] > 99
    mask = riddled(case.inputs["attention_mask"], 0.2, visual)
    case.inputs["attention_mask"] = mask
    expected = case.generate()
    with std_decode.patched(case.model, **PATCH):
        votes = poison(mask, monkeypatch)
        got = case.generate()
        stats = std_decode.last_stats(case.model)
    assert stats.fallback is None and stats.rounds > 0
    case.assert_same_tokens(expected, got)
    # No query of a hole votes: each row's newest tokens, as far as there is none.
    newest = ["".join(map(str, row)).rpartition("0")[2] for row in mask.tolist()]
    assert votes and all(
        0 < voters <= len(ones) for layer in votes for voters, ones in zip(layer, newest)
    )


def selected(case, monkeypatch):
    """The tokens, and the keys of each selection, counted from the end of the prompt."""
    indices, select = [], Engine.select

    def watched(engine, selection):
        select(engine, selection)
        length = engine.cache.prompt
        for layer in engine.cache.selecting_layers:
            kept = torch.where(layer.indices < 0, 2 * length, layer.indices) - length
            indices.append(kept.clone())

    options = dict(PATCH, visual_token_ids=[VIDEO])
    with monkeypatch.context() as patches, std_decode.patched(case.model, **options):
        patches.setattr(Engine, "select", watched)
        told = case.generate()[:, case.inputs["input_ids"].shape[1] :]
        stats = std_decode.last_stats(case.model)
    assert stats.fallback is None
    return told, indices, stats.accepted


def test_the_same_keys_are_selected_as_without_the_holes(make_case, monkeypatch):
    """Of a prompt that has the masked tokens taken out; the newest of it vote."""
    case = make_case("llama", 5, rows=2)
    ids = case.inputs["input_ids"]
    ids[ids == PAD] = 5
    ids[:, 20:70:2] = VIDEO
    riddle = riddled(torch.ones_like(ids), 0.3)
    riddle[:, 68:] = 1  # from the last of the video on
    texts = [row[seen.bool()].tolist() for row, seen in zip(ids, riddle)]
    width = max(map(len, texts))
    compact = torch.tensor([[PAD] * (width - len(text)) + text for text in texts])
    case.inputs = dict(input_ids=compact, attention_mask=(compact != PAD).long())
    told, expected, accepted = selected(case, monkeypatch)
    case.inputs = dict(input_ids=ids, attention_mask=riddle)
    got, indices, also = selected(case, monkeypatch)
    assert torch.equal(told, got) and accepted == also and len(indices) == len(expected) > 3
    for one, other in zip(expected, indices):
        for left, right in zip(one.flatten(0, 1).tolist(), other.flatten(0, 1).tolist()):
            assert [n for n in left if n < 0] == [n for n in right if n < 0]


@pytest.mark.eager  # counts passes
@pytest.mark.parametrize("at", [2, 4, 7, 10])
def test_an_error_leaves_the_given_cache_as_it_was(make_case, at):
    """In the prompt's pass, and later: the caller's cache is never in our order."""
    case = make_case("llama", 6, rows=3)
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    mask = riddled(mask, 0.3)
    cache = DynamicCache()
    with torch.no_grad():
        case.model(ids[:, :60], attention_mask=mask[:, :60], past_key_values=cache)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    case.inputs["attention_mask"] = mask
    expected = case.generate(past_key_values=copy.deepcopy(cache))
    calls = []

    def explode(*_, **__):
        calls.append(1)
        if len(calls) == at:
            raise ZeroDivisionError

    with std_decode.patched(case.model, **PATCH):
        layer = case.model.get_decoder().layers[1]
        with interposed(layer, explode), pytest.raises(ZeroDivisionError):
            case.generate(past_key_values=cache)
        for layer, (keys, values) in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        got = case.generate(past_key_values=cache)
        assert std_decode.last_stats(case.model).reused_tokens == 60
    case.assert_same_tokens(expected, got)


def test_captured_passes_serve_masks_of_every_kind(make_case, recording):
    """Holes are data: no shape, and nothing that a pass was captured with."""
    case = make_case("llama", 7, rows=3)
    left = case.inputs["attention_mask"].clone()
    left[:, 0] = 0
    with_holes = riddled(left, 0.3)
    calls = []
    for mask in (left, with_holes, left, riddled(left, 0.5), with_holes):
        case.inputs["attention_mask"] = mask
        calls.append((mask, case.generate()))
    with std_decode.patched(case.model, **PATCH):
        for number, (mask, expected) in enumerate(calls):
            case.inputs["attention_mask"] = mask
            assert torch.equal(case.generate(), expected)
            stats = std_decode.last_stats(case.model)
            assert stats.fallback is None and stats.graph_replays > 0
            assert number == 0 or stats.graph_captures == 0

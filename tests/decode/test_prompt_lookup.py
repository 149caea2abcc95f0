"""Looked-up drafts: the tokens of the unpatched model, whatever is found, and wherever."""

import itertools
import math
import random

import pytest
import torch

import std_decode
from std_decode.rounds.lookup import Chances, Found, Lookup
from std_decode.rounds.lookup_length import COMPILED_LOOKUP_LENGTHS, LOOKUP_LENGTHS
from std_decode.rounds.policy import DraftLength, FixedLength
from tests.decode.matches import Match
from tests.decode.observers import Streams, Watches
from tests.decode.test_modes import ending
from tests.decode.test_second_question import ask_twice

LOOKS_UP = dict(draft_length=4, top_k_keys=4, prompt_lookup=True)
# Eight tokens that nearly always follow each other, round and round.
CYCLE = range(20, 28)
REPEATS = dict(
    sequence_bias=[[[token], 9.0] for token in CYCLE]
    + [[[token, 20 + (token + 1) % 8], 9.0] for token in CYCLE]
)
PLAIN = dict()
SAMPLED = dict(do_sample=True, top_k=3)


def watching(mode):
    """Options of generate that have its rows advance so."""
    return dict(logits_processor=[Watches()]) if mode == "lockstep" else {}


def compare(case, options=LOOKS_UP, **more):
    """Generate both ways; the stats of the patched call."""
    expected = case.generate(**more)
    with std_decode.patched(case.model, **options):
        got = case.generate(**more)
        stats = std_decode.last_stats(case.model)
    case.assert_same_tokens(expected, got, **more)
    assert stats.fallback is None
    assert stats.lookup_accepted <= stats.accepted and stats.accepted <= stats.drafted
    assert stats.lookup_drafted <= stats.drafted and stats.lookup_rounds <= stats.rounds
    return stats


@pytest.mark.parametrize("mode", ["ragged", "lockstep"])
@pytest.mark.parametrize("text", [PLAIN, {**REPEATS, **SAMPLED}])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family, seed", [("qwen2_vl", 0), ("gemma3", 2)])
def test_same_tokens_as_unpatched(make_case, family, seed, rows, text, mode):
    same_tokens(make_case(family, seed, rows, eos=rows > 1, max_new_tokens=24, **text), mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ragged", "lockstep"])
@pytest.mark.parametrize("text", [PLAIN, REPEATS, SAMPLED, {**REPEATS, **SAMPLED}])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision", "llama", "gemma3"])
@pytest.mark.parametrize("seed", range(20, 35))
def test_same_tokens_as_unpatched_more(make_case, family, seed, rows, text, mode):
    same_tokens(make_case(family, seed, rows, eos=rows > 1, max_new_tokens=48, **text), mode)


def same_tokens(case, mode):
    stats = compare(case, **watching(mode))
    assert stats.mode == mode
    if len(case.inputs["input_ids"]) == 1:
        assert stats.lookup_rounds > 0


@pytest.mark.parametrize("mode", ["ragged", "lockstep"])
@pytest.mark.parametrize("rows", [1, 3])
def test_what_repeats_is_found(make_case, rows, mode):
    case = make_case("llama", 1, rows, max_new_tokens=60, **REPEATS)
    stats = compare(case, **watching(mode))
    assert stats.lookup_accepted > 0.7 * stats.lookup_drafted > 20 * rows
    assert stats.lookup_rounds > 0.5 * stats.rounds


@pytest.fixture
def told(monkeypatch):
    """``told(case)``: has each row find what the unpatched model goes on to say.

    `wrong` of these tokens are others.
    """

    def tell(case, wrong=0.0, **options):
        prompt, dice = case.inputs["input_ids"].shape[1], random.Random(0)
        answers = case.generate(**options)[:, prompt:].tolist()

        def found(lookup, rows, *most):
            return Found([Match(8)] * len(rows), Chances())

        def drafts(lookup, rows, count):
            each = [[] for _ in answers]
            for row in rows:
                at = len(lookup.texts[row].tokens) - prompt
                right = answers[row][at : at + count]
                each[row] = [9 if dice.random() < wrong else token for token in right]
            return each

        monkeypatch.setattr(Lookup, "found", found)
        monkeypatch.setattr(Lookup, "found_together", found)
        monkeypatch.setattr(Lookup, "drafts", drafts)
        return answers

    return tell


@pytest.mark.parametrize("mode", ["ragged", "lockstep"])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7])
def test_a_call_ends_where_it_should_within_drafts_that_are_right(
    make_case, told, tokens, do_sample, mode
):
    case = make_case("qwen2_vl", 5, max_new_tokens=tokens, do_sample=do_sample)
    told(case)
    stats = compare(case, **watching(mode))
    assert stats.emitted == tokens and stats.calls["draft"] == 0
    assert stats.calls["select"] == 1  # no draft step has told what scores are relative to
    passes = stats.rounds + stats.calls["dense"]
    assert passes == math.ceil((tokens - 1) / 5) and stats.lookup_rounds == stats.rounds
    assert stats.accepted >= tokens - 1 - passes  # the last pass may end with a draft


@pytest.mark.parametrize("mode", ["ragged", "lockstep"])
@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("how", ["eos", "strings", "length"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_rows_end_apart_within_drafts(make_case, told, letters, how, do_sample, wrong, mode):
    case = make_case("llama", 3, rows=3, max_new_tokens=21)
    options = dict(do_sample=do_sample, **ending(case, how, letters))
    answers = told(case, wrong, **options)
    stats = compare(case, {**LOOKS_UP, "draft_length": 5}, **options, **watching(mode))
    assert stats.mode == mode and stats.lookup_rounds == stats.rounds > 0
    passes = stats.rounds + stats.calls["dense"]
    if wrong == 0.0:
        assert passes == math.ceil((len(answers[0]) - 1) / 6)
    if wrong == 1.0:
        assert stats.accepted <= sum(row.count(9) for row in answers)


@pytest.mark.parametrize("mode", ["ragged", "lockstep"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_lengths_and_sources_in_any_order(make_case, told, monkeypatch, do_sample, mode):
    lengths = (0, -1, 4, -3, 1, -max(LOOKUP_LENGTHS))
    turns, looked_up, rounds = itertools.cycle(lengths), 0, 0
    monkeypatch.setattr(DraftLength, "choose", lambda self, rows, found=None: next(turns))
    for seed in range(3):
        case = make_case("llama", seed, 3, eos=True, do_sample=do_sample, max_new_tokens=40)
        with monkeypatch.context() as patches:
            told(case, wrong=0.3, **watching(mode))
            stats = compare(case, dict(top_k_keys=8), **watching(mode))
            looked_up, rounds = looked_up + stats.lookup_rounds, rounds + stats.rounds
            patches.undo()
    assert 0 < looked_up < rounds


def test_what_stands_behind_a_row_s_drafts_is_no_draft(make_case, monkeypatch):
    """Even where it is right: the last token again, of a text that says nothing else."""
    case = make_case("llama", 1, 2, max_new_tokens=24, sequence_bias=[[[20], 50.0]])
    looked_up = Lookup.drafts

    def of_the_first_row(lookup, rows, count):
        first, _ = looked_up(lookup, rows, count)
        return [first, []]

    monkeypatch.setattr(Lookup, "drafts", of_the_first_row)
    stats = compare(case)
    assert stats.lookup_accepted == stats.lookup_drafted > 8


def test_processors_see_the_text_with_the_drafts(make_case, told):
    """Those that look at the tokens so far, each row's own."""
    options = dict(no_repeat_ngram_size=2, repetition_penalty=1.3, min_new_tokens=9)
    for do_sample in (False, True):
        case = make_case("llama", 4, rows=3, eos=True, do_sample=do_sample, **options)
        told(case, wrong=0.1)
        assert compare(case).lookup_accepted > 10


def test_with_passes_of_one_shape(make_case):
    """No look-up makes a pass wider. Dense decoding by the same passes is the judge."""
    reproducible = 6
    case = make_case("llama", 1, rows=2, max_new_tokens=30, **REPEATS)
    case.model.bfloat16()
    dense = dict(draft_length=0, reproducible=reproducible)
    with std_decode.patched(case.model, **dense):
        expected = case.generate()
    for length in ("auto", 5):
        how = {**LOOKS_UP, "draft_length": length, "reproducible": reproducible}
        with std_decode.patched(case.model, **how):
            got = case.generate()
            stats = std_decode.last_stats(case.model)
        assert torch.equal(expected, got) and stats.promise == "reproducible"
        assert length == "auto" or stats.lookup_accepted > 0


@pytest.mark.parametrize("given", ["whole", "new tokens"])
def test_a_second_question(make_case, given):
    case = make_case("qwen2_vl", 2, rows=2, max_new_tokens=24, **REPEATS)
    expected = ask_twice(case, given)
    with std_decode.patched(case.model, **LOOKS_UP):
        got = ask_twice(case, given)
        assert std_decode.last_stats(case.model).lookup_accepted > 0
    for plain, ours in zip(expected[:2], got[:2]):
        assert torch.equal(plain, ours)


@pytest.mark.parametrize("mode", ["ragged", "lockstep"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["qwen2_vl", "llama"])
def test_look_ups_alone(make_case, family, rows, mode):
    """No draft step and no selection, however few look-ups are right."""
    case = make_case(family, 1, rows, eos=True, max_new_tokens=60, **REPEATS)
    stats = compare(case, dict(draft_length=0, prompt_lookup=True), **watching(mode))
    assert stats.calls["draft"] == stats.calls["select"] == stats.selected_keys == 0
    assert stats.lookup_rounds == stats.rounds and stats.drafted == stats.lookup_drafted
    case = make_case(family, 1, rows, max_new_tokens=60, do_sample=True)
    assert compare(case, dict(draft_length=0, prompt_lookup=True)).calls["draft"] == 0


def test_a_streamer_gets_each_token(make_case):
    case = make_case("llama", 1, max_new_tokens=30, **REPEATS)
    plain, ours = Streams(), Streams()
    case.generate(streamer=plain)
    with std_decode.patched(case.model, **LOOKS_UP):
        case.generate(streamer=ours)
        assert std_decode.last_stats(case.model).lookup_accepted > 0
    assert len(plain.calls) == len(ours.calls) and all(
        one == other if isinstance(one, str) else torch.equal(one, other)
        for one, other in zip(plain.calls, ours.calls)
    )


def test_each_length_is_captured_once(make_case, recording, monkeypatch):
    """Beside those of drafts that renew the selection."""
    turn, lengths = [0], (0, 4, *(-n for n in LOOKUP_LENGTHS))

    def choose(self, rows, found=None):
        turn[0] += 1
        gamma = lengths[turn[0] % len(lengths)]
        return max(0, gamma) if found is None else gamma

    monkeypatch.setattr(DraftLength, "choose", choose)
    case = make_case("llama", 1, max_new_tokens=200, **REPEATS)
    expected = case.generate()
    with std_decode.patched(case.model, top_k_keys=8):
        for _ in range(3):
            case.assert_same_tokens(expected, case.generate())
            stats = std_decode.last_stats(case.model)
    assert stats.lookup_rounds > 0 and stats.graph_captures == 0
    assert recording.captures == 3 + len(LOOKUP_LENGTHS)  # draft, dense step, sparse drafts


def test_which_calls_look_up(make_case):
    """By default those whose draft lengths are chosen; a fixed one is of the model's own."""
    case = make_case("llama", 1)
    for options, looks_up in (
        (dict(), LOOKUP_LENGTHS),
        (dict(prompt_lookup=False), ()),
        (dict(prompt_lookup=True), LOOKUP_LENGTHS),
        (dict(compile=True), COMPILED_LOOKUP_LENGTHS),
        (dict(draft_length=4), False),
        (dict(draft_length=4, prompt_lookup=True), True),
        (dict(draft_length=0), False),
        (dict(draft_length=0, prompt_lookup=True), LOOKUP_LENGTHS),
        (dict(draft_length=0, prompt_lookup=False), False),
    ):
        with std_decode.patched(case.model, **options):
            policy = case.model._std_decode.policy
            if isinstance(policy, FixedLength):
                assert policy.looks_up is looks_up
            else:
                assert policy.lookup_lengths == tuple(looks_up)


@pytest.mark.parametrize(
    "error, options",
    [
        (TypeError, dict(prompt_lookup="yes")),
        (TypeError, dict(prompt_lookup=None)),
    ],
)
def test_what_is_refused(make_case, error, options):
    case = make_case("llama", 1)
    with pytest.raises(error, match="patch: prompt_lookup is .*, expected"):
        std_decode.patch(case.model, **options)
    assert not std_decode.is_patched(case.model)

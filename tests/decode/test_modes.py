"""Batches whose rows end at different times, ragged and in lockstep, as each is promised."""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

import std_decode
from std_decode.rounds.loop import Decoding
from tests.decode.observers import Streams, Watches
from tests.decode.seeds import seeds

PATCH = dict(draft_length=4, top_k_keys=6)
FAMILIES = ("qwen2_vl", "llava_onevision")


class Ends(StoppingCriteria):
    """Ends row r at its own length. Not transformers' own, so the batch goes in lockstep."""

    def __init__(self, prompt):
        self.prompt, self.calls = prompt, []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append(input_ids.clone())
        return torch.arange(len(input_ids)) * 4 + 3 + self.prompt <= input_ids.shape[1]


def same_calls(a, b):
    def same(x, y):
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    return len(a) == len(b) and all(map(same, a, b))


def ending(case, how, letters):
    """Options with which row r ends at its own time, and what it has been told by then."""
    told = case.generate()[:, case.inputs["input_ids"].shape[1] :].tolist()
    steps = [3 + 4 * row for row in range(len(told))]
    if how == "eos":
        ends = [row[step] for row, step in zip(told, steps)]
        return dict(eos_token_id=ends, pad_token_id=0)
    if how == "strings":
        words = [letters.decode(row[step - 1 : step + 1]) for row, step in zip(told, steps)]
        return dict(stop_strings=words, tokenizer=letters)
    return {}


@pytest.mark.parametrize("seed", seeds(2, ordinary=1))
@pytest.mark.parametrize("how", ["eos", "strings", "length"])
@pytest.mark.parametrize("rows", [2, 3, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batches_say_the_same(make_case, letters, family, rows, how, seed):
    """With an EOS id ended rows are padded; without one they go on until the last has ended."""
    case = make_case(family, seed, rows, max_new_tokens=21)
    options = ending(case, how, letters)
    for do_sample in (False, True):
        expected = case.generate(do_sample=do_sample, **options)
        for draft_length in (1, 4):
            with std_decode.patched(case.model, draft_length=draft_length, top_k_keys=6):
                got = case.generate(do_sample=do_sample, **options)
                assert std_decode.last_stats(case.model).mode == "ragged"
            case.assert_same_tokens(expected, got, do_sample=do_sample, **options)


@pytest.mark.parametrize("seed", seeds(2, ordinary=1))
@pytest.mark.parametrize("how", ["eos", "strings", "length", "criterion", "criterion+eos"])
@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_lockstep_batches_show_the_same_at_every_step(make_case, letters, family, rows, how, seed):
    """Scores, logits, streamer calls, processor calls and criterion calls, padding included."""
    case = make_case(family, seed, rows, max_new_tokens=21)
    prompt = case.inputs["input_ids"].shape[1]
    options = ending(case, how.split("+")[-1], letters)
    full = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
    for do_sample in (False, True):

        def run():
            processor, streamer, criterion = Watches(), Streams(), Ends(prompt)
            own = dict(stopping_criteria=StoppingCriteriaList([criterion]))
            result = case.generate(
                do_sample=do_sample,
                streamer=streamer,
                logits_processor=LogitsProcessorList([processor]),
                **(own if "criterion" in how else {}),
                **options,
                **full,
            )
            return result, processor.calls, streamer.calls, criterion.calls

        expected, *calls = run()
        with std_decode.patched(case.model, **PATCH):
            got, *ours = run()
            stats = std_decode.last_stats(case.model)
        assert stats.mode == "lockstep" and stats.rounds > 0
        assert "Watches" in stats.lockstep_because and "Watches" in str(stats)
        assert torch.equal(expected.sequences, got.sequences)
        assert all(map(same_calls, calls, ours))
        for name in ("scores", "logits"):
            assert len(expected[name]) == len(got[name])
            for plain, patched in zip(expected[name], got[name]):
                torch.testing.assert_close(plain, patched, atol=1e-4, rtol=1e-4)


def forced(monkeypatch, accepted):
    """Have the drafts of row r agree at most `accepted[r]` times a round."""
    plain = Decoding.draft

    def draft(self, logits, step):
        token = plain(self, logits, step)
        wrong = torch.tensor(accepted) <= step
        token = torch.where(wrong, (token + 1) % 100, token)
        self.rows.write(token[:, None], step)
        return token

    monkeypatch.setattr(Decoding, "draft", draft)


def test_a_row_does_not_wait_for_another_that_rejects(make_case, monkeypatch):
    """Each row takes as many passes as it would alone; in lockstep all take the most."""
    every = dict(draft_length=4, top_k_keys=10_000)
    case = make_case("qwen2_vl", 2, rows=3, max_new_tokens=26)
    expected = case.generate()
    forced(monkeypatch, [4, 4, 4])
    with std_decode.patched(case.model, **every):
        got = case.generate()
        assert std_decode.last_stats(case.model).rounds == 5  # 25 tokens after the first
    assert torch.equal(expected, got)
    forced(monkeypatch, [4, 2, 0])
    ends = [int(expected[row, -26 + step]) for row, step in enumerate((25, 12, 4))]
    case.options.update(eos_token_id=ends, pad_token_id=0)
    expected = case.generate()
    tokens = 1 + torch.isin(expected[:, -26:], torch.tensor(ends)).int().argmax(dim=1)
    assert tokens.tolist() == [26, 13, 5]
    with std_decode.patched(case.model, **every):
        got = case.generate()
        ragged = std_decode.last_stats(case.model)
    assert torch.equal(expected, got)
    # After the first: 25 tokens 5 at a time, 12 tokens 3 at a time, 4 one at a time.
    assert ragged.rounds == 5
    assert ragged.emitted == 26 + 13 + 5
    assert ragged.accepted == 4 * 5 + 4 * 2 + 0


def test_ragged_takes_fewer_rounds_than_lockstep(make_case):
    """On batches whose rows accept unequally by themselves."""
    rounds = {"ragged": 0, "lockstep": 0}
    for seed in range(3):
        case = make_case("qwen2_vl", seed, rows=4, max_new_tokens=30)
        expected = case.generate()
        watch = dict(logits_processor=LogitsProcessorList([Watches()]))
        for options in ({}, watch):
            with std_decode.patched(case.model, **PATCH):
                got = case.generate(**options)
                stats = std_decode.last_stats(case.model)
            case.assert_same_tokens(expected, got)
            rounds[stats.mode] += stats.rounds
    assert rounds["ragged"] < rounds["lockstep"]  # 76 and 84


TEXT_PROCESSORS = dict(repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=8)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    "processors",
    [
        TEXT_PROCESSORS,
        dict(bad_words_ids=[[9], [10, 11]], suppress_tokens=[12, 13], forced_eos_token_id=14),
        dict(exponential_decay_length_penalty=(4, 1.5), begin_suppress_tokens=[20, 21]),
        dict(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01),
        dict(typical_p=0.9, epsilon_cutoff=1e-3, eta_cutoff=1e-3, renormalize_logits=True),
        dict(top_h=0.4),
    ],
    ids=lambda value: "+".join(value),
)
def test_processors_get_each_rows_own_text(make_case, processors, do_sample):
    for seed in range(2):
        case = make_case("qwen2_vl", seed, rows=3, eos=True)
        case.options.update(do_sample=do_sample, **processors)
        expected = case.generate()
        with std_decode.patched(case.model, **PATCH):
            got = case.generate()
            assert std_decode.last_stats(case.model).mode == "ragged"
        case.assert_same_tokens(expected, got)


def test_drafts_go_through_each_rows_processors(make_case):
    """Without them, or with another row's text, hardly a draft would be accepted."""
    case = make_case("llama", 0, rows=3, max_new_tokens=26, **TEXT_PROCESSORS)
    with std_decode.patched(case.model, draft_length=4, top_k_keys=10_000):
        case.generate(suppress_tokens=list(range(7, 60)))
        stats = std_decode.last_stats(case.model)
    assert stats.mode == "ragged" and stats.accepted == stats.drafted > 0


@pytest.fixture
def drawing(monkeypatch):
    """Shapes of what a call draws for its steps, in order, and how many steps it looks ahead."""
    seen = SimpleNamespace(drawn=[], foreseen=0, most_ahead=0)
    plain, begin_round = torch.Tensor.exponential_, Decoding.begin_round

    def exponential_(tensor, lambd, generator):
        assert tensor.is_contiguous() and tensor.dtype == torch.float32
        if generator is torch.default_generator:
            seen.drawn.append(tuple(tensor.shape))
        else:
            seen.foreseen += 1
        return plain(tensor, lambd, generator=generator)

    def watched(decoding, gamma):
        begin_round(decoding, gamma)
        noise, rows = decoding.choose.noise, decoding.rows
        oldest = min(rows.at[row] for row in rows.going())
        ahead = max(noise.foreseen, decoding.step_limit) - oldest
        assert ahead <= noise.window and len(noise.states) <= noise.window + 1
        seen.most_ahead = max(seen.most_ahead, ahead)

    monkeypatch.setattr(torch.Tensor, "exponential_", exponential_)
    monkeypatch.setattr(Decoding, "begin_round", watched)
    return seen


@pytest.mark.parametrize("draft_length", [0, 4])
@pytest.mark.parametrize("eos", [False, True])
def test_noise_is_one_draw_a_step_and_the_generator_ends_where_it_should(
    make_case, drawing, eos, draft_length
):
    """Draws of one row, or of several steps at once, would be other numbers on a GPU."""
    case = make_case("qwen2_vl", 7, rows=3, eos=eos, do_sample=True, max_new_tokens=24)

    def twice():
        first, state = case.generate(), torch.get_rng_state()
        drawing.drawn, drawing.foreseen = [], 0
        second = case.model.generate(**case.inputs, **case.options)
        return first, state, second, torch.get_rng_state()

    expected = twice()
    with std_decode.patched(case.model, draft_length=draft_length, top_k_keys=6):
        got = twice()
        assert std_decode.last_stats(case.model).mode == "ragged"
    assert all(map(torch.equal, expected, got))
    steps = got[2].shape[1] - case.inputs["input_ids"].shape[1]
    assert drawing.drawn == [(3, 120)] * steps
    assert (drawing.foreseen > 0) == (
        draft_length > 0
    )  # without drafts each number costs one draw


def test_a_row_far_ahead_waits_when_sampling(make_case, drawing, monkeypatch):
    """So that the noise of the steps in between need not be kept."""
    monkeypatch.setattr("std_decode.generation.NOISE_WINDOW", 8)
    case = make_case("llama", 3, rows=2, do_sample=True, max_new_tokens=40)
    expected, state = case.generate(), torch.get_rng_state()
    forced(monkeypatch, [4, 0])
    with std_decode.patched(case.model, draft_length=4, top_k_keys=10_000):
        got = case.generate()
        stats = std_decode.last_stats(case.model)
    assert torch.equal(expected, got) and torch.equal(state, torch.get_rng_state())
    assert drawing.most_ahead == 8
    assert stats.calls["verify"] + stats.calls["dense"] == 39  # as many as the slower row takes


def test_a_row_that_has_ended_does_not_lead(make_case, letters, monkeypatch):
    """It might go further than the batch, by random numbers that are never drawn."""
    case = make_case("llama", 4, rows=2, do_sample=True, max_new_tokens=40)
    prompt = case.inputs["input_ids"].shape[1]
    told = case.generate()[:, prompt:].tolist()
    words = [letters.decode(told[0][2:4]), letters.decode(told[1][10:13])]
    options = dict(stop_strings=words, tokenizer=letters)
    expected, state = case.generate(**options), torch.get_rng_state()
    assert expected.shape[1] - prompt == 13
    forced(monkeypatch, [4, 1])
    plain, behind = Decoding.accept, []

    def accept(self, drafts, logits):
        kept = plain(self, drafts, logits)
        assert max(self.rows.at) <= self.choose.noise.drawn
        behind.append(self.rows.at[0] - self.rows.at[1])
        return kept

    monkeypatch.setattr(Decoding, "accept", accept)
    with std_decode.patched(case.model, draft_length=4, top_k_keys=10_000):
        got = case.generate(**options)
        assert std_decode.last_stats(case.model).mode == "ragged"
    assert torch.equal(expected, got) and torch.equal(state, torch.get_rng_state())
    assert max(behind) > 0  # as long as it has not ended it does


@pytest.mark.parametrize("rows", [1, 3])
def test_undefined_probabilities_are_refused_as_by_multinomial(make_case, rows):
    case = make_case("llama", 0, rows, do_sample=True)
    with torch.no_grad():
        case.model.lm_head.weight[5] = float("nan")
    with pytest.raises(RuntimeError) as plain:
        case.generate()
    with std_decode.patched(case.model, **PATCH), pytest.raises(RuntimeError) as ours:
        case.generate()
    assert str(plain.value) == str(ours.value)
    case.model.lm_head.weight.data[5] = 0
    expected = case.generate()
    with std_decode.patched(case.model, **PATCH):
        assert torch.equal(case.generate(), expected)


def test_the_host_reads_once_a_round(make_case, monkeypatch):
    """Everything else that decides is on the device."""
    case = make_case("qwen2_vl", 2, rows=3, max_new_tokens=25, do_sample=True)
    reads = []
    for name in ("tolist", "item", "__bool__", "__int__", "cpu", "numpy"):
        plain = getattr(torch.Tensor, name)

        def counted(tensor, *args, plain=plain, name=name, **kwargs):
            if "std_kernels" not in sys._getframe(1).f_code.co_filename:  # CPU ops may
                reads.append(name)
            return plain(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    with std_decode.patched(case.model, draft_length=4, top_k_keys=10_000):
        counts = []
        for most in (6, 26):
            reads.clear()
            case.generate(max_new_tokens=most)
            counts.append(len(reads))
            rounds = std_decode.last_stats(case.model).rounds
    assert rounds == 5 and counts[1] - counts[0] == 4


@pytest.mark.parametrize("mode", ["ragged", "lockstep"])
def test_no_position_beyond_what_plain_decoding_reads(mode):
    """A table of learned positions that the text just fills."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=120, n_embd=64, n_layer=2, n_head=4, eos_token_id=None)
    config = GPT2Config(**sizes, n_positions=123, initializer_range=0.2)
    model = GPT2LMHeadModel(config).eval()
    inputs = dict(input_ids=torch.randint(7, 99, (3, 100)), max_new_tokens=24, pad_token_id=0)
    if mode == "lockstep":
        inputs["logits_processor"] = LogitsProcessorList([Watches()])
    expected = model.generate(**inputs, do_sample=False)
    for top_k_keys in (2, 100):
        with std_decode.patched(model, draft_length=4, top_k_keys=top_k_keys):
            assert torch.equal(model.generate(**inputs, do_sample=False), expected)
            assert std_decode.last_stats(model).mode == mode

"""Sampled calls beside others that draw random numbers: no number is ever used twice.

The LM head is zero, so all tokens are equally likely, and a token is the place of the smallest
number that its step drew: the tokens show the random numbers.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
import torch

import std_decode
from std_decode.rounds import tensor_parallel
from std_decode.rounds.loop import Decoding
from std_decode.rounds.noise import Noise, upcoming_noise
from tests.decode.conftest import VOCABULARY

LOCKSTEP = dict(return_dict_in_generate=True, output_scores=True)
MODES = {"ragged": {}, "lockstep": LOCKSTEP}


@pytest.fixture
def make_case(make_case):
    def make(rows=1, **options):
        case = make_case("llama", 1, rows, do_sample=True, **options)
        with torch.no_grad():
            case.model.lm_head.weight.zero_()
        return case

    return make


def tokens_of(case, **options):
    """Without a seed of its own. Tokens ``[B, steps]``."""
    told = case.model.generate(**case.inputs, **{**case.options, **options})
    return getattr(told, "sequences", told)[:, case.inputs["input_ids"].shape[1] :]


class Stream:
    """The process-wide generator's numbers in the order in which they were drawn, and by whom.

    Between any two draws of a call, foreseen ones included, `other` may draw, too.
    """

    def __init__(self, monkeypatch, other):
        self.draws, self.intrusions, self.other = [], 0, other
        self.exponential = torch.Tensor.exponential_
        self.multinomial = torch.multinomial
        drawn = lambda *args, **kwargs: self.drawn(*args, **kwargs)  # noqa: E731  (a method)
        monkeypatch.setattr(torch.Tensor, "exponential_", drawn)
        monkeypatch.setattr(torch, "multinomial", self.choose)
        self.points = count()
        self.start = torch.get_rng_state()

    def intrude(self):
        if self.other(next(self.points)):
            self.intrusions += 1
            with ThreadPoolExecutor(1) as pool:
                self.draws.append(("other", 7, pool.submit(torch.rand, 7).result()))

    def drawn(self, tensor, lambd, generator):
        self.intrude()
        numbers = self.exponential(tensor, lambd, generator=generator)
        if generator is torch.default_generator:
            self.draws.append(("call", tuple(tensor.shape), numbers.clone()))
        self.intrude()
        return numbers

    def choose(self, probabilities, num_samples):
        self.intrude()
        tokens = self.multinomial(probabilities, num_samples)
        self.draws.append(("generate", probabilities.clone(), tokens.clone()))
        return tokens

    def of_call(self, least=0):
        """The token that each step's numbers choose, ``[B, steps]``, of those from `least` on."""
        called = [numbers for who, _, numbers in self.draws if who == "call"]
        smallest = [least + numbers[:, least:].argmin(-1) for numbers in called]
        chosen = [tokens[:, 0] for who, _, tokens in self.draws if who == "generate"]
        return torch.stack(smallest + chosen, dim=1)

    def is_one(self):
        """Whether all numbers come of one generator that has only ever gone forward."""
        end = torch.get_rng_state()
        torch.set_rng_state(self.start)
        again = {
            "other": torch.rand,
            "call": lambda shape: self.exponential(torch.empty(shape), 1),
            "generate": lambda probabilities: self.multinomial(probabilities, 1),
        }
        same = [torch.equal(again[who](what), numbers) for who, what, numbers in self.draws]
        return all(same) and torch.equal(end, torch.get_rng_state())


ALWAYS, NEVER = (lambda point: True), (lambda point: False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("draft_length", [0, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_nobody_else_draws(make_case, monkeypatch, mode, draft_length, rows):
    case = make_case(rows, max_new_tokens=14)
    with std_decode.patched(case.model, draft_length=draft_length, top_k_keys=8):
        stream = Stream(monkeypatch, NEVER)
        tokens = tokens_of(case, **MODES[mode])
        stats = std_decode.last_stats(case.model)
    assert stats.mode == mode and stats.accepted == stats.drafted  # each round foresees right
    assert torch.equal(tokens, stream.of_call())
    assert len(stream.draws) == 14 and stream.is_one()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 3])
def test_another_draws_at_every_point(make_case, monkeypatch, mode, rows):
    case = make_case(rows, max_new_tokens=14)
    for draft_length in (0, 1, 4):
        with (
            std_decode.patched(case.model, draft_length=draft_length, top_k_keys=8),
            monkeypatch.context() as patch,
        ):
            stream = Stream(patch, ALWAYS)
            tokens = tokens_of(case, **MODES[mode])
        assert stream.intrusions >= 14
        assert torch.equal(tokens, stream.of_call()[:, :14]) and stream.is_one()


@pytest.mark.parametrize("mode", MODES)
def test_another_draws_once(make_case, monkeypatch, mode):
    """At any of the points there are."""
    case, points = make_case(2, max_new_tokens=11), count()
    with std_decode.patched(case.model, draft_length=4, top_k_keys=8):
        for point in points:
            with monkeypatch.context() as patch:
                stream = Stream(patch, point.__eq__)
                tokens = tokens_of(case, **MODES[mode])
            assert torch.equal(tokens, stream.of_call()[:, :11]) and stream.is_one(), point
            stats = std_decode.last_stats(case.model)
            if not stream.intrusions:
                break
            # At most one round's drafts go by numbers that another has drawn.
            assert stats.drafted - stats.accepted <= 2 * 4, point
    assert point > 20


def wrong(monkeypatch, accepted):
    """Have the drafts of row r be others after `accepted[r]` in a round: the last two swapped."""
    plain = Decoding.draft

    def draft(self, logits, step):
        token = plain(self, logits, step)
        swapped = (VOCABULARY - 2 + VOCABULARY - 1 - token) % VOCABULARY
        token = torch.where(torch.tensor(accepted) <= step, swapped, token)
        self.rows.write(token[:, None], step)
        return token

    monkeypatch.setattr(Decoding, "draft", draft)


@pytest.mark.parametrize("accepted", [(4, 0), (2, 1), (1, 1)])
def test_another_draws_where_drafts_are_rejected(make_case, monkeypatch, accepted):
    """A row that is behind chooses by the numbers of its own step, and a second choice by those
    alone that have been drawn, of two tokens, so that it often agrees with more drafts."""
    case = make_case(2, max_new_tokens=14, suppress_tokens=list(range(VOCABULARY - 2)))
    wrong(monkeypatch, accepted)
    with std_decode.patched(case.model, draft_length=4, top_k_keys=8):
        for point in range(0, 40, 3):
            with monkeypatch.context() as patch:
                stream = Stream(patch, point.__eq__)
                tokens = tokens_of(case)
            expected = stream.of_call(VOCABULARY - 2)[:, :14]
            assert torch.equal(tokens, expected) and stream.is_one(), point


def test_a_second_choice_is_made_of_the_same_text(make_case, monkeypatch):
    """Which the first has written over from the first rejected draft on."""
    case, seen = make_case(1, max_new_tokens=12, repetition_penalty=1.1), []
    wrong(monkeypatch, (1,))
    plain = Decoding.keep

    def keep(self, drafts, logits):
        rows = self.rows
        end = rows.prompt + rows.at[0] + drafts.shape[1]
        seen.append((rows.at[0], rows.text[0, :end].tolist()))
        return plain(self, drafts, logits)

    monkeypatch.setattr(Decoding, "keep", keep)
    with std_decode.patched(case.model, draft_length=4, top_k_keys=8):
        for point in range(30):
            with monkeypatch.context() as patch:
                Stream(patch, point.__eq__)
                tokens_of(case)
    twice = [(one, other) for one, other in zip(seen, seen[1:]) if one[0] == other[0] > 0]
    assert len(twice) > 3 and all(one == other for one, other in twice)


def test_an_exception_leaves_the_numbers_of_the_steps_that_were_taken(make_case, monkeypatch):
    class Boom(Exception):
        pass

    case, rows, plain = make_case(2, max_new_tokens=30), None, Decoding.draft

    def draft(self, logits, step):
        nonlocal rows
        rows = self.rows
        if max(rows.at) > 8 and step == 2:
            raise Boom
        return plain(self, logits, step)

    monkeypatch.setattr(Decoding, "draft", draft)
    torch.manual_seed(2)
    with std_decode.patched(case.model, draft_length=4, top_k_keys=8), pytest.raises(Boom):
        tokens_of(case)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    for _ in range(max(rows.at)):
        torch.empty(2, VOCABULARY).exponential_(1)
    assert torch.equal(state, torch.get_rng_state())


def test_looking_ahead_draws_nothing():
    """Not even for the time being: another thread could draw the same then."""
    probabilities, states = torch.full((1, 50), 0.02), []
    plain = torch.Tensor.exponential_

    def exponential_(tensor, lambd, generator):
        plain(tensor, lambd, generator=generator)
        states.append(torch.get_rng_state())
        return tensor

    noise = Noise(1, 50, 8, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "exponential_", exponential_)
        before = torch.get_rng_state()
        upcoming_noise(probabilities, 3)
        noise.foresee(3)
    assert len(states) == 6 and all(torch.equal(before, state) for state in states)


def test_ranks_do_not_put_back_the_generator_of_the_first(monkeypatch):
    """It tells its state, and another thread draws meanwhile."""

    def tell(own):
        torch.rand(3)
        return own.clone()

    monkeypatch.setattr(tensor_parallel, "_broadcast", lambda model: tell)
    torch.manual_seed(0)
    torch.rand(3)
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    tensor_parallel.share_random_numbers(None, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), expected)
    told = torch.Generator().manual_seed(5).get_state()
    monkeypatch.setattr(tensor_parallel, "_broadcast", lambda model: lambda own: told)
    tensor_parallel.share_random_numbers(None, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), told)


def repeats(answers, run=5):
    """Answers that share `run` tokens in a row, which by chance are one pair in 10^7."""
    first, found = {}, set()
    for answer, tokens in enumerate(answers):
        for step in range(len(tokens) - run + 1):
            if first.setdefault(tuple(tokens[step : step + run]), answer) != answer:
                found.add(answer)
    return found


def test_a_repeated_run_is_seen():
    assert repeats([range(9), range(20, 29), (1, 4, 5, 6, 7, 8)]) == {2}


@pytest.mark.parametrize("threads", [4, 8, 16])
def test_threads(make_case, threads):
    """Calls of both modes and all lengths, unpatched ones of another model, and bare draws."""
    new = dict(max_new_tokens=16)
    plain, start = make_case(**new), threading.Barrier(threads)
    cases = {length: make_case(**new) for length in (0, 4, 8, "auto")}
    for length, case in cases.items():
        std_decode.patch(case.model, draft_length=length, top_k_keys=8)

    def draw():
        return [int(torch.empty(1, VOCABULARY).exponential_(1).argmin()) for _ in range(16)]

    calls = [lambda: tokens_of(plain)[0].tolist(), draw]
    for case in cases.values():
        for mode in MODES.values():
            calls.append(lambda case=case, mode=mode: tokens_of(case, **mode)[0].tolist())
    torch.manual_seed(threads)
    with ThreadPoolExecutor(threads, initializer=start.wait) as pool:
        answers = [pool.submit(calls[i % len(calls)]) for i in range(5 * len(calls))]
        answers = [answer.result() for answer in answers]
    assert {len(answer) for answer in answers} == {16}
    assert not repeats(answers)

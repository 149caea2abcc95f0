"""What draft_length="auto" chooses on machines that are made up, and that no choice shows."""

import random
import threading
from collections import deque

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import std_decode
from std_decode.costs.workload import Workload, expected_tokens
from std_decode.passes import engine
from std_decode.rounds import policy as policies
from std_decode.rounds.policy import COMPILED_LENGTHS, FEW, LENGTHS, DraftLength, Policy
from tests.decode.observers import Watches

WORKLOAD = Workload(
    weight_bytes=1e9, parameters=5e8, kv_bytes=1e4, batch=1, context=20_000, draft_keys=1000
)


class Machine:
    """A dense step takes 1, a draft `draft` of that, each more token to verify `more`."""

    def __init__(self, draft, more=0.01, first_use=0):
        self.draft, self.more, self.random = draft, more, random.Random(0)
        self.first_use = {length: first_use for length in (0, *LENGTHS)}

    def agreeing(self, acceptance, gamma):
        agreed = 0
        while agreed < gamma and self.random.random() < acceptance:
            agreed += 1
        return agreed

    def run(self, length, acceptance, tokens):
        """Seconds for so many tokens, and the draft lengths chosen."""
        seconds, chosen = 0.0, []
        while tokens > 0:
            gamma = length.choose([0])
            agreed = self.agreeing(acceptance, gamma)
            drafting, rest = gamma * self.draft, 1 + self.more * gamma
            first = self.first_use[gamma] > 0
            self.first_use[gamma] -= first
            rest += 100 * first
            length.observe(gamma, {0: agreed}, drafting, rest, agreed + 1, first)
            seconds += drafting + rest - 100 * first
            tokens -= agreed + 1
            chosen.append(gamma)
        return seconds, chosen


def best(draft, acceptance, more=0.01):
    """Seconds a token of the best draft length there is."""
    return min(
        [1.0] + [(g * draft + 1 + more * g) / expected_tokens(acceptance, g) for g in range(1, 33)]
    )


@pytest.mark.parametrize("draft", [0.1, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("acceptance", [0.2, 0.6, 0.9, 0.98])
@pytest.mark.parametrize("first_use", [0, 2])  # rounds of a length that tell nothing of its time
def test_it_comes_close_to_the_best_length_there_is(draft, acceptance, first_use):
    """Where drafts gain much; where they gain little or lose, little is lost at the most."""
    length = Policy().begin(WORKLOAD, 1)
    seconds, chosen = Machine(draft, first_use=first_use).run(length, acceptance, 3000)
    assert chosen[:FEW] == [0] * FEW
    ideal = 3000 * best(draft, acceptance)
    assert seconds < (1.1 * ideal if ideal < 2100 else 3000 * (1 + policies.RISK))


def test_it_follows_a_text_that_changes():
    """From drafts that agree to drafts that do not, and in time to some that do."""
    length, machine = Policy().begin(WORKLOAD, 1), Machine(0.1)
    for acceptance in (0.95, 0.1, 0.8):
        machine.run(length, acceptance, 2500)
        seconds, _ = machine.run(length, acceptance, 500)
        assert seconds < 1.15 * 500 * best(0.1, acceptance), acceptance


def test_where_nothing_pays_little_is_lost():
    length = Policy().begin(WORKLOAD, 1)
    seconds, chosen = Machine(1.2).run(length, 0.5, 20_000)
    assert seconds <= 20_000 * (1 + policies.RISK) and chosen.count(0) > 0.98 * len(chosen)


def test_the_next_call_begins_with_what_was_learnt():
    policy, machine = Policy(), Machine(0.2)
    length = policy.begin(WORKLOAD, 1)
    machine.run(length, 0.9, 300)
    length.end()
    assert 0.8 < policy.acceptance < 0.97
    assert policy.begin(WORKLOAD, 1).choose([0]) >= 4


def test_a_very_long_dense_text_does_not_wear_out_what_is_known():
    policy = Policy()
    length = policy.begin(WORKLOAD, 2)
    for _ in range(200_000):  # without a trial, as where no draft length could ever pay
        length.observe(0, {}, 0.0, 1.0, 1.0)
    length.end()
    assert policy.acceptance == pytest.approx(policies.SUPPOSED)


def test_other_threads_may_learn_meanwhile():
    times = policies.Times()
    times.dense.append(1.0)
    stop = threading.Event()

    def learn():
        while not stop.is_set():
            times.verify.clear()
            for tokens in range(2, 40):
                times.verify[tokens] = deque([1.0])

    other = threading.Thread(target=learn)
    other.start()
    try:
        for _ in range(3000):
            assert times.verify_seconds([64])[0] >= 1.0
    finally:
        stop.set()
        other.join()


@pytest.fixture
def every_length(monkeypatch):
    """Has each call go through all lengths that it may choose, and none, again and again."""
    plain = DraftLength.__init__

    def begin(self, *args):
        plain(self, *args)
        self.turn = 0

    def choose(self, rows, found=None):
        self.turn += 1
        lengths = (0, *self.policy.lengths)
        return self.settle(lengths[self.turn % len(lengths)])

    monkeypatch.setattr(DraftLength, "__init__", begin)
    monkeypatch.setattr(DraftLength, "choose", choose)


@pytest.mark.parametrize("mode", ["ragged", "lockstep"])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_no_choice_shows_in_the_tokens(make_case, every_length, mode, rows, do_sample):
    case = make_case("qwen2_vl", 3, rows, do_sample=do_sample, max_new_tokens=60)
    watch = dict(logits_processor=[Watches()]) if mode == "lockstep" else {}
    expected = case.generate(**watch)
    with std_decode.patched(case.model, top_k_keys=8):
        got = case.generate(**watch)
        stats = std_decode.last_stats(case.model)
    case.assert_same_tokens(expected, got)
    assert stats.mode == mode and len(set(stats.draft_lengths)) > 4


@pytest.mark.parametrize("mode", ["ragged", "lockstep"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_nor_do_random_choices_where_rows_end_apart(make_case, monkeypatch, mode, do_sample):
    dice, chosen = random.Random(0), set()
    watch = dict(logits_processor=[Watches()] if mode == "lockstep" else [])

    def choose(self, rows, found=None):
        gamma = self.settle(dice.choice((0, 1, 2, 4, max(LENGTHS))))
        chosen.add(gamma)
        return gamma

    monkeypatch.setattr(DraftLength, "choose", choose)
    for seed in range(4):
        case = make_case("llama", seed, 3, eos=True, do_sample=do_sample, max_new_tokens=40)
        expected = case.generate(**watch)
        with std_decode.patched(case.model, top_k_keys=8):
            got = case.generate(**watch)
            assert std_decode.last_stats(case.model).mode == mode
        case.assert_same_tokens(expected, got)
    assert chosen == {0, 1, 2, 4, max(LENGTHS)}


def test_each_length_is_captured_once(make_case, recording, every_length):
    """As many graphs live at a time as there are lengths to choose from."""
    case = make_case("llama", 1, max_new_tokens=120)
    expected = case.generate()
    with std_decode.patched(case.model, top_k_keys=8):
        for call in range(5):
            case.assert_same_tokens(expected, case.generate())
            stats = std_decode.last_stats(case.model)
    passes = sum(stats.calls[stage] for stage in ("draft", "verify", "dense"))
    assert stats.graph_captures == 0 and stats.graph_replays == passes
    assert recording.captures == 2 + len(LENGTHS)  # draft, dense step, verifications


@pytest.fixture
def compiled(uncaptured, monkeypatch):
    """Counts what is compiled, of passes that count as captured."""
    counter = CompileCounter()
    monkeypatch.setattr(
        engine,
        "compile_pass",
        lambda forward: torch.compile(forward, fullgraph=True, dynamic=False, backend=counter),
    )
    return counter


def test_few_lengths_are_compiled(make_case, compiled, every_length):
    """Each takes a minute or so. Completing a cache that is handed back compiles nothing."""
    case = make_case("llama", 1, rows=3, eos=True, max_new_tokens=50)
    expected = case.generate()
    with std_decode.patched(case.model, top_k_keys=8, compile=True):
        got = case.generate(return_dict_in_generate=True)
        assert set(std_decode.last_stats(case.model).draft_lengths) == set(COMPILED_LENGTHS)
    case.assert_same_tokens(expected, got.sequences)
    assert compiled.frame_count == 2 + len(COMPILED_LENGTHS)


def test_more_shapes_than_pytorch_compiles_by_itself(make_case, compiled):
    case = make_case("llama", 1, max_new_tokens=12)
    expected = case.generate()
    for gamma in range(1, 10):
        with std_decode.patched(case.model, draft_length=gamma, top_k_keys=8, compile=True):
            case.assert_same_tokens(expected, case.generate())
    assert compiled.frame_count > torch._dynamo.config.recompile_limit

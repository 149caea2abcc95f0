"""Processors that remember earlier calls: drafts go through copies, the caller's see nothing."""

import copy
import sys
import threading
from types import ModuleType

import pytest
import torch
from torch import nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

import std_decode
from std_decode.rounds.processors import _STATE
from tests.decode.conftest import VOCABULARY

ALL_KEYS = dict(draft_length=4, top_k_keys=10_000)  # drafts read all that the dense pass reads


class Grammar(LogitsProcessor):
    """Allows only tokens of the class that follows from how many it accepted, and their sum.

    It learns of one token a call, as the processors of grammar libraries do, and notes its calls.
    """

    def __init__(self):
        self.total, self.accepted, self.calls = [], None, []

    def __call__(self, input_ids, scores):
        self.calls.append(input_ids.clone())
        if self.accepted is None:
            self.accepted = torch.zeros(len(input_ids), dtype=torch.long)
            self.total = [0] * len(input_ids)
        else:
            self.accepted += 1  # in place
            for row, token in enumerate(input_ids[:, -1].tolist()):
                self.total[row] += token
        state = 3 * self.accepted + torch.tensor(self.total)
        forbidden = torch.arange(scores.shape[1]) % 7 != state[:, None] % 7
        return scores.masked_fill_(forbidden, float("-inf"))


class Cloned(Grammar):
    def clone(self):
        other = Cloned()
        other.accepted = None if self.accepted is None else self.accepted.clone()
        other.total = list(self.total)
        return other


class DeeplyCloned(Grammar):
    def clone(self):
        return copy.deepcopy(self)


class OfModule(DeeplyCloned, nn.Module):
    """Its state is a module's buffer, and parameters that it only reads."""

    def __init__(self):
        nn.Module.__init__(self)
        Grammar.__init__(self)
        del self.accepted
        self.register_buffer("accepted", None)
        self.unused = nn.Linear(3, 3)


def observed(case, make, **options):
    """What a call tells, and what its processor saw."""
    processor = make()
    told = case.generate(logits_processor=LogitsProcessorList([processor]), **options)
    return told, processor.calls


def same_as_unpatched(case, make, patch=ALL_KEYS, **options):
    """The stats of a patched call that told and showed the same as an unpatched one."""
    expected, calls = observed(case, make, **options)
    with std_decode.patched(case.model, **patch):
        got, ours = observed(case, make, **options)
        stats = std_decode.last_stats(case.model)
    assert torch.equal(expected, got)
    assert len(calls) == len(ours) and all(map(torch.equal, calls, ours))
    assert stats.mode == "lockstep" and stats.drafted > 0
    return stats


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("make", [Cloned, DeeplyCloned, OfModule])
def test_drafts_go_through_a_copy(make_case, make, rows, do_sample):
    case = make_case("llama", 3, rows, do_sample=do_sample, max_new_tokens=26)
    stats = same_as_unpatched(case, make, repetition_penalty=1.2)
    assert stats.accepted == stats.drafted
    without = same_as_unpatched(case, Grammar, repetition_penalty=1.2)
    assert without.accepted < without.drafted / 2


def test_rows_that_end_go_on_in_the_copy_as_in_the_original(make_case):
    case = make_case("llama", 3, 3, max_new_tokens=26)
    told, _ = observed(case, Cloned)
    told = told[:, case.inputs["input_ids"].shape[1] :]
    ends = dict(eos_token_id=[int(told[0, 3]), int(told[1, 9])], pad_token_id=0)
    stats = same_as_unpatched(case, Cloned, **ends)
    assert stats.rounds == 5  # 25 tokens after the first, 5 at a time


class Unclonable(Grammar):
    """Copying it would show: it may keep what cannot be copied, or share what a call changes."""

    copies = 0

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.file = open(__file__, encoding="utf-8")

    def __call__(self, input_ids, scores):
        with self.lock:
            self.file.readline()
            return super().__call__(input_ids, scores)

    def __deepcopy__(self, memo):
        type(self).copies += 1
        raise TypeError


class Shared(Grammar):
    """Its copies are not its own: they count in one place."""

    count = [0]

    def __call__(self, input_ids, scores):
        self.count[0] += 1
        return super().__call__(input_ids, scores + torch.rand(()) * (self.count[0] % 3))


class CloneRaises(Grammar):
    def clone(self):
        raise OSError("no room for another automaton")


class CloneIsItself(Grammar):
    def clone(self):
        return self


class CloneWantsMore(Grammar):
    def clone(self, room):
        return copy.deepcopy(self)


class CloneFails(Cloned):
    calls_left = 2

    def clone(self):
        other = super().clone()
        other.left = self.calls_left
        other.__class__ = Failing
        return other


class CloneFailsAtOnce(CloneFails):
    calls_left = 0


class Failing(Cloned):
    def __call__(self, input_ids, scores):
        scores = super().__call__(input_ids, scores)
        self.left -= 1
        assert self.left >= 0, "the token does not fit the grammar"
        return scores.zero_()


CLONES = [CloneRaises, CloneIsItself, CloneWantsMore, CloneFails, CloneFailsAtOnce]


@pytest.mark.parametrize("make", [Grammar, Unclonable, Shared, *CLONES])
@pytest.mark.parametrize("do_sample", [False, True])
def test_without_a_copy_of_its_own_drafts_do_without(make_case, make, do_sample):
    case = make_case("llama", 2, 2, do_sample=do_sample, max_new_tokens=20)
    Shared.count[0] = Unclonable.copies = 0

    def fresh():
        Shared.count[0] = 0
        return make()

    stats = same_as_unpatched(case, fresh)
    assert stats.accepted < stats.drafted and Unclonable.copies == 0


def test_one_that_fails_does_not_cost_the_others_their_copies(make_case):
    class Both(Cloned):
        def clone(self):
            self.clones = getattr(self, "clones", 0) + 1
            return super().clone()

    case = make_case("llama", 2, max_new_tokens=20)
    good, bad = Both(), CloneRaises()
    with std_decode.patched(case.model, **ALL_KEYS):
        case.generate(logits_processor=LogitsProcessorList([bad, good]))
        stats = std_decode.last_stats(case.model)
    assert good.clones == stats.rounds > 1


def test_nothing_is_copied_where_nothing_is_drafted(make_case):
    copies = []

    class Counted(Cloned):
        def clone(self):
            copies.append(self)
            return super().clone()

    case = make_case("llama", 2, max_new_tokens=20)
    for draft_length, expected in ((0, 0), (4, 4)):
        with std_decode.patched(case.model, draft_length=draft_length, top_k_keys=10_000):
            observed(case, Counted)
            assert std_decode.last_stats(case.model).mode == "lockstep"
        assert len(copies) == expected  # one a round


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        WatermarkingConfig(bias=4.0, context_width=1),
        WatermarkingConfig(bias=4.0, context_width=2, seeding_scheme="selfhash"),
        SynthIDTextWatermarkingConfig(ngram_len=3, keys=[5, 9, 11], context_history_size=8),
    ],
    ids=["lefthash", "selfhash", "synthid"],
)
def test_watermarks(make_case, config, do_sample):
    case = make_case("llama", 1, 2, do_sample=do_sample, max_new_tokens=26)
    expected, state = case.generate(watermarking_config=config), torch.get_rng_state()
    assert not torch.equal(expected, case.generate())
    with std_decode.patched(case.model, **ALL_KEYS):
        got = case.generate(watermarking_config=config)
        stats = std_decode.last_stats(case.model)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(expected, got)
    assert stats.mode == "lockstep" and stats.accepted == stats.drafted > 0


@pytest.fixture
def xgrammar(monkeypatch):
    """A class of its name that keeps its state as the library's own does."""

    class Matcher:
        def __init__(self, state=0):
            self.state = state

        def fork(self):
            return Matcher(self.state)

        def accept_token(self, token):
            self.state += token + 3

        def __deepcopy__(self, memo):
            raise TypeError("a C++ object")

    class Processor(LogitsProcessor):
        def __init__(self):
            self.matchers, self.token_bitmask, self.prefilled, self.calls = [], None, False, []

        def __call__(self, input_ids, scores):
            self.calls.append(input_ids.clone())
            if not self.matchers:
                self.matchers = [Matcher() for _ in input_ids]
                self.token_bitmask = torch.zeros(len(input_ids), VOCABULARY, dtype=torch.bool)
            for row, matcher in enumerate(self.matchers):
                if self.prefilled:
                    matcher.accept_token(int(input_ids[row, -1]))
                self.token_bitmask[row] = torch.arange(VOCABULARY) % 7 != matcher.state % 7
            self.prefilled = True
            return scores.masked_fill_(self.token_bitmask, float("-inf"))

        def __copy__(self):
            other = Processor()
            vars(other).update(vars(self), calls=[])
            return other

    Processor.__module__, Processor.__qualname__ = "xgrammar.contrib.hf", "LogitsProcessor"
    return Processor


@pytest.mark.parametrize("rows", [1, 3])
def test_xgrammar(make_case, xgrammar, rows):
    case = make_case("llama", 3, rows, max_new_tokens=26)
    stats = same_as_unpatched(case, xgrammar)
    assert stats.accepted == stats.drafted
    for seed in range(2):
        case = make_case("llama", seed, rows, max_new_tokens=40)
        stats = same_as_unpatched(case, xgrammar, dict(draft_length=4, top_k_keys=2))
    assert 0 < stats.accepted < stats.drafted


def test_xgrammar_itself(make_case, letters):
    xgrammar = pytest.importorskip("xgrammar")
    from xgrammar.contrib.hf import LogitsProcessor as Constrained

    words = [letters.decode([token]) for token in range(VOCABULARY)]
    info = xgrammar.TokenizerInfo(words, vocab_size=VOCABULARY, stop_token_ids=[1])
    grammar = xgrammar.GrammarCompiler(info).compile_regex("([h-j][k-m][n-p]+[q-s])+")
    case = make_case("llama", 3, 2, max_new_tokens=26)

    def tell():
        return case.generate(logits_processor=LogitsProcessorList([Constrained(grammar)]))

    expected = tell()
    with std_decode.patched(case.model, **ALL_KEYS):
        got = tell()
        stats = std_decode.last_stats(case.model)
    assert torch.equal(expected, got)
    assert stats.accepted == stats.drafted > 0


def test_the_listed_classes_of_transformers_are_there():
    for name in _STATE:
        module, _, of_class = name.rpartition(".")
        if module.startswith("transformers."):
            assert isinstance(sys.modules[module], ModuleType)
            assert hasattr(sys.modules[module], of_class)

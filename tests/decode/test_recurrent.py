"""Models whose layers keep a state: it is taken back with every draft that is rejected."""

import copy
import pickle

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import std_decode
from std_decode.model.cache import SparseToDenseCache
from std_decode.model.recurrent import RecurrentLayer, recurrent_modules
from std_decode.passes.engine import Engine
from std_decode.rounds.loop import Decoding
from tests.decode.families import FAMILIES
from tests.decode.test_second_question import PATCH, ask_twice

EVERY_KEY = 10_000
HYBRIDS = [name for name, family in FAMILIES.items() if "gated delta" in family.special]
OTHERS = [
    pytest.param(name, marks=[] if name == "qwen3_next" else pytest.mark.slow) for name in HYBRIDS
]


class Never(StoppingCriteria):
    """Does nothing, but is not one of transformers' own: the batch goes in lockstep."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


LOCKSTEP = dict(stopping_criteria=StoppingCriteriaList([Never()]))


def states_of(cache):
    """The window and the state of each layer that has them."""
    found = [x for x in cache.layers if hasattr(x, "recurrent_states")]
    assert found and all(x.has_previous_state[0] and not x.record_past for x in found)
    return [(x.conv_states[0], x.recurrent_states[0]) for x in found]


def assert_same_states(plain, ours):
    for expected, got in zip(states_of(plain), states_of(ours), strict=True):
        for a, b in zip(expected, got, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            scale = float(a.abs().max())
            assert float((a - b).abs().max()) <= 1e-4 * scale


@pytest.mark.parametrize("mode", ["ragged", "lockstep"])
@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 6))]
)
def test_same_tokens_as_unpatched(make_case, family, mode, seed):
    """A left-padded batch whose rows end at different steps, greedy and sampled."""
    options = LOCKSTEP if mode == "lockstep" else {}
    case = make_case(family, seed, rows=3, eos=True, **options)
    ties = set()
    for do_sample in (False, True):
        expected = case.generate(do_sample=do_sample)
        for draft_length, top_k_keys in ((0, 4), (1, 4), (4, 4), (7, EVERY_KEY)):
            with std_decode.patched(case.model, draft_length=draft_length, top_k_keys=top_k_keys):
                got = case.generate(do_sample=do_sample)
                stats = std_decode.last_stats(case.model)
            assert stats.fallback is None and stats.mode == mode
            ties |= case.assert_same_tokens(expected, got, do_sample=do_sample)
    assert len(ties) <= 1


def test_every_draft_is_accepted_when_every_key_is_selected(make_case):
    for rows in (1, 3):
        case = make_case("qwen3_next", 0, rows)
        with std_decode.patched(case.model, draft_length=4, top_k_keys=EVERY_KEY):
            case.generate()
            stats = std_decode.last_stats(case.model)
        assert stats.draft_lengths == [4, 4, 4] and stats.accepted == stats.drafted == 12 * rows


@pytest.mark.parametrize("drafts", ["rejected", "random"])
def test_whatever_is_drafted(make_case, monkeypatch, drafts):
    """Every draft rejected; and each right or wrong by chance, so that rows get apart."""
    case = make_case("olmo_hybrid", 1, rows=3, max_new_tokens=40)
    expected = case.generate()
    told, generator = expected[:, case.inputs["input_ids"].shape[1] :], torch.Generator()
    generator.manual_seed(0)

    def draft(self, logits, step):
        at = (self.rows.steps + step).clamp(max=told.shape[1] - 1)[:, None]
        right = told.gather(1, at)[:, 0]
        wrong = drafts == "rejected" or torch.rand(len(right), generator=generator) < 0.3
        token = torch.where(torch.as_tensor(wrong), (right + 1) % 99, right)
        self.rows.write(token[:, None], step)
        return token

    monkeypatch.setattr(Decoding, "draft", draft)
    with std_decode.patched(case.model, draft_length=4, top_k_keys=4):
        got = case.generate()
        stats = std_decode.last_stats(case.model)
    case.assert_same_tokens(expected, got)
    assert (stats.accepted == 0) == (drafts == "rejected") and stats.accepted < stats.drafted


@pytest.mark.parametrize(
    "rows, given, mode",
    [
        (1, "everything", "ragged"),
        (3, "everything", "ragged"),
        (3, "new tokens", "ragged"),
        (3, "everything", "lockstep"),
    ],
)
@pytest.mark.parametrize("family", OTHERS)
def test_a_second_question_goes_on_from_the_state(make_case, family, rows, given, mode):
    case = make_case(family, 1, rows, eos=rows > 1, **(LOCKSTEP if mode == "lockstep" else {}))
    *expected, plain = ask_twice(case, given)
    with std_decode.patched(case.model, **PATCH):
        *got, ours = ask_twice(case, given)
        stats = std_decode.last_stats(case.model)
    assert all(map(torch.equal, expected, got))
    assert stats.fallback is None and stats.rounds > 0 and stats.reused_tokens > 0
    assert stats.mode == mode
    assert_same_states(plain, ours)


@pytest.mark.parametrize("tokens", [100, pytest.param(30_000, marks=pytest.mark.slow)])
def test_the_state_after_many_rounds(make_case, tokens):
    case = make_case("qwen3_next", 2, max_new_tokens=tokens)
    case.model.config.max_position_embeddings = 2 * tokens
    plain = case.generate(return_dict_in_generate=True)
    with std_decode.patched(case.model, draft_length=2, top_k_keys=4):
        ours = case.generate(return_dict_in_generate=True)
        stats = std_decode.last_stats(case.model)
    assert torch.equal(plain.sequences, ours.sequences)
    assert stats.rounds > tokens // 3 and stats.accepted < stats.drafted
    assert_same_states(plain.past_key_values, ours.past_key_values)


def one_more(monkeypatch):
    """The states count as those of one token more than they are of."""
    plain = SparseToDenseCache.settle
    monkeypatch.setattr(
        SparseToDenseCache, "settle", lambda self: (plain(self), self.settled.add_(1))
    )


def one_less(monkeypatch):
    plain = SparseToDenseCache.settle
    monkeypatch.setattr(
        SparseToDenseCache, "settle", lambda self: (plain(self), self.settled.sub_(1))
    )


def one_rejected_kept(monkeypatch):
    plain = Engine.verify

    def late(self, *args):
        # The first rejected draft goes into the state as if it had been accepted.
        self.cache.settled -= (self.cache.lengths > self.cache.prompt + 1).int()
        return plain(self, *args)

    monkeypatch.setattr(Engine, "verify", late)


def drafts_kept(monkeypatch):
    plain = SparseToDenseCache.expect
    monkeypatch.setattr(
        SparseToDenseCache, "expect", lambda self, tokens, drafted=False: plain(self, tokens)
    )


def shifted_ring(monkeypatch):
    plain = RecurrentLayer._write

    def write(self, ring, tokens, at=None):
        at = self.owner.span.slots if at is None else at
        plain(self, ring, tokens, at + (ring == 0))

    monkeypatch.setattr(RecurrentLayer, "_write", write)


@pytest.mark.parametrize(
    "fault", [one_more, one_less, one_rejected_kept, drafts_kept, shifted_ring]
)
def test_a_fault_would_be_seen(make_case, monkeypatch, fault):
    same = []
    for seed in range(3):
        case = make_case("qwen3_next", seed)
        expected = case.generate()
        with std_decode.patched(case.model, draft_length=4, top_k_keys=4):
            with monkeypatch.context() as patches:
                fault(patches)  # after patch, whose own trial would refuse the model
                same.append(torch.equal(expected, case.generate()))
    assert not all(same)


def test_rings_that_move_keep_their_tokens(make_case):
    """A promise of longer passes than drafts have them widens the rings in the midst of a call."""
    case = make_case("olmo_hybrid", 3)
    expected = case.generate()
    with std_decode.patched(case.model, draft_length=2, top_k_keys=4, reproducible=8):
        got = case.generate()
        stats = std_decode.last_stats(case.model)
    case.assert_same_tokens(expected, got)
    assert stats.promise == "reproducible" and stats.tokens_per_pass == 8


def test_unpatch_gives_the_layers_back(make_case):
    case = make_case("qwen3_next")
    decoder = case.model.get_decoder()
    kinds = [type(module) for module in decoder.modules()]
    with std_decode.patched(case.model, draft_length=2):
        assert [type(module) for module in decoder.modules()] != kinds
        for copied in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
            assert torch.equal(copied.generate(**case.inputs), case.model.generate(**case.inputs))
            assert std_decode.last_stats(copied).fallback is None
            std_decode.unpatch(copied)
            assert [type(module) for module in copied.get_decoder().modules()] == kinds
    assert [type(module) for module in decoder.modules()] == kinds
    assert not any("_std_decode_holders" in vars(m) for m in recurrent_modules(decoder).values())


def test_layers_that_two_models_share(make_case):
    one, other = make_case("qwen3_next"), make_case("qwen3_next", 1)
    other.model.model.layers[0].linear_attn = one.model.model.layers[0].linear_attn
    expected = other.generate()
    std_decode.patch(one.model, draft_length=2)
    with std_decode.patched(other.model, draft_length=2):
        std_decode.unpatch(one.model)
        other.assert_same_tokens(expected, other.generate())
        assert std_decode.last_stats(other.model).fallback is None

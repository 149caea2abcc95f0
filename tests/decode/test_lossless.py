"""The promise: the tokens of the unpatched model, whatever is drafted and however it is chosen."""

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import std_decode
from std_decode.passes import engine
from std_decode.passes.engine import Engine
from std_decode.rounds.lockstep import Lockstep
from std_decode.rounds.rows import Rows
from tests.decode.seeds import seeds

DRAFT_LENGTHS = (0, 1, 4, 7)
EVERY_KEY = 10_000
FAMILIES = ("qwen2_vl", "llava_onevision", "llama", "gemma3")


@pytest.mark.parametrize("seed", seeds(20, ordinary=3))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3])
def test_same_tokens_as_unpatched(make_case, family, rows, seed):
    """One prompt, and a left-padded batch whose rows end at different steps."""
    case = make_case(family, seed, rows, eos=rows > 1)
    chosen = (False, True)
    expected = [case.generate(do_sample=do_sample) for do_sample in chosen]
    ties = [set(), set()]
    for draft_length in DRAFT_LENGTHS:
        for top_k_keys in (4, EVERY_KEY) if draft_length else (4,):
            got = []
            with std_decode.patched(case.model, draft_length=draft_length, top_k_keys=top_k_keys):
                for do_sample in chosen:
                    got.append(case.generate(do_sample=do_sample))
                    assert std_decode.last_stats(case.model).fallback is None
            for do_sample in chosen:
                ties[do_sample] |= case.assert_same_tokens(
                    expected[do_sample], got[do_sample], do_sample=do_sample
                )
    # One token in 1e5 is such a tie, and here are at most 42: two would be no coincidence.
    assert len(ties[False]) <= 1 and len(ties[True]) <= 1


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3])
def test_every_draft_is_accepted_when_every_key_is_selected(make_case, family, rows, do_sample):
    """The sparse path is exact: with nothing left out it is the dense model."""
    for seed in range(5):
        case = make_case(family, seed, rows)
        with std_decode.patched(case.model, draft_length=4, top_k_keys=EVERY_KEY):
            case.generate(do_sample=do_sample)
            stats = std_decode.last_stats(case.model)
        # 15 tokens after the first, in rounds of 5; the last one is never asked about.
        assert stats.draft_lengths == [4, 4, 4]
        assert stats.accepted == stats.drafted == 12 * rows
        assert stats.mean_accepted_length == 5.0


def test_rows_of_the_batch_end_at_different_steps(make_case):
    """What the matrix above relies on."""
    case = make_case("qwen2_vl", 0, rows=3, eos=True)
    told = case.generate()[:, case.inputs["input_ids"].shape[1] :]
    ends = torch.isin(told, torch.tensor(case.options["eos_token_id"])).int().argmax(1)
    assert len(set(ends.tolist())) == 3


def test_static_and_renewed_selection_agree(make_case):
    case = make_case("qwen2_vl", 3)
    expected = case.generate()
    for reselect in (False, True):
        with std_decode.patched(case.model, draft_length=4, top_k_keys=4, reselect=reselect):
            got = case.generate()
            selections = std_decode.last_stats(case.model).calls["select"]
        case.assert_same_tokens(expected, got)
        assert (selections > 1) == reselect


def test_buffers_grow_when_the_answer_is_longer_than_was_made_room_for(make_case, monkeypatch):
    monkeypatch.setattr("std_decode.model.cache.BUCKET", 16)
    monkeypatch.setattr("std_decode.generation.MOST_NEW_TOKENS", 4)
    monkeypatch.setattr("std_decode.rounds.rows.MOST_NEW_TOKENS", 4)
    case = make_case("qwen2_vl", 1, max_new_tokens=80)
    expected = case.generate()
    with std_decode.patched(case.model, draft_length=4, top_k_keys=EVERY_KEY):
        got = case.generate()
        stats = std_decode.last_stats(case.model)
    case.assert_same_tokens(expected, got)
    assert stats.accepted == stats.drafted  # no growth came between a draft and its round


class Never(StoppingCriteria):
    """Does nothing, but is not one of transformers' own: the batch goes in lockstep."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


LOCKSTEP = dict(stopping_criteria=StoppingCriteriaList([Never()]))


def accept_anything(monkeypatch):
    plain_agrees, plain_keep = Lockstep.agrees, Rows.keep
    monkeypatch.setattr(
        Lockstep,
        "agrees",
        lambda self, round, pending: (
            plain_agrees(self, round, pending) or round.answered < round.tokens.shape[1]
        ),
    )
    monkeypatch.setattr(
        Rows,
        "keep",
        lambda self, tokens, agreed, limit: plain_keep(
            self, tokens, agreed * 0 + tokens.shape[1] - 1, limit
        ),
    )


def keep_one_rejected(monkeypatch):
    plain = Engine.draft_and_verify

    def late(self, pending, positions, gamma, choose, shared):
        if self.cache.longest > self.cache.prompt:
            self.cache.advance(1, self.cache.longest + 1)
        return plain(self, pending, positions, gamma, choose, shared)

    monkeypatch.setattr(Engine, "draft_and_verify", late)


def shift_indices(monkeypatch):
    plain = engine.select_topk
    monkeypatch.setattr(engine, "select_topk", lambda *a, **k: (plain(*a, **k) - 1).clamp(0))


@pytest.mark.parametrize("mode", ["ragged", "lockstep"])
@pytest.mark.parametrize("fault", [accept_anything, keep_one_rejected, shift_indices])
def test_a_fault_would_be_seen(make_case, monkeypatch, fault, mode):
    """The tests above fail when the accept rule, the rollback or the index list is broken."""
    same, accepted = [], []

    def broken(case, **options):
        with std_decode.patched(case.model, **options), monkeypatch.context() as patches:
            fault(patches)  # after patch, whose own trial would refuse the model
            return case.generate(), std_decode.last_stats(case.model)

    for seed in range(4):
        case = make_case("llama", seed, **(LOCKSTEP if mode == "lockstep" else {}))
        expected = case.generate()
        got, _ = broken(case, draft_length=4, top_k_keys=4)
        same.append(torch.equal(expected, got))
        _, stats = broken(case, draft_length=4, top_k_keys=EVERY_KEY)
        accepted.append(stats.accepted == stats.drafted)
    assert stats.mode == mode
    if fault is shift_indices:  # drafts get worse, the answer must not
        assert all(same) and not any(accepted)
    else:
        assert not all(same)

"""All that drafts can have at once: the tokens of the unpatched model."""

import pytest

import std_decode
from tests.decode.observers import Watches
from tests.decode.seeds import seeds

ALL = dict(
    **dict(draft_length=4, top_k_keys=6, reselect=True),
    **dict(draft_weights="int4", fused_layers=True, prompt_lookup=True),
)
FUSED = {"qwen2_vl": 3, "qwen3": 3, "mistral": 3, "gemma4": 0}  # layers of each


@pytest.mark.parametrize("seed", seeds(6, ordinary=1))
@pytest.mark.parametrize("rows, mode", [(1, "ragged"), (3, "ragged"), (3, "lockstep")])
@pytest.mark.parametrize("family", FUSED)
def test_same_tokens_as_unpatched(make_case, family, rows, mode, seed):
    """Greedy and sampled; a second call of the same shapes, which goes by captured passes."""
    case = make_case(family, seed, rows, eos=rows > 1, max_new_tokens=20)
    watching = dict(logits_processor=[Watches()]) if mode == "lockstep" else {}
    calls = [dict(do_sample=do_sample, **watching) for do_sample in (False, True, False)]
    expected = [case.generate(**call) for call in calls]
    with std_decode.patched(case.model, **ALL):
        for call, answer in zip(calls, expected):
            case.assert_same_tokens(answer, case.generate(**call), **call)
            stats = std_decode.last_stats(case.model)
            assert stats.fallback is None and stats.mode == mode
            assert stats.draft_weights == "int4" and stats.twinned_layers > 0
            assert stats.fused_layers == FUSED[family]
            assert stats.rounds > stats.lookup_rounds

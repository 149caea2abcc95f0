"""What tiny random models flatter, tried on a pretrained one.

Its states differ by 18% in bfloat16 when tokens are fed one at a time: by rounding.
"""

from copy import deepcopy
from functools import cache

import pytest
import torch

import std_decode
from bench.models.pretrained import INSTALL, installed, load, prompt
from bench.real import texts
from tests.decode.conftest import Case
from tests.decode.weights.links import dense_bytes, offload

pytestmark = pytest.mark.skipif(not installed(), reason=f"no pretrained model; {INSTALL}")


loaded = cache(load)  # unpacking takes as long as a test


@pytest.mark.parametrize(
    ("sampled", "number"), [(False, 0), (True, 0), pytest.param(False, 20, marks=pytest.mark.slow)]
)
def test_the_same_tokens_in_float32(sampled, number):
    tokenizer, model = loaded(torch.float32)
    case = Case(
        model, dict(prompt(tokenizer, 400, number)), dict(max_new_tokens=32, do_sample=sampled)
    )
    expected = case.generate()
    for options in (dict(draft_length=4), dict(draft_length=0), dict(draft_length="auto")):
        with std_decode.patched(model, top_k_keys=64, **options):
            got = case.generate()
            stats = std_decode.last_stats(model)
        assert stats.fallback is None
        case.assert_same_tokens(expected, got)
        if options["draft_length"] == 4:
            assert stats.acceptance_rate > 0.4


def test_the_same_tokens_by_look_ups():
    """Of a table that the answer copies."""
    tokenizer, model = loaded(torch.float32)
    inputs = texts.prompt(tokenizer, "table", "question", 150)
    case = Case(model, inputs, dict(max_new_tokens=24, do_sample=False))
    expected = case.generate()
    with std_decode.patched(model, draft_length=4, top_k_keys=64, prompt_lookup=True):
        case.assert_same_tokens(expected, case.generate())
        stats = std_decode.last_stats(model)
    assert stats.fallback is None and stats.lookup_accepted > 0


@pytest.mark.parametrize("sampled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_same_tokens_with_keys_on_the_host(sampled):
    tokenizer, model = loaded(torch.float32)
    case = Case(model, dict(prompt(tokenizer, 400, 3)), dict(max_new_tokens=24, do_sample=sampled))
    expected = case.generate()
    with std_decode.patched(model, kv_cache="offloaded", top_k_keys=64, draft_length=4):
        case.assert_same_tokens(expected, case.generate())
        stats = std_decode.last_stats(model)
    assert stats.fallback is None and stats.acceptance_rate > 0.4
    assert stats.host_kv_bytes > stats.kv_cache_bytes  # of 30 layers, what drafts read is less


@pytest.mark.parametrize("where", ["cpu", pytest.param("disk", marks=pytest.mark.slow)])
def test_the_same_tokens_with_weights_offloaded(where, tmp_path):
    """Greedy, sampled, and with the keys on the host as well; drafts read no weights there."""
    tokenizer, model = loaded(torch.float32)
    away = deepcopy(model)
    link = offload(away, where, tmp_path / "weights")
    options = dict(draft_weights="int4", draft_weights_cache=tmp_path / "copies")
    for sampled, kv_cache in ((False, None), (True, None), (False, "offloaded")):
        case = Case(
            model, dict(prompt(tokenizer, 200, 5)), dict(max_new_tokens=16, do_sample=sampled)
        )
        expected = case.generate()
        case.model = away
        with std_decode.patched(away, draft_length=4, kv_cache=kv_cache, **options):
            link.nbytes = 0
            case.assert_same_tokens(expected, case.generate())
            stats = std_decode.last_stats(away)
        assert stats.fallback is None and stats.draft_weights == "int4"
        assert stats.acceptance_rate > 0.4
        passes = stats.calls["prefill"] + stats.calls["dense"] + stats.calls["verify"]
        assert link.nbytes == passes * dense_bytes(away)


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16]
)
def test_the_same_tokens_in_half_precision_bit_for_bit(dtype):
    """With rounding as it comes, one of three such texts has another token in bfloat16."""
    tokenizer, model = loaded(dtype)
    case = Case(model, dict(prompt(tokenizer, 300)), dict(max_new_tokens=24, do_sample=False))
    expected = case.generate()
    for options in (dict(draft_length=4), dict(draft_length=0), dict(draft_length="auto")):
        with std_decode.patched(model, top_k_keys=64, **options):
            assert torch.equal(case.generate(), expected)
            stats = std_decode.last_stats(model)
        assert stats.promise == "unpatched"
        assert stats.accepted > 5 or options["draft_length"] != 4


def test_passes_of_one_shape_give_one_text_in_bfloat16():
    tokenizer, model = loaded(torch.bfloat16)
    case = Case(model, dict(prompt(tokenizer, 300, 7)), dict(max_new_tokens=24, do_sample=False))
    told = []
    for draft_length in (0, 1, 7):
        with std_decode.patched(
            model, top_k_keys=64, draft_length=draft_length, reproducible=True
        ):
            told.append(case.generate(output_logits=True, return_dict_in_generate=True))
            assert std_decode.last_stats(model).promise == "reproducible"
    for other in told[1:]:
        assert all(map(torch.equal, other.logits, told[0].logits))

"""In half precision drafts change no token, and where it is promised no bit."""

from unittest import mock

import pytest
import torch

import std_decode
import std_kernels
from std_decode.admission import bits
from std_decode.model import alone, attention
from std_decode.model.layer_group import lse_estimate
from std_decode.passes import engine
from std_decode.rounds.sampling import STATELESS
from tests.decode.families import FAMILIES
from tests.decode.observers import Watches

HALF = (torch.bfloat16, torch.float16)
# Its unpatched model does not take its inputs in half precision.
BROKEN = {"phi4_multimodal"}
DRAFTS = (
    dict(draft_length=1),
    dict(draft_length=7, reselect=False),
    dict(draft_length=4, top_k_keys=1),
    dict(draft_length=4, top_k_keys=10_000),
    dict(draft_length=3, draft_weights="int4"),
    dict(draft_length="auto"),
)


@pytest.fixture
def make_half(make_case):
    def make(family, dtype, seed=0, rows=1, **options):
        case = make_case(family, seed, rows, **options)
        case.model.to(dtype)
        case.inputs = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in case.inputs.items()
        }
        return case

    return make


def patched(case, expected_promise, **options):
    with std_decode.patched(case.model, **{"top_k_keys": 8, **options}):
        output = case.generate()
        stats = std_decode.last_stats(case.model)
    assert stats.fallback is None and stats.promise == expected_promise, stats.promise_because
    return output, stats


@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - BROKEN))
def test_the_tokens_of_the_unpatched_model(make_half, family, dtype):
    case = make_half(family, dtype, max_new_tokens=24)
    expected = case.generate()
    got, stats = patched(case, "unpatched", draft_length=5)
    assert torch.equal(got, expected)
    assert stats.rounds > 2 and stats.tokens_per_pass == 0


@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("family", ["llama", "qwen2_vl", "gemma2", "mistral", "muse_glimmer"])
@pytest.mark.parametrize("sampled", [False, True])
def test_batches_too(make_half, family, dtype, sampled):
    """Rows that are padded and advance each by its own acceptance; sliding windows and caps."""
    case = make_half(family, dtype, 3, rows=3, eos=True, max_new_tokens=32, do_sample=sampled)
    expected = case.generate()
    for drafts in (dict(draft_length=3), dict(draft_length="auto"), dict(draft_length=0)):
        got, stats = patched(case, "unpatched", **drafts)
        assert torch.equal(got, expected) and stats.mode == "ragged"


@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("family", ["llama", "qwen3_vl", "gpt_oss"])
def test_every_bit_of_every_logit(make_half, family, dtype):
    case = make_half(family, dtype, 1, output_logits=True, return_dict_in_generate=True)
    expected = case.generate()
    for drafts in DRAFTS:
        got, _ = patched(case, "unpatched", **drafts)
        assert len(got.logits) == len(expected.logits)
        assert all(map(torch.equal, got.logits, expected.logits))


ONE_SHAPE = [
    *(("llama", 1, dtype) for dtype in (torch.float16, torch.float32)),
    *((family, 2, torch.bfloat16) for family in ("qwen2_vl", "gpt_oss")),
    pytest.param("llama", 1, torch.bfloat16, marks=pytest.mark.slow),
    pytest.param("qwen2_vl", 2, torch.float32, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "rows", "dtype"), ONE_SHAPE)
def test_passes_of_one_shape_give_the_same_bits_whatever_is_drafted(
    make_half, family, rows, dtype
):
    more = dict(output_logits=True, return_dict_in_generate=True)
    for seed, options in ((1, more), (2, {}), (3, dict(do_sample=True))):
        case = make_half(family, dtype, seed, rows, **options)
        dense, stats = patched(case, "reproducible", draft_length=0, reproducible=True)
        assert stats.tokens_per_pass == bits.ROWS and stats.rounds == 0
        for drafts in DRAFTS:
            got, _ = patched(case, "reproducible", reproducible=True, **drafts)
            if options is more:
                assert torch.equal(got.sequences, dense.sequences)
                assert all(map(torch.equal, got.logits, dense.logits))
            else:
                assert torch.equal(got, dense)


def test_longer_drafts_take_wider_passes(make_half):
    case = make_half("llama", torch.bfloat16, max_new_tokens=40)
    dense, stats = patched(case, "reproducible", draft_length=0, reproducible=20)
    assert stats.tokens_per_pass == 20
    for drafts in (dict(draft_length=19), dict(draft_length="auto"), dict(draft_length=2)):
        got, _ = patched(case, "reproducible", reproducible=20, **drafts)
        assert torch.equal(got, dense)


def test_a_second_question_and_lockstep(make_half):
    """A cache that the first answer left, with its padding, and code that sees each step."""
    for reproducible, promise in (("auto", "unpatched"), (True, "reproducible")):
        case = make_half("llama", torch.bfloat16, 5, rows=2, eos=True)
        answers = []
        for drafts in (0, 4):
            options = dict(draft_length=drafts, reproducible=reproducible)
            with std_decode.patched(case.model, top_k_keys=4, **options):
                answers.append(two_questions(case))
                assert std_decode.last_stats(case.model).promise == promise
        if promise == "unpatched":
            answers.append(two_questions(case))
        for other in answers[1:]:
            assert all(map(torch.equal, answers[0], other))


def two_questions(case):
    watches = Watches()
    first = case.generate(return_dict_in_generate=True, logits_processor=[watches])
    ids = torch.cat([first.sequences, case.inputs["input_ids"][:, -4:]], dim=1)
    mask = torch.cat([case.inputs["attention_mask"], torch.ones_like(ids)], dim=1)
    second = case.model.generate(
        ids, attention_mask=mask[:, : ids.shape[1]], **{**case.options, "max_new_tokens": 12},
        past_key_values=first.past_key_values,
    )  # fmt: skip
    assert watches.calls and type(watches) not in STATELESS
    return first.sequences, second


def test_masks_with_holes_and_experts_in_batches_have_passes_of_one_shape(make_half):
    case = make_half("llama", torch.bfloat16, 1, rows=2)
    case.inputs["attention_mask"][1, 9] = 0
    dense, _ = patched(case, "reproducible", draft_length=0)
    got, stats = patched(case, "reproducible", draft_length=5)
    assert torch.equal(got, dense) and "holes" in stats.promise_because


def test_float32_rounds_and_is_not_tried(make_case):
    with mock.patch.object(bits, "_Trial", side_effect=AssertionError("was tried")):
        case = make_case("llama")
        assert patched(case, "rounded")[1].promise_because is None
        case.model.bfloat16()
        patched(case, "rounded", reproducible=False)


def test_a_model_that_becomes_another_is_tried_again(make_half):
    case = make_half("llama", torch.bfloat16)
    with std_decode.patched(case.model, draft_length=4):
        case.generate()
        assert std_decode.last_stats(case.model).promise == "unpatched"
        case.model.float()
        case.generate()
        assert std_decode.last_stats(case.model).promise == "rounded"


def other_order(attend):
    """The same attention, its keys in another order: nothing but rounding changes."""

    def backwards(attending, rows, token, length):
        changed = mock.Mock(wraps=attending)
        for name in ("running", "module", "query", "given", "layer", "replaced", "dense"):
            setattr(changed, name, getattr(attending, name))
        order = torch.arange(length).flip(0)
        for name in ("key", "value"):
            setattr(changed, name, getattr(attending, name)[:, :, order])
        return attend(changed, rows, token, length)

    return backwards


@pytest.mark.parametrize("reproducible", ["unpatched", True])
def test_keys_in_another_order_are_seen(make_half, monkeypatch, reproducible):
    """Other drafts would be seen by these tests if they changed no more than the last bits."""
    case = make_half("llama", torch.bfloat16, max_new_tokens=48)
    case.options |= dict(output_logits=True, return_dict_in_generate=True)
    promise = "unpatched" if reproducible == "unpatched" else "reproducible"
    expected, _ = patched(case, promise, draft_length=0, reproducible=reproducible)
    if promise == "unpatched":
        monkeypatch.setattr(alone, "_one", other_order(alone._one))
    else:
        monkeypatch.setattr(attention, "verify_attention", keys_backwards)
        monkeypatch.setattr(attention, "verify_attention_with_scores", scored_backwards)
    got, _ = patched(case, promise, draft_length=4, reproducible=reproducible)
    same = [torch.equal(x, y) for x, y in zip(got.logits, expected.logits)]
    assert same[0] and not all(same)


def keys_backwards(query, key, value, kv_len, **options):
    """Attention of one row whose newest tokens are the T last: all that are seen, in reverse."""
    count, length = query.shape[2], int(kv_len)
    outs = []
    for t in range(count):
        seen = torch.arange(length - count + t + 1).flip(0)
        here = kv_len - count + t + 1
        given = query[:, :, t : t + 1], key[:, :, seen], value[:, :, seen]
        outs.append(std_kernels.verify_attention(*given, here, **options)[0])
    return torch.cat(outs, dim=2), None


def scored_backwards(query, key, value, kv_len, score_lse, scores=None, **options):
    given = query, key, value, kv_len
    scores = std_kernels.verify_attention_with_scores(*given, score_lse, **options)[2]
    return *keys_backwards(*given, **options), scores


def test_what_makes_other_bits_is_named(make_half, monkeypatch):
    case = make_half("llama", torch.bfloat16)
    layer = case.model.model.layers[1].mlp

    def forward(states, plain=layer.forward):
        out = plain(states)
        # A draft of its own place gets another last bit.
        return torch.where(torch.arange(out.shape[1])[:, None] > 0, out * (1 + 2**-7), out)

    monkeypatch.setattr(layer, "forward", forward)
    for wanted in ("unpatched", True):
        with pytest.raises(NotImplementedError, match=r"layers\.1\.mlp \(LlamaMLP\) makes other"):
            std_decode.patch(case.model, reproducible=wanted)
    _, stats = patched(case, "rounded")
    assert "layers.1.mlp" in stats.promise_because


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(reproducible="yes"), TypeError, "reproducible is 'yes', expected True, False"),
        (dict(reproducible=1.5), TypeError, "reproducible is 1.5"),
        (dict(reproducible=1), ValueError, "reproducible is 1, expected 2 to 64"),
        (dict(reproducible=65), ValueError, "reproducible is 65"),
        (
            dict(reproducible=True, draft_length=8),
            ValueError,
            "draft_length is 8, expected less than the 8 .*reproducible=9 feeds",
        ),
    ],
)
def test_bad_arguments_name_the_remedy(make_case, options, error, words):
    model = make_case("llama").model
    with pytest.raises(error, match=f"patch: {words}"):
        std_decode.patch(model, **options)
    assert not std_decode.is_patched(model)


def test_rows_are_padded_and_drafts_cut_to_what_a_pass_holds(make_half, monkeypatch):
    widths, plain = [], engine.Engine.compute

    def compute(self, phase, tokens, *others):
        widths.append((phase, tokens.shape[1]))
        return plain(self, phase, tokens, *others)

    case = make_half("llama", torch.bfloat16, max_new_tokens=40)
    with std_decode.patched(case.model, top_k_keys=8, reproducible=4):
        monkeypatch.setattr(engine.Engine, "compute", compute)
        case.generate()
        stats = std_decode.last_stats(case.model)
    assert max(stats.draft_lengths, default=0) <= 3
    assert {width for phase, width in widths if phase == "verify"} == {4}


def test_padding_gives_no_scores():
    """Rows behind the newest draft have no estimate of their own, and none of an earlier round."""
    lse = torch.arange(7.0).expand(1, 2, 7)
    estimate = lse_estimate(lse, 8, padding=5)
    assert estimate[0, 1].tolist() == [0.0, 1.0, 1.0, *[torch.inf] * 5]
    assert lse_estimate(lse, 8)[0, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 6.0]

"""Numbers and prompts that nobody expects: the unpatched model's tokens, or its error."""

from dataclasses import replace

import pytest
import torch

import std_decode
from std_decode.model import attention, cache
from std_decode.model.selection_rules import plan_selection
from std_decode.passes import pool
from std_decode.passes.engine import Engine
from tests.reliability.trials import BASE, QWEN, TEXTUAL, VISUAL, run

PATCH = dict(draft_length=4, top_k_keys=8)


def patched(case, **options):
    with std_decode.patched(case.model, **PATCH):
        got = case.generate(**options)
        stats = std_decode.last_stats(case.model)
    assert stats.fallback is None and stats.rounds > 0
    return got


# --- logits ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0])
@pytest.mark.parametrize("where", ["everywhere", "one token", "from some step on"])
@pytest.mark.parametrize("mode", ["ragged", "lockstep"])
def test_logits_that_are_no_numbers(make_case, value, where, mode):
    """Zeros are the case of tokens that are all alike."""
    case = make_case("llama", seed=2, rows=2)
    prompt, weight = case.inputs["input_ids"].shape[1], case.model.lm_head.weight
    told = case.generate()
    with torch.no_grad():
        if where == "everywhere":
            # Behind the product, as no weight makes all of them infinite.
            case.model.lm_head.register_forward_hook(lambda m, i, out: torch.full_like(out, value))
        elif where == "one token":
            weight[77] = value
        else:  # once this token is read
            case.model.model.embed_tokens.weight[told[0, prompt + 5]] = value
    options = dict(return_dict_in_generate=True, output_logits=True) if mode == "lockstep" else {}
    for do_sample in (False, True):
        try:
            expected = case.generate(do_sample=do_sample, **options)
        except RuntimeError as error:
            assert do_sample and "probability tensor contains" in str(error)
            with pytest.raises(RuntimeError, match="probability tensor contains"):
                patched(case, do_sample=True, **options)
            continue
        got = patched(case, do_sample=do_sample, **options)
        assert torch.equal(*(getattr(x, "sequences", x) for x in (expected, got)))


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rejected_drafts_leave_nothing_behind(request, make_case, monkeypatch, family, captures):
    """What lies behind the accepted tokens is NaN before each round."""
    if captures:
        request.getfixturevalue("recording")
        monkeypatch.setattr(pool, "bucket", lambda tokens: tokens)
    plain, poisoned = Engine.draft_and_verify, []

    def draft_and_verify(self, *args):
        for layer in self.cache.layers:
            for row, length in enumerate(self.cache.lengths.tolist()):
                layer.keys[row, :, length:] = layer.values[row, :, length:] = float("nan")
                poisoned.append(layer.keys.shape[2] - length)
        return plain(self, *args)

    case = make_case(family, 1, rows=3, eos=True)
    expected = case.generate()
    monkeypatch.setattr(Engine, "draft_and_verify", draft_and_verify)
    with std_decode.patched(case.model, draft_length=4, top_k_keys=1):
        assert torch.equal(case.generate(), expected)
        stats = std_decode.last_stats(case.model)
    assert stats.accepted < stats.drafted and min(poisoned) > 0


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["ragged", "lockstep"])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_draft_whose_values_are_no_numbers(
    request, make_case, monkeypatch, family, do_sample, mode, value, captures
):
    """It is rejected, and the tokens of its round that come before it are read again."""
    if captures:
        request.getfixturevalue("recording")
        monkeypatch.setattr(pool, "bucket", lambda tokens: tokens)
    case = make_case(family, 1, rows=3)
    options = dict(do_sample=do_sample)
    if mode == "lockstep":
        options |= dict(return_dict_in_generate=True, output_logits=True)
    expected = case.generate(**options)
    expected = getattr(expected, "sequences", expected)
    weight = case.model.get_input_embeddings().weight
    others = torch.ones(len(weight), dtype=torch.bool)
    others[expected.unique()] = False
    spoiling = []
    plain = Engine.verify

    def verify(self, tokens, *args):
        spoiling.append(bool(others[tokens].any()))
        for layer in self.cache.selecting_layers:  # else all later drafts were chosen blindly
            assert not layer.importance.isnan().any()
        return plain(self, tokens, *args)

    monkeypatch.setattr(Engine, "verify", verify)
    with std_decode.patched(case.model, draft_length=8, top_k_keys=1):
        with torch.no_grad():
            weight[others] = value
        spoiling.clear()  # what patch tried
        got = case.generate(**options)
        stats = std_decode.last_stats(case.model)
    assert torch.equal(getattr(got, "sequences", got), expected)
    assert any(spoiling) and stats.calls["dense"] > 0 and stats.mode == mode
    assert 0 <= stats.accepted <= stats.drafted


# --- scores and keys ---


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda scores: scores.fill_(float("nan")),
        lambda scores: scores.fill_(float("inf")),
        lambda scores: scores.fill_(float("-inf")),
        lambda scores: scores.fill_(0.25),
        lambda scores: scores.zero_(),
        lambda scores: scores.neg_(),
        lambda scores: scores.mul_(1e38).mul_(1e38),
        lambda scores: torch.where(torch.rand_like(scores) < 0.1, float("nan"), scores),
    ],
    ids=["nan", "inf", "-inf", "equal", "zero", "negative", "overflow", "some nan"],
)
def test_scores_of_every_kind(request, make_case, monkeypatch, spoil, captures):
    if captures:
        request.getfixturevalue("recording")
    case = make_case("qwen2_vl", seed=2, rows=2)
    expected = case.generate()
    of_prompt, of_round = attention.score_keys, attention.verify_attention_with_scores

    def spoiled(*args, **kwargs):
        out, lse, scores = of_round(*args, **kwargs)
        return out, lse, spoil(scores)

    monkeypatch.setattr(attention, "score_keys", lambda *a, **k: spoil(of_prompt(*a, **k)))
    monkeypatch.setattr(attention, "verify_attention_with_scores", spoiled)
    assert torch.equal(patched(case), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2_vl", "gemma3"])
def test_attention_to_one_key(make_case, family):
    """Nearly all of it: queries of 20 times the length."""
    for seed in range(3):
        case = make_case(family, seed, rows=2)
        scale_projections(case.model, query=20.0, key=1.0)
        case.assert_same_tokens(case.generate(), patched(case))


@pytest.mark.parametrize("size", [1e3, 1e12, 1e18])
@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_huge_keys(make_case, family, size):
    case = make_case(family, seed=3, rows=2)
    scale_projections(case.model, query=1 / size, key=size)
    expected = case.generate()
    assert len(expected.unique()) > 10
    case.assert_same_tokens(expected, patched(case))


def scale_projections(model, query, key):
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            for name, factor in (("q", query), ("k", key)):
                norm = getattr(layer.self_attn, f"{name}_norm", None)
                if norm is not None:  # of Gemma 3, which multiplies by 1 + weight
                    norm.weight.add_(1).mul_(factor).sub_(1)
                    continue
                for parameter in getattr(layer.self_attn, f"{name}_proj").parameters():
                    parameter.mul_(factor)


# --- prompts, room, ends ---

EDGES = {
    "one token": dict(rows=((("text", 1),),)),
    "one token and a longer row": dict(rows=((("text", 1),), (("text", 9), ("video", 2, 2, 2)))),
    "one frame": dict(rows=((("text", 3), ("video", 1, 1, 1), ("text", 3)),)),
    "nothing but one frame": dict(rows=((("video", 1, 1, 1),),)),
    "no text after the video": dict(rows=((("text", 4), ("video", 3, 2, 2)),)),
    "no text before it": dict(rows=((("video", 3, 2, 2), ("text", 4)),)),
    "two videos and an image without text": dict(
        rows=((("video", 2, 1, 1), ("image", 2, 2), ("video", 1, 2, 1)),)
    ),
    "shorter than K": dict(top_k_keys=10_000, selection="none"),
    "one key": dict(top_k_keys=1),
    "one new token": dict(new_tokens=1),
    "two new tokens, 20 drafts": dict(new_tokens=2, most_drafts=20),
    "63 drafts": dict(most_drafts=63, new_tokens=70),
    "padding all around": dict(padding=30),
}


# The stand-in takes a quarter of a minute for 63 drafts.
@pytest.mark.parametrize(
    ("name", "captured"),
    [(name, captured) for name in EDGES for captured in (False, True)
     if not captured or name != "63 drafts"],
)  # fmt: skip
def test_prompts_at_the_edge(name, captured):
    for family in ("llama", "qwen3_vl" if captured else "qwen2_vl"):
        assert family in (*TEXTUAL, *QWEN)
        outcome = run(replace(BASE, family=family, captured=captured, **EDGES[name]))
        # Without graphs nothing is drafted that cannot be kept.
        undrafted = (
            ["one new token"] if captured else ["one new token", "two new tokens, 20 drafts"]
        )
        assert not outcome.ties and (outcome.rounds > 0) == (name not in undrafted)


@pytest.mark.parametrize("family", VISUAL)
def test_a_video_of_one_frame_of_each_family(family):
    picture = ("image", 1, 1) if family == "internvl" else ("video", 1, 1, 1)
    outcome = run(replace(BASE, family=family, rows=((("text", 2), picture),) * 2))
    assert outcome.rounds > 0 and not outcome.ties


def test_nothing_competes_in_a_short_prompt():
    """What "one token" and others above rely on."""
    selection = plan_selection(torch.zeros(1, 9, dtype=torch.bool), None, 4, 9)
    assert not selection.candidates.any() and selection.complete


@pytest.mark.parametrize("captured", [False, True])
def test_room_ends_in_mid_round(monkeypatch, captured):
    grown, plain = [], cache.BufferLayer.grow

    def grow(layer, capacity):
        grown.append((layer.owner.longest, capacity))
        return plain(layer, capacity)

    monkeypatch.setattr(cache.BufferLayer, "grow", grow)
    outcome = run(replace(BASE, small=True, new_tokens=48, captured=captured, top_k_keys=10_000))
    assert grown and not outcome.ties
    # The accepted tokens alone had fitted: it was the drafts that did not.
    assert all(longest < capacity - 16 for longest, capacity in grown)


@pytest.mark.parametrize("watched", ["", "processor"])
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("end", [0, 1, 2, 5, 7, 8])
def test_an_end_inside_a_draft(end, captured, watched):
    """Prefill gives step 0, a draft of 7 and its verification the steps up to 8."""
    outcome = run(replace(
        BASE, most_drafts=7, top_k_keys=10_000, ends=(end,), captured=captured, watched=watched,
        weights=3,
    ))  # fmt: skip
    assert outcome.tokens == end + 1 and not outcome.ties
    assert outcome.rounds == (1 if end else 0) and outcome.drafted == 7 * outcome.rounds

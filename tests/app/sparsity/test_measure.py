"""`std-decode sparsity`: what it measures, against attention computed by transformers itself."""

import pytest
import torch

from std_decode.app.sparsity.measure import (
    DraftsPoint,
    KeysPoint,
    NotMeasurable,
    Teacher,
    Timed,
    candidates,
    teach,
    time_rounds,
    watched,
)
from std_decode.app.sparsity.prompt import with_cache
from std_decode.app.sparsity.suggest import speedups, suggest, suggest_keys
from std_decode.costs.workload import expected_tokens

TOKENS = 14


@pytest.fixture
def question(make_case):
    """A tiny video LLM, its inputs, the dense answer, and the dense attention along it."""
    case = make_case("qwen2_vl", seed=3)
    model, inputs = case.model, case.inputs
    _, answer, _ = watched(model, inputs, Timed, TOKENS, draft_length=0)
    assert torch.equal(answer, case.generate(max_new_tokens=TOKENS)[0, -TOKENS:])
    model.set_attn_implementation("eager")
    ids = torch.cat([inputs["input_ids"], answer[None]], dim=1)
    types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, TOKENS))
    mask = torch.ones_like(ids)
    whole = {**inputs, "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}
    with torch.no_grad():
        attentions = model(**whole, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return model, inputs, answer, [a[0].double() for a in attentions]


class Listing(Teacher):
    """A Teacher that keeps the index lists of each verification."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.lists = []

    def note(self, attending, cache, layer):
        at = cache.layers.index(layer)
        last = int(cache.span.kv_len)
        rows = range(last - attending.query.shape[2], last)
        self.lists.append((at, rows, layer.indices[0].tolist()))
        super().note(attending, cache, layer)


def expected(attention, row, prompt, listed, heads):
    """Attention of one token on the listed keys and what follows the prompt, by KV head."""
    by_head = attention[:, row].unflatten(0, (heads, -1)).mean(dim=1)
    listed = [[i for i in indices if i >= 0] for indices in listed]
    return torch.stack(
        [by_head[h, listed[h]].sum() + by_head[h, prompt : row + 1].sum() for h in range(heads)]
    )


def test_attention_kept_is_that_of_the_dense_model_on_the_keys_of_the_engine(question):
    model, inputs, answer, attentions = question
    prompt = inputs["input_ids"].shape[1]
    listing, _, _ = watched(
        model, inputs, lambda *a, **k: Listing(*a, answer=answer, best_of=[3, 9], **k),
        TOKENS, top_k_keys=9, draft_length=4, cuda_graphs=False,
    )  # fmt: skip
    kept, text, best = (
        listing.mean(x) for x in (listing.kept, listing.kept_by_text, listing.kept_by_best)
    )
    selection = listing.engine.selection
    always = selection.always[0].nonzero()[:, 0].tolist()
    competing = selection.candidates[0]
    for layer in range(3):
        told = [(row, lists) for at, rows, lists in listing.lists if at == layer for row in rows]
        assert [row for row, _ in told] == list(range(prompt, prompt + TOKENS - 1))
        attention = attentions[layer]
        wanted = [expected(attention, row, prompt, lists, 2) for row, lists in told]
        assert kept[layer] == pytest.approx(torch.stack(wanted).mean(0).tolist(), abs=1e-5)
        wanted = [expected(attention, row, prompt, [always] * 2, 2) for row, _ in told]
        assert text[layer] == pytest.approx(torch.stack(wanted).mean(0).tolist(), abs=1e-5)
        for i, count in enumerate((3, 9)):
            shares = []
            for row, _ in told:
                by_head = attention[:, row].unflatten(0, (2, -1)).mean(dim=1)
                video = by_head[:, :prompt] * competing
                shares.append(1 - video.sum(1) + video.topk(count).values.sum(1))
            wanted = torch.stack(shares).mean(0).tolist()
            assert best[layer][i] == pytest.approx(wanted, abs=1e-5)


def test_the_best_keys_keep_most_and_all_keys_keep_all(question):
    model, inputs, answer, _ = question
    most = candidates(model, inputs)
    few, _ = teach(model, inputs, answer, 6)
    everything, teacher = teach(model, inputs, answer, most, best_of=[6, most])
    assert few.drafted == everything.drafted == len(teacher.agreed)
    assert few.agreement < 1 and everything.agreement == 1
    best = teacher.mean(teacher.kept_by_best)
    for layer, kept in few.kept.items():
        assert all(x <= y + 1e-5 for x, y in zip(kept, best[layer][0]))
        assert everything.kept[layer] == pytest.approx([1, 1], abs=1e-5)


def test_rounds_are_counted_as_generate_counts_them(question):
    model, inputs, answer, _ = question
    dense, *drafted = time_rounds(model, inputs, TOKENS, 6, [0, 1, 4])
    assert (dense.tokens_per_pass, dense.acceptance, dense.draft_seconds) == (1, None, 0)
    for point in drafted:
        assert point.tokens_per_second > 0 and point.draft_seconds > 0
        assert 1 <= point.tokens_per_pass <= point.draft_length + 1
    timed, told, stats = watched(model, inputs, Timed, TOKENS, top_k_keys=6, draft_length=1)
    assert torch.equal(told, answer)
    assert 0 < timed.rejected <= stats.drafted - stats.accepted <= timed.rejected + 1
    assert drafted[0].acceptance == stats.accepted / (stats.accepted + timed.rejected)


def test_the_video_is_read_once_and_the_figures_stay(question, monkeypatch):
    model, inputs, answer, _ = question
    once = with_cache(model, inputs, answer)
    assert "pixel_values_videos" not in once and once["input_ids"] is inputs["input_ids"]
    _, told, stats = watched(model, once, Timed, TOKENS, top_k_keys=6, draft_length=2)
    last = int((inputs["input_ids"][0] == model.config.video_token_id).nonzero().max())
    assert torch.equal(told, answer) and stats.reused_tokens == last + 1
    for count in (3, 9):  # the cache is as it was, for the next
        (whole, _), (shared, _) = (teach(model, x, answer, count) for x in (inputs, once))
        assert (shared.drafted, shared.agreed) == (whole.drafted, whole.agreed)
        for layer, kept in whole.kept.items():
            assert shared.kept[layer] == pytest.approx(kept, abs=1e-5)


def test_a_model_that_does_not_go_on_from_a_cache_reads_it_all(question):
    model, inputs, answer, _ = question
    assert with_cache(model, inputs, answer.flip(0)) is inputs  # as if the answer had changed
    text = {**inputs, "mm_token_type_ids": torch.zeros_like(inputs["mm_token_type_ids"])}
    assert with_cache(model, text, answer) is text


def test_a_call_that_cannot_be_looked_into_says_why(question):
    model, inputs, _, _ = question
    with pytest.raises(NotMeasurable, match="use_cache is off"):
        watched(model, inputs, Timed, 4, sampling=dict(do_sample=False, use_cache=False))


def keys(*pairs):
    return [KeysPoint(k, 100, agreed, {}) for k, agreed in pairs]


def drafts(dense, draft, verify, acceptance, lengths=(1, 2, 4, 8)):
    points = [DraftsPoint(0, 1.0, None, dense, 0.0)]
    for gamma in lengths:
        tokens = expected_tokens(acceptance, gamma)
        points.append(DraftsPoint(gamma, tokens, acceptance, gamma * draft + verify, draft))
    return points


def test_the_fewest_keys_that_do_but_not_all_of_them():
    assert suggest_keys(keys((16, 60), (64, 97), (256, 98), (1000, 100))) == 64
    assert suggest_keys(keys((16, 10), (64, 20), (1000, 100))) == 64
    assert suggest_keys(keys((12, 100))) == 12


def test_speed_is_tokens_by_time_between_measured_lengths_too():
    gains = speedups(drafts(1.0, 0.1, 1.2, 0.8))
    assert list(gains) == list(range(9)) and gains[0] == 1
    for gamma in range(1, 9):
        assert gains[gamma] == pytest.approx(expected_tokens(0.8, gamma) / (0.1 * gamma + 1.2))


def test_the_suggestion_drafts_where_that_pays_and_says_so_where_not():
    points = keys((64, 90), (1000, 100))
    cheap = suggest(points, drafts(1.0, 0.1, 1.1, 0.9), 64)
    assert cheap.draft_length >= 6 and cheap.speedup > 3 and "64 keys" in cheap.why
    middling = suggest(points, drafts(1.0, 0.4, 1.1, 0.7), 64)
    assert 0 < middling.draft_length < 4
    costly = suggest(points, drafts(1.0, 1.0, 1.1, 0.9), 64)
    assert (costly.draft_length, costly.speedup) == (0, 1.0)
    assert costly.why.startswith("Drafting does not pay here")
    rejected = suggest(points, drafts(1.0, 0.1, 1.1, 0.0), 64)
    assert rejected.draft_length == 0

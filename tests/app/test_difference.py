"""Where two answers part: the margin is the model's own, and only rounding is called rounding."""

import pytest
import torch

from std_decode.app.difference import MARGIN, Difference, first_difference
from tests.decode.families import FAMILIES

GREEDY = dict(do_sample=False)
SAMPLED = dict(do_sample=True, top_k=0)
TOKENS, SEED, STEP = 12, 5, 7


def told(family, dtype=torch.float32, **options):
    """An unpatched model, its inputs and its answer."""
    torch.manual_seed(1)
    model, inputs = FAMILIES[family].build(1)
    model = model.to(dtype).eval()
    if "pixel_values_videos" in inputs:
        inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(dtype)
    torch.manual_seed(SEED)
    return model, inputs, model.generate(**inputs, max_new_tokens=TOKENS, **options)


def with_token(expected, prompt, token):
    got = expected.clone()
    got[0, prompt + STEP] = token
    return got


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision", "llama"])
def test_the_margin_is_that_of_one_forward_pass(family):
    model, inputs, expected = told(family, **GREEDY)
    prompt = inputs["input_ids"].shape[1]
    ids = expected[:, : prompt + STEP]
    whole = dict(inputs, input_ids=ids, attention_mask=torch.ones_like(ids))
    if "mm_token_type_ids" in inputs:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(
            inputs["mm_token_type_ids"], (0, STEP)
        )
    with torch.no_grad():
        best = model(**whole).logits[0, -1].log_softmax(dim=-1).sort(descending=True)
    assert best.indices[0] == expected[0, prompt + STEP]
    for place in (1, 2):
        got = with_token(expected, prompt, best.indices[place])
        found = first_difference(model, inputs, SEED, expected, got, **GREEDY)
        assert (found.step, found.patched) == (STEP, int(best.indices[place]))
        assert found.unpatched == int(best.indices[0])
        assert found.margin == pytest.approx(float(best.values[0] - best.values[1]), abs=1e-5)
        assert found.behind == pytest.approx(float(best.values[0] - best.values[place]), abs=1e-5)
        assert 0 < found.moved < 1e-4 and found.dtype == torch.float32
        assert found.is_rounding == (found.behind < MARGIN)
        assert ("report it as a bug" in found.explained()) == (not found.is_rounding)


def test_when_sampling_the_margin_counts_the_random_numbers(monkeypatch):
    model, inputs, expected = told("qwen2_vl", **SAMPLED)
    prompt, seen = inputs["input_ids"].shape[1], []
    plain = torch.multinomial

    def watched(p, num_samples):
        state = torch.get_rng_state()
        seen.append(p.log() - torch.empty_like(p).exponential_(1).log())
        torch.set_rng_state(state)
        return plain(p, num_samples)

    monkeypatch.setattr(torch, "multinomial", watched)
    torch.manual_seed(SEED)
    assert torch.equal(model.generate(**inputs, max_new_tokens=TOKENS, **SAMPLED), expected)
    best = seen[STEP][0].sort(descending=True)
    got = with_token(expected, prompt, best.indices[1])
    found = first_difference(model, inputs, SEED, expected, got, **SAMPLED)
    assert found.margin == found.behind
    assert found.margin == pytest.approx(float(best.values[0] - best.values[1]), abs=1e-5)


@pytest.mark.parametrize(
    ("dtype", "words"),
    [(torch.float32, "near tie"), (torch.bfloat16, "rounding of bfloat16")],
    ids=str,
)
def test_a_tie_is_rounding(dtype, words):
    model, inputs, expected = told("llama", dtype, **GREEDY)
    prompt = inputs["input_ids"].shape[1]
    chosen = int(expected[0, prompt])
    other = next(i for i in range(99, 0, -1) if i not in expected)
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight[other] = weight[chosen]
    torch.manual_seed(SEED)
    expected = model.generate(**inputs, max_new_tokens=TOKENS, **GREEDY)
    got = expected.clone()
    got[0, prompt] = chosen + other - expected[0, prompt]  # the other one
    found = first_difference(model, inputs, SEED, expected, got, **GREEDY)
    assert {found.unpatched, found.patched} == {chosen, other}
    assert found.is_rounding and found.behind == found.margin == 0
    assert words in found.explained()


def test_in_bfloat16_what_rounding_does_to_the_model_is_the_measure():
    model, inputs, expected = told("qwen2_vl", torch.bfloat16, **GREEDY)
    prompt = inputs["input_ids"].shape[1]
    for token in range(20):
        got = with_token(expected, prompt, token)
        found = first_difference(model, inputs, SEED, expected, got, **GREEDY)
        assert 1e-4 < found.moved < 1
        assert found.is_rounding == (found.behind <= 2 * found.moved)
        words = "neither answer" if found.is_rounding else "Compare with --dtype float32"
        assert words in found.explained() and f"{found.moved:.2g}" in found.explained()


def test_identical_answers_do_not_differ():
    model, inputs, expected = told("llama", **GREEDY)
    assert first_difference(model, inputs, SEED, expected, expected.clone(), **GREEDY) is None


def test_an_answer_that_ends_early_differs_there():
    model, inputs, expected = told("llama", **GREEDY)
    found = first_difference(model, inputs, SEED, expected, expected[:, :-3], **GREEDY)
    assert found.step == TOKENS - 3 and found.patched is None and found.unpatched is not None
    assert not found.is_rounding and "report it as a bug" in found.explained()


def test_a_model_that_does_not_repeat_itself_has_no_margin():
    model, inputs, expected = told("llama", **GREEDY)
    prompt = inputs["input_ids"].shape[1]
    wrong = with_token(expected, prompt, (int(expected[0, prompt + STEP]) + 1) % 90)
    found = first_difference(model, inputs, SEED, wrong, expected, **GREEDY)
    assert found.margin is None and not found.is_rounding
    assert "does not give its own answer again" in found.explained()


def test_what_could_not_be_measured_is_not_called_rounding():
    found = Difference(0, 1, 2, 0.01, 0.01, None, torch.bfloat16)
    assert not found.is_rounding and "could not be measured" in found.explained()
    assert "--dtype float32" in found.explained()

"""What is kept of a prompt, against a plain statement of the rules, row by row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlavaOnevisionConfig, Qwen2VLConfig

import std_decode
from std_decode import generation
from std_decode.model.selection_rules import plan_selection, visual_tokens
from tests.decode.rules import rules

PATCH = dict(draft_length=4, top_k_keys=8)
WORD = 110  # no prompt of the tiny models has it


@st.composite
def prompts(draw):
    length = draw(st.integers(1, 150))
    rows = draw(st.integers(1, 3))
    start = [draw(st.integers(0, length - 1)) for _ in range(rows)]
    visual = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        for _ in range(draw(st.integers(0, 3))):
            first = draw(st.integers(0, length - 1))
            visual[row, first : first + draw(st.integers(1, 40))] = True
    return visual, torch.tensor(start, dtype=torch.int32)


@given(prompts(), st.integers(1, 200))
def test_plan_selection(prompt, top_k_keys):
    visual, kv_start = prompt
    plan = plan_selection(visual, kv_start, top_k_keys, visual.shape[1])
    most_kept = 0
    for row, start in enumerate(kv_start.tolist()):
        always, candidates, observers = rules(visual[row].tolist(), start)
        assert set(plan.always[row].nonzero()[:, 0].tolist()) == always
        assert set(plan.candidates[row].nonzero()[:, 0].tolist()) == candidates
        assert plan.observers[row] == observers
        most_kept = max(most_kept, len(always))
    length = visual.shape[1]
    assert plan.window == plan.observers.max()
    assert plan.width == min(length, most_kept + top_k_keys)
    assert plan.complete == (plan.width >= length - int(kv_start.min()))


def test_text_beyond_the_cap_competes():
    visual = torch.zeros(1, 5000, dtype=torch.bool)
    visual[0, 2000:2100] = True
    plan = plan_selection(visual, None, 10, 5000)
    always, candidates, observers = rules(visual[0].tolist(), 0)
    assert set(plan.always[0].nonzero()[:, 0].tolist()) == always
    assert len(always) == 4 + 2 * 1024 and len(candidates) == 5000 - len(always)
    assert int(plan.observers) == observers == 64


def test_visual_tokens_by_type_or_by_id():
    ids = torch.tensor([[9, 7, 8, 9]])
    qwen = Qwen2VLConfig(video_token_id=7, image_token_id=8)
    assert visual_tokens(ids, qwen, None).tolist() == [[False, True, True, False]]
    llava = LlavaOnevisionConfig(video_token_index=8, image_token_index=5)
    assert visual_tokens(ids, llava, None).tolist() == [[False, False, True, False]]
    types = torch.tensor([[0, 0, 2, 1]])
    assert visual_tokens(ids, qwen, types).tolist() == [[False, False, True, True]]


def marked(make_case, rows=1):
    """A text prompt (left-padded rows) whose columns 30 to 59 stand for a video, as `WORD`."""
    case = make_case("llama", seed=3, rows=rows)
    case.inputs["input_ids"][:, 30:60] = WORD
    return case


@pytest.fixture
def planned(monkeypatch):
    """What plan_selection was given and returned, call by call."""
    calls, plain = [], generation.plan_selection

    def plan(visual, *args):
        calls.append((visual.clone(), plain(visual, *args)))
        return calls[-1][1]

    monkeypatch.setattr(generation, "plan_selection", plan)
    return calls


def function_of(ids):
    return ids == WORD


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("form", ["ids", "[S]", "[1, S]", "[B, S]", "function"])
def test_the_caller_tells_which_tokens_are_visual(make_case, planned, form, rows):
    case = marked(make_case, rows)
    mask = case.inputs["input_ids"] == WORD
    options = {
        "ids": dict(visual_token_ids=(5, WORD)),
        "[S]": dict(visual_mask=mask[0]),
        "[1, S]": dict(visual_mask=mask[:1]),
        "[B, S]": dict(visual_mask=mask),
        "function": dict(visual_mask=function_of),
    }[form]
    expected = case.generate()
    with std_decode.patched(case.model, **PATCH, **options):
        got = case.generate()
        stats = std_decode.last_stats(case.model)
    assert torch.equal(expected, got) and stats.fallback is None and stats.rounds > 0
    ((visual, selection),) = planned
    assert torch.equal(visual, mask)
    assert torch.equal(selection.candidates, mask)
    assert torch.equal(selection.always, case.inputs["attention_mask"].bool() & ~mask)
    assert selection.observers.tolist() == [30] * rows
    assert stats.selected_keys == 60 + PATCH["top_k_keys"]


def test_rows_of_a_mask_are_told_apart(make_case, planned):
    case = marked(make_case, rows=2)
    mask = case.inputs["input_ids"] == WORD
    mask[1] = mask[1].roll(7)
    expected = case.generate()
    with std_decode.patched(case.model, **PATCH, visual_mask=mask):
        got = case.generate()
    assert torch.equal(expected, got)
    assert torch.equal(planned[0][1].candidates, mask)


def test_without_a_word_from_the_caller_a_text_prompt_has_nothing_visual(make_case, planned):
    case = marked(make_case)
    for options in ({}, dict(visual_token_ids=[])):
        with std_decode.patched(case.model, **PATCH, **options):
            case.generate()
        visual, selection = planned.pop()
        assert not visual.any()
        assert selection.candidates[0].nonzero().flatten().tolist() == list(range(4, 26))


def test_the_mask_goes_before_the_ids_and_these_before_what_the_inputs_tell(make_case, planned):
    case = make_case("qwen2_vl", seed=3)
    ids = case.inputs["input_ids"]
    told, word = case.inputs["mm_token_type_ids"] > 0, ids == ids[0, 0]
    mask = torch.zeros_like(told)
    mask[:, 10:20] = True
    expected = case.generate()
    by_ids = dict(visual_token_ids=[int(ids[0, 0])])
    for options, visual in (
        ({}, told),
        (by_ids, word),
        (dict(visual_mask=mask), mask),
        (dict(by_ids, visual_mask=mask), mask),
    ):
        with std_decode.patched(case.model, **PATCH, **options):
            got = case.generate()
        assert torch.equal(expected, got)
        assert torch.equal(planned.pop()[0], visual)


@pytest.mark.parametrize(
    ("visual_mask", "error", "words"),
    [
        (torch.ones(89, dtype=torch.bool), ValueError, r"bool of shape \(89,\), expected bool"),
        (torch.ones(2, 90, dtype=torch.bool), ValueError, r"\(2, 90\), .* shape \(3, 90\)"),
        (torch.ones(3, 90, 1, dtype=torch.bool), ValueError, "function of input_ids"),
        (lambda ids: (ids == WORD).int(), ValueError, "visual_mask is torch.int32"),
        (lambda ids: (ids == WORD).tolist(), TypeError, "visual_mask returned list, expected a b"),
    ],
    ids=["short", "rows", "rank", "ints", "list"],
)
def test_a_mask_that_does_not_fit_the_prompt(make_case, visual_mask, error, words):
    case = marked(make_case, rows=3)
    expected, kind = case.generate(), type(case.model)
    std_decode.patch(case.model, **PATCH, visual_mask=visual_mask)
    with pytest.raises(error, match=words):
        case.generate()
    std_decode.unpatch(case.model)
    assert type(case.model) is kind and torch.equal(case.generate(), expected)
    with std_decode.patched(case.model, **PATCH, visual_mask=function_of):
        assert torch.equal(case.generate(), expected)


def test_a_mask_is_repeated_as_generate_repeats_its_rows():
    """For num_return_sequences: row by row, not the batch as a whole."""
    ids, mask = torch.zeros(6, 3, dtype=torch.long), torch.eye(2, 3).bool()
    repeated = visual_tokens(ids, None, visual_mask=mask)
    assert torch.equal(repeated, mask[[0, 0, 0, 1, 1, 1]])

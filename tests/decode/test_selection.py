"""What is kept of a prompt, against a plain statement of the rules, row by row."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlavaOnevisionConfig, Qwen2VLConfig

from std_decode.selection import plan_selection, visual_tokens
from tests.decode.rules import rules


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

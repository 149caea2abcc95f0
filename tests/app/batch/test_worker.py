"""Together as one at a time: the tokens of single prompts, by the margin rule."""

from types import SimpleNamespace

import pytest
import torch

import std_decode
from std_decode.app.batch.worker import Job, Settings, Worker, collate
from tests.decode.families import FAMILIES, PAD
from tests.decode.margin import behind_best, near_ties

DEMO = Job(None, Settings("demo", None, 60, "float32"), False, dict(draft_length=4, top_k_keys=16))


def same_answers(worker, group):
    """Ask together and one by one; fail on a difference that rounding cannot explain."""
    together = worker._generate(group)
    alone = [worker._generate([inputs])[0] for inputs in group]
    for inputs, expected, got in zip(group, alone, together):
        if got == expected:
            continue
        std_decode.unpatch(worker.model)
        full = worker.model.generate(
            **inputs, do_sample=False, max_new_tokens=len(expected),
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        std_decode.patch(worker.model, **worker.job.patch)
        prompt = inputs["input_ids"]
        both = (torch.cat([prompt, torch.tensor([told])], 1) for told in (expected, got))
        near_ties(*both, prompt.shape[1], lambda step: behind_best(full.scores[step]))
    return together


@pytest.fixture(scope="module")
def demo():
    return Worker(DEMO)


@pytest.mark.parametrize("draft_length", [0, 4, "auto"])
def test_clips_together_are_narrated_as_alone(demo, clips, draft_length):
    demo.job.patch["draft_length"] = draft_length
    std_decode.unpatch(demo.model)
    std_decode.patch(demo.model, **demo.job.patch)
    group = [inputs for _, inputs in demo.read([str(clips / f"{i}.mp4") for i in range(6)])]
    lengths = {inputs["input_ids"].shape[1] for inputs in group}
    told = same_answers(demo, group)
    assert len(lengths) == 6 and len(set(map(tuple, told))) == 6
    assert all(tokens[-1] == demo.tokenizer.eos_token_id for tokens in told)
    assert std_decode.last_stats(demo.model).fallback is None


def single_prompts(family, inputs):
    """The rows of a batch, each by itself, without its padding."""
    singles, patches = [], 0
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        one = {
            name: value[row : row + 1, mask]
            for name, value in inputs.items()
            if value.shape == inputs["input_ids"].shape
        }
        if family == "qwen2_vl":
            one["video_grid_thw"] = inputs["video_grid_thw"][row : row + 1]
            count = int(one["video_grid_thw"].prod())
            one["pixel_values_videos"] = inputs["pixel_values_videos"][patches : patches + count]
            patches += count
        elif "pixel_values_videos" in inputs:
            one["pixel_values_videos"] = inputs["pixel_values_videos"][row : row + 1]
        singles.append(one)
    return singles


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
@pytest.mark.parametrize("seed", range(3))
def test_prompts_together_are_answered_as_alone(family, seed):
    torch.manual_seed(seed)
    model, inputs = FAMILIES[family].build(3)
    worker = Worker.__new__(Worker)
    worker.job = Job("", Settings("", 4, 24, "float32"), True, dict(draft_length=3, top_k_keys=8))
    worker.model = std_decode.patch(model.float().eval(), **worker.job.patch)
    worker.tokenizer = SimpleNamespace(pad_token_id=PAD)
    group = single_prompts(family, inputs)
    together = collate(group, PAD)
    assert together.keys() == inputs.keys()
    assert all(torch.equal(together[name], inputs[name]) for name in inputs)
    assert all(len(tokens) == 24 for tokens in same_answers(worker, group))


def test_what_cannot_be_put_together_is_answered_apart(demo, clips, monkeypatch):
    """As frames of different numbers, which LLaVA-OneVision stacks."""
    read = demo.read([str(clips / name) for name in ("0.mp4", "bad.mp4", "1.mp4", "2.mp4")])
    read[2][1]["pixels"] = torch.zeros(1, 3, 4)
    groups, plain = [], demo._generate
    monkeypatch.setattr(demo, "_generate", lambda group: groups.append(len(group)) or plain(group))
    monkeypatch.setattr(
        demo.model, "generate", lambda plain=demo.model.generate, pixels=None, **o: plain(**o)
    )
    rows = demo.answer(read)
    assert groups == [2, 1]
    by_name = {row["video"].rpartition("/")[2]: row for row in rows}
    assert by_name.keys() == {"0.mp4", "bad.mp4", "1.mp4", "2.mp4"}
    assert "not a readable video" in by_name["bad.mp4"]["error"]
    assert all("answer" in row for name, row in by_name.items() if name != "bad.mp4")


def test_one_that_fails_does_not_take_the_others_along(demo, clips, monkeypatch):
    read = demo.read([str(clips / f"{i}.mp4") for i in (0, 1, 2)])
    plain = demo.model.generate

    def generate(**options):
        if (options["video_grid_thw"][:, 0] == 6).any():
            raise torch.OutOfMemoryError("too much\nof it")
        return plain(**options)

    monkeypatch.setattr(demo.model, "generate", generate)
    rows = {row["video"][-5]: row for row in demo.answer(read)}
    assert rows["1"]["error"] == "OutOfMemoryError: too much" and len(rows) == 3
    assert "#" in rows["0"]["answer"] and "#" in rows["2"]["answer"]
    assert rows["0"]["tokens"] > 5 and rows["0"]["prompt_tokens"] == 24 * 4 + 9


def test_lists_are_put_one_behind_the_other():
    ids = torch.ones(1, 2, dtype=torch.long), torch.ones(1, 3, dtype=torch.long)
    group = [{"input_ids": i, "second_per_grid_ts": [0.5 * len(i[0])]} for i in ids]
    together = collate(group, 9)
    assert together["second_per_grid_ts"] == [1.0, 1.5]
    assert together["input_ids"].tolist() == [[9, 1, 1], [1, 1, 1]]

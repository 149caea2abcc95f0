"""The script that trained the demo model: it resumes, and it spreads positions as it says."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attend
from transformers import Qwen2VLForConditionalGeneration

from std_decode.demo import train
from std_decode.demo.camera import random_clip
from std_decode.demo.model import FOLDER, VIDEO_TOKEN, load_model, new_model, new_tokenizer


@pytest.fixture
def tiny_stages(monkeypatch):
    monkeypatch.setattr(train, "TOKENS_A_BATCH", 60)
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    return (train.Stage(2, 6, 6), train.Stage(2, 8, 100))


def test_an_interrupted_training_goes_on_where_it_was(tmp_path, monkeypatch, tiny_stages):
    train.train(tiny_stages, tmp_path / "straight.pt", seed=3, threads=1)
    plain, batches = train.training_batch, []

    def interrupted(*arguments):
        batches.append(arguments)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(train, "training_batch", interrupted)
    for _ in range(2):
        try:
            train.train(tiny_stages, tmp_path / "resumed.pt", seed=3, threads=1)
        except KeyboardInterrupt:
            assert len(batches) == 3
    assert len(batches) == 5  # two, the interrupted one, and the last two
    straight, resumed = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("straight", "resumed")
    )
    assert straight["done"] == resumed["done"] == 4
    assert straight["rng"] == resumed["rng"]
    for name, value in straight["model"].items():
        assert torch.equal(value, resumed["model"][name]), name
    untrained = new_model().state_dict()
    assert not torch.equal(untrained["lm_head.weight"], straight["model"]["lm_head.weight"])


def test_seconds_are_spread_in_order_and_the_text_follows(tiny_stages):
    model, tokenizer, rng = new_model(), new_tokenizer(), np.random.default_rng(0)
    reached = []
    for _ in range(20):
        batch = train.training_batch(model, tokenizer, train.Stage(1, 8, 500), rng)
        for ids, temporal in zip(batch["input_ids"], batch["position_ids"][0]):
            seconds = temporal[ids == VIDEO_TOKEN].view(-1, 4)
            assert (seconds == seconds[:, :1]).all()
            assert (seconds[1:, 0] > seconds[:-1, 0]).all()
            text = temporal[int((ids == VIDEO_TOKEN).nonzero()[-1]) + 1 :]
            assert (text[1:] == text[:-1] + 1).all() and text[0] > seconds[-1, 0]
            reached.append(int(text[0]))
    assert min(reached) < 20 and 100 < max(reached) <= 503


def test_an_idle_second_counts_as_often_as_the_clip_is_spread():
    """Attention over the weighted clip is that over a clip in which idle seconds are repeated."""
    clip = random_clip(seconds=6, events=2, rng=np.random.default_rng(1))
    first, length, span = 2, 2 + 6 * 4 + 3, 18
    mask = train.weighted_causal_mask([clip], first, length, span)
    times = torch.full((length,), 1)
    events = [event.second for event in clip.events]
    for second in set(range(6)) - set(events):
        times[first + 4 * second : first + 4 * second + 4] = 3
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, length, 8).double()
    got = attend(query[:, :, -1:], key, value, attn_mask=mask[:, :, -1:].double())
    repeated = [x.repeat_interleave(times, dim=2) for x in (key, value)]
    torch.testing.assert_close(got, attend(query[:, :, -1:], *repeated))
    assert mask[0, 0].isinf().equal(torch.ones(length, length).triu(1).bool())


def test_training_begins_with_a_given_model(tmp_path, tiny_stages):
    """At a learning rate of next to nothing it stays what it was."""
    train.train(tiny_stages[-1:], tmp_path / "state.pt", 0, 1, peak=1e-12, start=FOLDER)
    state, given = torch.load(tmp_path / "state.pt", weights_only=True), load_model().state_dict()
    for name, value in given.items():
        torch.testing.assert_close(state["model"][name], value, atol=1e-8, rtol=0)


@torch.no_grad()
def test_copied_kv_heads_leave_the_function_as_it_is():
    narrow = new_model().config
    narrow.text_config.num_key_value_heads = 2
    given = Qwen2VLForConditionalGeneration(narrow).eval()
    for name, weight in given.named_parameters():  # biases of keys and values begin as zeros
        if name.endswith("proj.bias"):
            weight.normal_()
    wide = train.widened(given).eval()
    assert wide.config.text_config.num_key_value_heads == 8
    ids = torch.randint(7, 60, (2, 9))
    torch.testing.assert_close(wide(ids).logits, given(ids).logits)


def test_the_learning_rate_rises_stays_and_falls():
    rates = [train.learning_rate(update, 1000, 1e-3) for update in range(1000)]
    assert rates[0] < rates[50] < rates[100] == rates[500] == 1e-3
    assert rates[700] > rates[850] > rates[999] > 0

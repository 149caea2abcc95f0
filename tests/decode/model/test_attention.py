"""Dense attention of one row on the CPU."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import std_decode
from std_decode.model import one_read
from std_decode.model.attention import Attending
from std_decode.model.running_pass import Pass
from std_decode.rounds.lookup import Lookup
from std_kernels import reference


@pytest.mark.parametrize(
    ("family", "reads_once"),
    [("llama", True), ("qwen2_vl", True), ("gemma3", True), ("gemma2", False), ("gpt_oss", False)],
)
def test_a_token_alone_reads_keys_once(make_case, monkeypatch, family, reads_once):
    """For all query heads of a KV head; where something else than a scale changes the logits,
    the model's own function attends. Some of Gemma's layers have a window."""
    case = make_case(family, 11, max_new_tokens=8)
    asked = dict(output_logits=True, return_dict_in_generate=True)
    expected = case.generate(**asked)
    config = case.model.get_decoder().config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    together, plain = [], nn.functional.scaled_dot_product_attention

    def note(query, key, *args, **options):
        if query.shape[1] == kv_heads < heads == query.shape[1] * query.shape[2]:
            together.append(key.shape[2])
        return plain(query, key, *args, **options)

    with std_decode.patched(case.model, draft_length=0):
        with monkeypatch.context() as patch:
            patch.setattr(nn.functional, "scaled_dot_product_attention", note)
            told = case.generate(**asked)
        stats = std_decode.last_stats(case.model)
    assert stats.fallback is None and stats.calls["dense"] == 7
    assert len(together) == (7 * config.num_hidden_layers if reads_once else 0)
    if family == "gemma3":  # two layers of three
        assert together.count(config.sliding_window) == 2 * 7
    assert torch.equal(told.sequences, expected.sequences)
    for ours, theirs in zip(told.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2"])
def test_what_was_looked_up_is_verified_by_one_read(make_case, monkeypatch, family):
    """Also in layers with a window; but not where the logits are capped, as Gemma 2 has it."""
    case = make_case(family, 11, max_new_tokens=24)
    expected, prompt = case.generate(), case.inputs["input_ids"].shape[1]
    answer, reads, plain = expected[0, prompt:].tolist(), [], one_read.attend

    def drafts(lookup, rows, count):
        at = len(lookup.texts[0].tokens) - prompt
        return [[*answer[at : at + count], *[3] * count][:count]]

    def note(attending):
        reads.append(attending.query.shape[2])
        return plain(attending)

    monkeypatch.setattr(Lookup, "found", lambda self, rows: SimpleNamespace(everywhere=True))
    monkeypatch.setattr(Lookup, "drafts", drafts)
    with std_decode.patched(case.model, draft_length=5, prompt_lookup=True):
        monkeypatch.setattr(one_read, "attend", note)
        assert torch.equal(case.generate(), expected)
        stats = std_decode.last_stats(case.model)
    assert stats.lookup_accepted > 10
    layers = case.model.get_decoder().config.num_hidden_layers
    several = [count for count in reads if count > 1]
    assert len(several) == (0 if family == "gemma2" else layers * stats.lookup_rounds)
    assert family == "gemma2" or max(several) == 6


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_drafts_of_the_model_s_own_are_verified_by_one_read(make_case, monkeypatch, family):
    """Which renews the selection: without a window, the scores come from it too."""
    case = make_case(family, 11, max_new_tokens=24)
    expected, reads, plain = case.generate(), [], one_read.attend

    def note(attending):
        reads.append(attending.scored)
        return plain(attending)

    with std_decode.patched(case.model, draft_length=3, top_k_keys=16):
        monkeypatch.setattr(one_read, "attend", note)
        assert torch.equal(case.generate(), expected)
        stats = std_decode.last_stats(case.model)
    config = case.model.get_decoder().config
    windows = getattr(config, "layer_types", []).count("sliding_attention")
    assert stats.rounds > 3
    assert reads.count(True) == stats.rounds * (config.num_hidden_layers - windows)
    assert reads.count(False) >= stats.rounds * windows


@pytest.fixture
def newest():
    """``newest(count, length, window)``: the attention of the `count` newest tokens of one row,
    `length` before them. What lies behind the row, and before its window, is NaN."""

    def make(count, length=40, window=None, heads=6, kv_heads=2, dim=16, rescore=False):
        torch.manual_seed(0)
        query = torch.randn(1, count, heads, dim).transpose(1, 2)
        key, value = torch.full((2, 1, kv_heads, length + count + 9, dim), float("nan"))
        first = 0 if window is None else max(0, length + 1 - window)
        for tensor in (key, value):
            known = torch.randn(1, kv_heads, length + count - first, dim)
            tensor[:, :, first : length + count] = known
        layer = SimpleNamespace(window=window)
        running = Pass("verify", SimpleNamespace(layers=[layer]), {}, rescore=rescore)
        running.one_read = length
        module = SimpleNamespace(layer_idx=0)
        return Attending(running, module, "sdpa", query, key, value, None, {"scaling": 0.3})

    return make


def exactly(attending, *lse, **options):
    """The same by the definition, in float64."""
    seen = attending.running.one_read + attending.query.shape[2]
    tensors = (x.double() for x in (attending.query, attending.key, attending.value))
    op = reference.verify_attention_with_scores if lse else reference.verify_attention
    return op(*tensors, torch.tensor([seen], dtype=torch.int32), *lse, scale=0.3, **options)


@pytest.mark.parametrize("window", [None, 1, 5, 30, 100])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_one_read_is_attention(newest, count, window):
    attending = newest(count, window=window)
    assert one_read.fits(attending)
    out = one_read.attend(attending).double().transpose(1, 2)
    torch.testing.assert_close(out, exactly(attending, window=window)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_it_scores_keys_as_the_op_does(newest, count, kv_heads):
    """A row whose estimate is not known gives no scores, and one too low as much as others."""
    attending = newest(count, kv_heads=kv_heads, rescore=True)
    layer, capacity = attending.layer, attending.key.shape[2]
    lse = torch.randn(1, 6, count)
    lse[0, 0, 0], lse[0, 1, -1], lse[0, 2, -1] = float("inf"), float("nan"), -float("inf")
    layer.lse_estimate, layer.scores = lambda: lse, torch.full((1, kv_heads, capacity), 7.0)
    assert one_read.fits(attending)
    out = one_read.attend(attending).double().transpose(1, 2)
    right, _, scores = exactly(attending, lse.double())
    torch.testing.assert_close(out, right, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.scores.double(), scores.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_its_numbers(newest, dtype):
    """Where no bits are promised: patch(reproducible=False)."""
    attending = newest(7, window=30)
    for name in ("query", "key", "value"):
        setattr(attending, name, getattr(attending, name).to(dtype))
    assert one_read.fits(attending)
    out = one_read.attend(attending)
    assert out.dtype == dtype
    right, _ = exactly(attending, window=30)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double().transpose(1, 2), right, rtol=2 * eps, atol=2 * eps)


def test_much_is_not_told_to_one_call(newest, monkeypatch):
    four, one, scored = newest(4, 1000), newest(1, 1000), newest(4, 1000, rescore=True)
    assert all(map(one_read.fits, (four, one, scored)))
    monkeypatch.setattr(one_read, "MOST_BIASES", 3 * 4 * 1004 - 1)
    monkeypatch.setattr(one_read, "MOST_LOGITS", 6 * 4 * 1004 - 1)
    assert not one_read.fits(four) and not one_read.fits(scored) and one_read.fits(one)
    scored.query = scored.query[:, :, 1:]
    assert one_read.fits(scored)
    scored.query = scored.query.bfloat16()  # a product's sums would be rounded before the softmax
    assert not one_read.fits(scored)

"""Dense attention of one row on the CPU."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import std_decode
from std_decode.model import attention
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
    answer, reads, plain = expected[0, prompt:].tolist(), [], attention._one_read

    def drafts(lookup, rows, count):
        at = len(lookup.texts[0].tokens) - prompt
        return [[*answer[at : at + count], *[3] * count][:count]]

    def note(attending):
        reads.append(attending.query.shape[2])
        return plain(attending)

    monkeypatch.setattr(Lookup, "found", lambda self, rows: SimpleNamespace(everywhere=True))
    monkeypatch.setattr(Lookup, "drafts", drafts)
    with std_decode.patched(case.model, draft_length=5, prompt_lookup=True):
        monkeypatch.setattr(attention, "_one_read", note)
        assert torch.equal(case.generate(), expected)
        stats = std_decode.last_stats(case.model)
    assert stats.lookup_accepted > 10
    layers = case.model.get_decoder().config.num_hidden_layers
    several = [count for count in reads if count > 1]
    assert len(several) == (0 if family == "gemma2" else layers * stats.lookup_rounds)
    assert family == "gemma2" or max(several) == 6


@pytest.mark.parametrize("window", [None, 1, 5, 30, 100])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_one_read_is_attention(count, window):
    """What lies behind the row, and before its window, is not read: it may be NaN."""
    torch.manual_seed(0)
    heads, kv_heads, dim, length = 6, 2, 16, 40
    query = torch.randn(1, count, heads, dim).transpose(1, 2)
    key, value = torch.full((2, 1, kv_heads, length + count + 9, dim), float("nan"))
    first = 0 if window is None else max(0, length + 1 - window)
    for tensor in (key, value):
        tensor[:, :, first : length + count] = torch.randn(
            1, kv_heads, length + count - first, dim
        )
    layer = SimpleNamespace(window=window)
    running = Pass("verify", SimpleNamespace(layers=[layer]), {}, one_read=length)
    module, given = SimpleNamespace(layer_idx=0), {"scaling": 0.3}
    attending = Attending(running, module, "sdpa", query, key, value, None, given)
    assert attending.reads_once
    out = attention._one_read(attending)
    seen = torch.tensor([length + count], dtype=torch.int32)
    right, _ = reference.verify_attention(
        query.double(), key.double(), value.double(), seen, window=window, scale=0.3
    )
    torch.testing.assert_close(out.double().transpose(1, 2), right, rtol=1e-5, atol=1e-6)


def test_much_is_not_told_to_one_call(monkeypatch):
    layer = SimpleNamespace(window=None)
    running = Pass("verify", SimpleNamespace(layers=[layer]), {}, one_read=1000)
    query, key = torch.empty(1, 6, 4, 16), torch.empty(1, 2, 2000, 16)
    attending = Attending(running, SimpleNamespace(layer_idx=0), "sdpa", query, key, key, None, {})
    assert attending.reads_once
    monkeypatch.setattr(attention, "MOST_BIASES", 3 * 4 * 1004 - 1)
    assert not attending.reads_once
    attending.query = query[:, :, :1]
    assert attending.reads_once

"""The attention of a dense step on the CPU."""

import pytest
import torch
from torch import nn

import std_decode


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

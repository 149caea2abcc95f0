"""Kernels for drafting and verifying on one dense KV cache: attention, selection, recurrence,
4-bit products, and what a decoder layer has between these.

    import torch
    import std_kernels as sk

    query = torch.randn(1, 8, 1, 64)                # one token, 8 query heads
    key, value = torch.randn(2, 1, 2, 4096, 64)     # 2 KV heads, room for 4096 tokens
    kv_len = torch.tensor([3000], dtype=torch.int32)
    tail_start = kv_len - 100
    scores = sk.score_keys(query, key, kv_len)
    indices = sk.select_topk(scores, 256, candidates=torch.arange(4096)[None] < tail_start)
    draft, _ = sk.sparse_attention(query, key, value, indices, tail_start, kv_len)
    dense, lse = sk.verify_attention(query, key, value, kv_len)

| dimension | what it counts |
|---|---|
| B | batch rows |
| Hq, Hkv | query heads, KV heads |
| G | Hq / Hkv, the query heads that share a KV head |
| T | query tokens of a call, the last T of the row |
| W | scoring queries, the last W of the row |
| N | capacity of the KV cache, not its length |
| K | selected keys |
| D | head dim; of a state Dk, Dv, and its heads Hk, Hv |
| P | slots of a ring of tokens |
| R | rows of tokens, B * T |
| S | partials of a split product |

`int4_linear` multiplies ``[R, K]`` with a weight ``[N, K]`` of 4 bits, which `pack_int4` lays out.

The ops are also `torch.ops.std_kernels.*`, with every argument positional and unchecked.
"""

from std_kernels.add_rms_norm import add_rms_norm
from std_kernels.causal_conv1d import causal_conv1d
from std_kernels.gated_delta_rule import gated_delta_rule
from std_kernels.int4_linear import int4_linear, int4_linear_partials, pack_int4
from std_kernels.renew_importance import renew_importance
from std_kernels.rope_write import rope_write
from std_kernels.score_keys import score_keys
from std_kernels.select_topk import select_topk
from std_kernels.silu_mul import silu_mul
from std_kernels.sparse_attention import sparse_attention
from std_kernels.verify_attention import verify_attention, verify_attention_with_scores

__all__ = [
    "causal_conv1d",
    "gated_delta_rule",
    "add_rms_norm",
    "int4_linear",
    "int4_linear_partials",
    "pack_int4",
    "renew_importance",
    "rope_write",
    "score_keys",
    "select_topk",
    "silu_mul",
    "sparse_attention",
    "verify_attention",
    "verify_attention_with_scores",
]

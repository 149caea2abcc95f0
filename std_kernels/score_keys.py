"""Which keys the last W queries look at: the attention probability of every key, averaged.

    scores[b, h, n] = mean over g, w of exp(logit(b, hG + g, w, n) - lse(b, hG + g, w))
    logit = scale * query . key, capped to softcap * tanh(logit / softcap) where a softcap is set

Selection at prefill in Sparse-to-Dense (Zhang et al., ACL 2025, doi
10.18653/v1/2025.acl-short.59, section 3). Bytes moved: every valid key once, 4 bytes of score a
key and KV head; the W x N matrix is never stored.
"""

import torch
from torch import Tensor

from std_kernels import cpu
from std_kernels._checks import check_no_grad, check_options, check_query_key, check_tensor
from std_kernels._library import register


def _fake(query, key, kv_len, kv_start, num_queries, scale, softcap, sinks):
    return key.new_empty(key.shape[:3], dtype=torch.float32)


_OP = register(
    "score_keys(Tensor query, Tensor key, Tensor kv_len, Tensor? kv_start, Tensor? num_queries, "
    "float scale, float? softcap, Tensor? sinks) -> Tensor",
    cpu.score_keys,
    _fake,
    "std_kernels._score_keys_kernels",
)


def score_keys(
    query: Tensor,
    key: Tensor,
    kv_len: Tensor,
    *,
    kv_start: Tensor | None = None,
    num_queries: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Computes how much attention the last queries of each row pay to every key.

    Row b's valid keys are `kv_start[b] <= n < kv_len[b]`; query w sits at position
    `kv_len[b] - W + w` and sees the valid keys up to itself. What lies outside the valid range is
    never read into a result and may be NaN.

    Args:
        query: [B, Hq, W, D] float16, bfloat16 or float32, inner stride 1: the row's last W
            positions. W >= 1, D a multiple of 8 from 16 to 512.
        key: [B, Hkv, N, D], query's dtype, inner stride 1. Hkv divides Hq, G = Hq/Hkv <= 16.
        kv_len: [B] int32, one past the last valid key, 0 to N.
        kv_start: [B] int32, the first valid key; 0 where None.
        num_queries: [B] int32 from 0 to W, how many of the last queries count; W where None.
        scale: factor on query . key; D**-0.5 where None.
        softcap: c > 0 caps logits to c * tanh(logit / c) before masking; None for no cap.
        sinks: [Hq] float32, one more logit per head that carries no value; None for none.

    Returns:
        [B, Hkv, N] float32, the mean over the group's G heads and the counted queries of the
        softmax probability given to key n. 0 outside the valid range. Each (b, h) sums to 1,
        less the sinks' share and the share of queries that see no key; `num_queries[b] = 0`
        gives zeros.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device, stride or range. Values inside tensors are not checked.
        RuntimeError: an input requires grad while gradients are enabled; there is no backward.

    Note:
        Hq * W * N * D multiply-adds. The CPU path takes one KV head at a time and its query rows
        in chunks: about 2^20 logits, and one head's keys in float32, exist at once. It reads
        kv_len on the host. On one core 0.27 s for Hq 28, Hkv 4, W 64, N 25000, D 128.
    """
    op = "score_keys"
    B, _, W, D, _, _ = check_query_key(op, query, key, "W", None)
    check_tensor(op, "kv_len", kv_len, query, torch.int32, (B,), "[B]")
    if kv_start is not None:
        check_tensor(op, "kv_start", kv_start, query, torch.int32, (B,), "[B]")
    if num_queries is not None:
        check_tensor(op, "num_queries", num_queries, query, torch.int32, (B,), "[B]")
    check_options(op, query, scale, softcap, sinks)
    check_no_grad(op, query, key, sinks)
    scale = D**-0.5 if scale is None else float(scale)
    return _OP(query, key, kv_len, kv_start, num_queries, scale, softcap, sinks)

"""Attention of the draft step: a few listed keys of a long cache, and everything after them.

    out[b, hq, t] = sum over n in S(b, h, t) of exp(logit(n) - lse) * value[b, h, n],  h = hq // G
    S(b, h, t) = {indices[b, h, :]} and {n : tail_start[b] <= n <= kv_len[b] - T + t}

The draft step of Sparse-to-Dense (Zhang et al., ACL 2025, doi 10.18653/v1/2025.acl-short.59).
Bytes moved: K + tail rows of K and of V for each KV head, whatever the cache's capacity.
"""

import torch
from torch import Tensor

from std_kernels import cpu
from std_kernels._checks import check_no_grad, check_options, check_query_key, check_tensor
from std_kernels._errors import bad_shape, not_a_tensor
from std_kernels._library import register
from std_kernels._packed import out_like


def _fake(query, key, value, indices, tail_start, kv_len, scale, softcap, sinks):
    return out_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


_OP = register(
    "sparse_attention(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor tail_start, "
    "Tensor kv_len, float scale, float? softcap, Tensor? sinks) -> (Tensor, Tensor)",
    cpu.sparse_attention,
    _fake,
    "std_kernels._sparse_attention_kernels",
)


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    tail_start: Tensor,
    kv_len: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes attention over selected keys and a contiguous tail of the KV cache.

    Every query sees all listed keys. Query t sits at position `kv_len[b] - T + t` and sees the
    tail up to itself. No other key is read into a result; it may be NaN. With T = 3, two listed
    keys and a tail of 4 (o seen, . not seen):

                listed   tail
        t = 0    o o     o o . .
        t = 1    o o     o o o .
        t = 2    o o     o o o o

    Args:
        query: [B, Hq, T, D] float16, bfloat16 or float32, inner stride 1: the row's last T
            positions. 1 <= T <= 64, D a multiple of 8 from 16 to 512.
        key: [B, Hkv, N, D], query's dtype, inner stride 1. Hkv divides Hq, G = Hq/Hkv <= 16.
        value: the same shape and dtype as key, inner stride 1.
        indices: [B, Hkv, K] int32, inner stride 1: positions, none twice in a (b, h). Entries
            < 0 or >= tail_start[b] are empty.
        tail_start: [B] int32, the first key of the tail, 0 to N.
        kv_len: [B] int32, one past the last key of the tail, 0 to N.
        scale: factor on query . key; D**-0.5 where None.
        softcap: c > 0 caps logits to c * tanh(logit / c) before masking; None for no cap.
        sinks: [Hq] float32, one more logit per head that carries no value; None for none.

    Returns:
        out [B, Hq, T, D] in query's dtype, in memory as [B, T, Hq, D], and lse [B, Hq, T] float32,
        the natural log of the sum of exp(logit), sinks included. A query that sees no key gets
        output 0 and lse -inf (the sink's logit, where there are sinks).

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device, stride or range. Values inside tensors are not checked.
        RuntimeError: an input requires grad while gradients are enabled; there is no backward.

    Note:
        Cost grows with K + tail, not with N. The Triton path makes two launches, reads the rows in
        place and nothing back. The CPU path reads the lengths on the host and copies those
        K + tail rows; empty entries at the end of every list are free, others cost a mask. In half
        precision its lse is good to eps/2 of query's dtype.
    """
    op = "sparse_attention"
    B, _, _, D, Hkv, N = check_query_key(op, query, key)
    check_tensor(op, "value", value, query, query.dtype, (B, Hkv, N, D), "[B, Hkv, N, D]")
    if not isinstance(indices, Tensor):
        raise not_a_tensor(op, "indices", indices, "an int32 tensor [B, Hkv, K]")
    if indices.dim() != 3:
        remedy = "pass what select_topk returns for one layer"
        raise bad_shape(op, "indices", indices, "3 dimensions [B, Hkv, K]", remedy)
    shape = (B, Hkv, indices.shape[2])
    check_tensor(op, "indices", indices, query, torch.int32, shape, "[B, Hkv, K]")
    check_tensor(op, "tail_start", tail_start, query, torch.int32, (B,), "[B]")
    check_tensor(op, "kv_len", kv_len, query, torch.int32, (B,), "[B]")
    check_options(op, query, scale, softcap, sinks)
    check_no_grad(op, query, key, value, sinks)
    scale = D**-0.5 if scale is None else float(scale)
    return _OP(query, key, value, indices, tail_start, kv_len, scale, softcap, sinks)

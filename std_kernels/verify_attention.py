"""Dense attention of the verify step, and the same with fresh key scores from one pass.

    out[b, hq, t] = sum over n of exp(logit(n) - lse) * value[b, h, n],  h = hq // G
        over max(kv_start[b], p - window + 1) <= n <= p,  p = kv_len[b] - T + t
    scores[b, h, n] = sum over g, t of sigmoid(logit(b, hG + g, t, n) - score_lse[b, hG + g, t])

The verify step of Sparse-to-Dense (Zhang et al., ACL 2025, doi 10.18653/v1/2025.acl-short.59);
the scores are this library's own. Bytes moved: K and V of the visible keys once for all T * G
rows of a KV head, and 4 bytes of score a key and KV head.
"""

import torch
from torch import Tensor

from std_kernels import cpu_verify
from std_kernels._checks import check_no_grad, check_options, check_query_key, check_tensor
from std_kernels._errors import bad_type, bad_value
from std_kernels._library import register
from std_kernels._packed import out_like

_KERNELS = "std_kernels._verify_attention_kernels"


def _fake(query, key, value, kv_len, kv_start, window, scale, softcap, sinks):
    return out_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _fake_with_scores(query, key, value, kv_len, score_lse, *options):
    return _fake(query, key, value, kv_len, *options[:-1])


_VERIFY = register(
    "verify_attention(Tensor query, Tensor key, Tensor value, Tensor kv_len, Tensor? kv_start, "
    "SymInt? window, float scale, float? softcap, Tensor? sinks) -> (Tensor, Tensor)",
    cpu_verify.verify_attention,
    _fake,
    _KERNELS,
)
_VERIFY_WITH_SCORES = register(
    "verify_attention_with_scores(Tensor query, Tensor key, Tensor value, Tensor kv_len, "
    "Tensor score_lse, Tensor? kv_start, SymInt? window, float scale, float? softcap, "
    "Tensor? sinks, Tensor(a!) scores) -> (Tensor, Tensor)",
    cpu_verify.verify_attention_with_scores,
    _fake_with_scores,
    _KERNELS,
)


def verify_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_len: Tensor,
    *,
    kv_start: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes dense causal attention of each row's last T tokens over its KV cache.

    Row b's valid keys are `kv_start[b] <= n < kv_len[b]`. Query t sits at position
    `p = kv_len[b] - T + t` and sees the valid keys up to itself, of which the last `window`.
    Nothing else is read into a result; it may be NaN. With T = 3, kv_start = 1, kv_len = 7 and
    capacity N = 9 (o seen, . not seen, x never read):

                  n =  0 1 2 3 4 5 6 7 8             n =  0 1 2 3 4 5 6 7 8
        t = 0, p = 4   x o o o o . . x x                  x x x o o . . x x
        t = 1, p = 5   x o o o o o . x x    window = 2    x x x . o o . x x
        t = 2, p = 6   x o o o o o o x x                  x x x . . o o x x

    Args:
        query: [B, Hq, T, D] float16, bfloat16 or float32, inner stride 1: the row's last T
            positions. 1 <= T <= 64, D a multiple of 8 from 16 to 512.
        key: [B, Hkv, N, D], query's dtype, inner stride 1. Hkv divides Hq, G = Hq/Hkv <= 16. N
            is a capacity, not a length.
        value: the same shape and dtype as key, inner stride 1.
        kv_len: [B] int32, one past the last valid key, 0 to N; the queries' own keys included.
        kv_start: [B] int32, the first valid key; 0 where None. How left padding is expressed.
        window: sliding-window size >= 1: query p sees p - window < n <= p. None for no window.
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
        Cost follows kv_len and window, not N. A row has the same bits whatever T, its place among
        the T tokens, what the other rows are, and what lies behind it: what is added up, and in
        which order, follows from its own position: on the CPU counted from kv_start and whatever
        the batch; in the Triton path counted from the buffer's beginning and for one B, since how
        many keys a program reads goes by B * Hkv * N. The Triton path makes two launches and reads
        nothing back. The CPU path reads the lengths on the host and makes one pass for rows that
        share a range, one a row otherwise; it relies on matrix products that add alike for 4 to
        32 rows, tries that once for each dtype and D, and computes the tokens one by one where it
        does not hold. In half precision its lse is good to eps/2 of query's dtype.
    """
    op = "verify_attention"
    scale = _check(op, query, key, value, kv_len, kv_start, window, scale, softcap, sinks)
    return _VERIFY(query, key, value, kv_len, kv_start, window, scale, softcap, sinks)


def verify_attention_with_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_len: Tensor,
    score_lse: Tensor,
    *,
    kv_start: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `verify_attention` and, from the same keys, scores for the next selection.

    `score_lse` estimates each row's log-sum-exp before the pass that would compute it. The
    sigmoid is the softmax probability for small weights, and stays bounded and in order where the
    estimate is too low, as it is for keys the draft never saw. Scores never touch `out`.

    Args:
        query, key, value, kv_len, kv_start, window, scale, softcap, sinks: as in
            `verify_attention`. Sinks enter the scores only through `score_lse`.
        score_lse: [B, Hq, T] float32, inner stride 1, natural log. +inf or NaN switches a row
            off.
        scores: [B, Hkv, N] float32, contiguous: where to write the scores, such as one layer's
            place in a buffer of all layers; a new tensor where None.

    Returns:
        out and lse as `verify_attention` returns them, and scores [B, Hkv, N] float32: the sum
        over the group's G heads and the T rows of sigmoid(logit - score_lse), over the rows that
        see key n; 0 where none does. The tensor given as `scores`, where one is.

    Raises:
        TypeError, ValueError, RuntimeError: as `verify_attention`.

    Note:
        As `verify_attention`, plus the scores: the Triton path takes them from the same pass over
        the keys, the CPU path reads the keys a second time.
    """
    op = "verify_attention_with_scores"
    scale = _check(op, query, key, value, kv_len, kv_start, window, scale, softcap, sinks)
    check_tensor(op, "score_lse", score_lse, query, torch.float32, query.shape[:3], "[B, Hq, T]")
    if scores is None:
        scores = query.new_empty(key.shape[:3], dtype=torch.float32)
    else:
        check_tensor(op, "scores", scores, query, torch.float32, key.shape[:3], "[B, Hkv, N]")
        if not scores.is_contiguous():
            found = f"has strides {scores.stride()}"
            remedy = "pass one layer of a tensor [L, B, Hkv, N]"
            raise bad_value(op, "scores", found, "a contiguous tensor", remedy)
        check_no_grad(op, scores)
    options = kv_start, window, scale, softcap, sinks
    out, lse = _VERIFY_WITH_SCORES(query, key, value, kv_len, score_lse, *options, scores)
    return out, lse, scores


def _check(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_len: Tensor,
    kv_start: Tensor | None,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> float:
    """Checks what both ops take and returns the scale to use."""
    B, _, _, D, Hkv, N = check_query_key(op, query, key)
    check_tensor(op, "value", value, query, query.dtype, (B, Hkv, N, D), "[B, Hkv, N, D]")
    check_tensor(op, "kv_len", kv_len, query, torch.int32, (B,), "[B]")
    if kv_start is not None:
        check_tensor(op, "kv_start", kv_start, query, torch.int32, (B,), "[B]")
    if window is not None:
        if not isinstance(window, (int, torch.SymInt)):
            found = f"is of type {type(window).__name__}"
            raise bad_type(op, "window", found, "an int", "pass None for no window")
        if window < 1:
            raise bad_value(op, "window", f"is {window}", "window >= 1", "pass None for no window")
    check_options(op, query, scale, softcap, sinks)
    check_no_grad(op, query, key, value, sinks)
    return D**-0.5 if scale is None else float(scale)

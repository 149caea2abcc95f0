"""The k best keys of every row, exactly and in position order.

    indices[..., b, h] = ascending positions of always[b], then of the k highest candidates,
                         the lower position first among equals; -1 at the end where fewer exist

The selection step of Sparse-to-Dense (Zhang et al., ACL 2025, doi
10.18653/v1/2025.acl-short.59). Bytes moved: each score a small, fixed number of times, 4 bytes a
score; 4 bytes an index.
"""

import torch
from torch import Tensor

from std_kernels import cpu
from std_kernels._checks import check_no_grad, check_tensor
from std_kernels._errors import bad_dtype, bad_shape, bad_stride, bad_type, bad_value, not_a_tensor
from std_kernels._library import register

_MAX_N = 1 << 20
_MAX_K = 1 << 14


def _fake(scores, k, candidates, always):
    return scores.new_empty((*scores.shape[:-1], k), dtype=torch.int32)


_OP = register(
    "select_topk(Tensor scores, SymInt k, Tensor? candidates, Tensor? always) -> Tensor",
    cpu.select_topk,
    _fake,
    "std_kernels._select_topk_kernels",
)


def select_topk(
    scores: Tensor,
    k: int,
    *,
    candidates: Tensor | None = None,
    always: Tensor | None = None,
) -> Tensor:
    """Selects the k highest-scoring positions of each row, bit for bit the same everywhere.

    `always` positions are taken first, candidates or not and whatever their score, NaN included;
    of more than k the highest positions. The rest is filled with the highest scores among
    `candidates`, the lowest position first among equals (-0 equals +0). Otherwise NaN and -inf are
    never selected; +inf is.

    Args:
        scores: [..., B, Hkv, N] float32, inner stride 1, any number of leading dimensions (the
            layers, say). N from 1 to 2^20.
        k: how many to select, 1 <= k <= N and k <= 16384.
        candidates: [B, N] bool, the positions that may be selected; all where None.
        always: [B, N] bool, the positions to take in any case; none where None. Keep padding
            out of both masks.

    Returns:
        [..., B, Hkv, k] int32, ascending positions, padded at the end with -1.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device, stride or range.
        RuntimeError: scores require grad while gradients are enabled; there is no backward.

    Note:
        O(N) work a row. The Triton path makes one launch for short rows and three for long ones,
        and reads nothing back; rows whose k-th best ties with thousands, and those of a k of many
        thousands, are read 18 times. An H200 is predicted to take about 40 us for
        [28, 1, 4, 132352] and k = 1024. On one CPU core 2.2 ms for [8, 1, 2, 16384], k = 256;
        positions are counted on the host there.
    """
    op = "select_topk"
    if not isinstance(scores, Tensor):
        raise not_a_tensor(op, "scores", scores, "a float32 tensor [..., B, Hkv, N]")
    if scores.dtype is not torch.float32:
        raise bad_dtype(op, "scores", scores, "float32")
    if scores.dim() < 3:
        remedy = "add dimensions of size 1 in front"
        raise bad_shape(op, "scores", scores, "at least 3 dimensions [..., B, Hkv, N]", remedy)
    B, N = scores.shape[-3], scores.shape[-1]
    if not 1 <= N <= _MAX_N:
        remedy = "pass a slice of the scores"
        raise bad_shape(op, "scores", scores, f"1 <= N <= {_MAX_N}", remedy)
    if scores.stride(-1) != 1 and N > 1:
        raise bad_stride(op, "scores", scores)
    if not isinstance(k, (int, torch.SymInt)):
        raise bad_type(op, "k", f"is of type {type(k).__name__}", "an int", "pass int(k)")
    if not 1 <= k <= N:
        remedy = "lower k or pass more scores"
        raise bad_value(op, "k", f"is {k}", f"1 <= k <= N = {N}", remedy)
    if k > _MAX_K:
        raise bad_value(op, "k", f"is {k}", f"k <= {_MAX_K}", "lower k")
    if candidates is not None:
        check_tensor(op, "candidates", candidates, scores, torch.bool, (B, N), "[B, N]")
    if always is not None:
        check_tensor(op, "always", always, scores, torch.bool, (B, N), "[B, N]")
    check_no_grad(op, scores)
    return _OP(scores, k, candidates, always)

"""The importance of keys, renewed by what the newest verification looked at.

    importance[l, b, h, n] = max(fade * importance[l, b, h, n], share[l, b, h, n]),  n < stop[b]
    share[l, b, h, n] = scores[l, b, h, n] / sum over m < stop[b] of scores[l, b, h, m]

This library's own rule of re-selection. Bytes moved: of the keys below `stop` the scores twice,
the importance once each way, 4 bytes each.
"""

import torch
from torch import Tensor

from std_kernels import cpu
from std_kernels._checks import check_no_grad, check_tensor
from std_kernels._errors import bad_dtype, bad_shape, bad_type, bad_value, not_a_tensor
from std_kernels._library import register


def _fake(importance, scores, stop, fade):
    return None


_OP = register(
    "renew_importance(Tensor(a!) importance, Tensor scores, Tensor stop, float fade) -> ()",
    cpu.renew_importance,
    _fake,
    "std_kernels._renew_importance_kernels",
)


def renew_importance(importance: Tensor, scores: Tensor, stop: Tensor, fade: float) -> Tensor:
    """Renews the importance of all layers' keys from the newest scores, in place.

    A key's importance is its share of the attention of the verification in which it mattered
    most, fading by `fade` a verification. Keys from `stop` on, and shares that are NaN, leave
    theirs as it is, but for the fading.

    Args:
        importance: [L, B, Hkv, S] float32, contiguous; written.
        scores: [L, B, Hkv, N] float32, contiguous, S <= N: what `verify_attention_with_scores`
            wrote for each layer.
        stop: [B] int32, one past the last key that competes, 0 to S. From there on nothing is
            written.
        fade: 0 to 1.

    Returns:
        `importance`.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device, stride or range. Values inside tensors are not checked.
        RuntimeError: an input requires grad while gradients are enabled; there is no backward.

    Note:
        The Triton path makes two launches for all layers and reads nothing back; it adds up chunks
        in a fixed order. The CPU path reads `stop` on the host and goes layer by layer.
    """
    op = "renew_importance"
    if not isinstance(importance, Tensor):
        raise not_a_tensor(op, "importance", importance, "a float32 tensor [L, B, Hkv, S]")
    if importance.dtype is not torch.float32:
        raise bad_dtype(op, "importance", importance, "float32")
    if importance.dim() != 4:
        remedy = "add a dimension of size 1 in front for one layer"
        raise bad_shape(op, "importance", importance, "4 dimensions [L, B, Hkv, S]", remedy)
    L, B, Hkv, S = importance.shape
    N = scores.shape[-1] if isinstance(scores, Tensor) and scores.dim() else 0
    words = "[L, B, Hkv, N]"
    check_tensor(op, "scores", scores, importance, torch.float32, (L, B, Hkv, N), words)
    if N < S:
        remedy = "pass the scores of the whole capacity"
        raise bad_shape(op, "scores", scores, f"N >= S = {S}", remedy)
    check_tensor(op, "stop", stop, importance, torch.int32, (B,), "[B]")
    for name, tensor in (("importance", importance), ("scores", scores)):
        if not tensor.is_contiguous():
            found = f"has strides {list(tensor.stride())}"
            raise bad_value(op, name, found, "a contiguous tensor", f"keep {name} as one buffer")
    if not isinstance(fade, (float, int)):
        raise bad_type(op, "fade", f"is of type {type(fade).__name__}", "a number", "pass a float")
    if not 0 <= fade <= 1:
        raise bad_value(op, "fade", f"is {fade}", "0 <= fade <= 1", "pass 1 for no fading")
    check_no_grad(op, importance, scores)
    _OP(importance, scores, stop, float(fade))
    return importance

"""Which keys a draft may read: what is always kept, what competes for the top K, and who votes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig

from std_kernels import select_topk

SINKS = 4  # first tokens, which attention falls back on when it looks for nothing
MOST_KEPT_TEXT = 1024  # per side of the visual tokens, nearest the end first
MOST_OBSERVERS = 64
MOST_INDICES = 16384
_VISUAL_IDS = ("video_token_id", "image_token_id", "video_token_index", "image_token_index")


@dataclass(frozen=True)
class Selection:
    """The rules of one prompt, for `std_kernels.score_keys` and `std_kernels.select_topk`.

    Attributes:
        always: positions every draft reads, bool ``[B, S]``: sinks, and the text on both sides of
            the visual tokens (of a prompt without any, its last tokens).
        candidates: positions that compete, bool ``[B, S]``: visual tokens, the text between them,
            and text over the cap. Padding is in neither.
        observers: how many of the last queries vote at prefill, int32 ``[B]``: the text after the
            last visual token.
        window: the largest of `observers`.
        width: length of the index lists, at most S.
        complete: every key of every row is selected, so there is nothing to choose.
    """

    always: Tensor
    candidates: Tensor
    observers: Tensor
    window: int
    width: int
    complete: bool

    def of(self, importance: Tensor) -> Tensor:
        """The keys of one layer's drafts, int32 ``[B, Hkv, K]``, by their importance."""
        return select_topk(
            importance,
            self.width,
            candidates=self.candidates.to(importance.device),
            always=self.always.to(importance.device),
        )

    def padded(self, columns: int, width: int) -> Selection:
        """The same with room for a longer prompt and more keys, so that shapes repeat."""
        more = (0, columns - self.always.shape[1])
        return replace(
            self,
            always=F.pad(self.always, more),
            candidates=F.pad(self.candidates, more),
            width=width,
            complete=self.complete or width >= self.always.shape[1],
        )


VisualMask: TypeAlias = Tensor | Callable[[Tensor], Tensor]


def visual_tokens(
    input_ids: Tensor,
    config: PreTrainedConfig,
    mm_token_type_ids: Tensor | None = None,
    *,
    visual_token_ids: Sequence[int] | None = None,
    visual_mask: VisualMask | None = None,
) -> Tensor:
    """Where the prompt holds video or image tokens, bool ``[B, S]``.

    The caller's mask tells, else the caller's ids, else the processor's token types, else the
    ids in the model's config.

    Raises:
        TypeError: `visual_mask` is a function that returns no tensor.
        ValueError: `visual_mask` does not fit the prompt.
    """
    if visual_mask is not None:
        given = visual_mask(input_ids) if callable(visual_mask) else visual_mask
        if not isinstance(given, Tensor):
            raise TypeError(
                f"generate: visual_mask returned {type(given).__name__}, expected a bool tensor "
                f"for input_ids of shape {tuple(input_ids.shape)}; return one from the function"
            )
        rows = torch.atleast_2d(given)
        # generate has repeated each row where it is to return several sequences of it.
        times, rest = divmod(len(input_ids), len(rows)) if len(rows) else (0, 1)
        if rows.dtype != torch.bool or rows.shape[1:] != input_ids.shape[1:] or rest:
            raise ValueError(
                f"generate: visual_mask is {given.dtype} of shape {tuple(given.shape)}, expected "
                f"bool for input_ids of shape {tuple(input_ids.shape)}; patch the model with a "
                "function of input_ids if prompts differ"
            )
        return rows.to(input_ids.device).repeat_interleave(times, dim=0)
    if visual_token_ids is None:
        if mm_token_type_ids is not None and mm_token_type_ids.shape == input_ids.shape:
            return (mm_token_type_ids > 0).to(input_ids.device)
        # Phi-4 has them in the part of its config that is about vision.
        parts = (config, getattr(config, "vision_config", None))
        ids = [getattr(part, name, None) for part in parts for name in _VISUAL_IDS]
        visual_token_ids = [i for i in ids if isinstance(i, int)]
    known = torch.tensor(list(visual_token_ids), device=input_ids.device)
    return torch.isin(input_ids, known)


def plan_selection(
    visual: Tensor, kv_start: Tensor | None, top_k_keys: int, new_tokens: int | Tensor
) -> Selection:
    """Decide what is kept of a prompt. Reads its shape back to the host once.

    Args:
        visual: bool ``[B, S]``.
        kv_start: first valid position of each row, int32 ``[B]``, or None.
        top_k_keys: candidates to select per layer and KV head.
        new_tokens: how many of the prompt's tokens prefill reads, of all rows or of each ``[B]``;
            only these can vote.
    """
    batch, length = visual.shape
    position = torch.arange(length, device=visual.device).expand(batch, -1)
    start = torch.zeros(batch, 1, dtype=torch.int64, device=visual.device)
    if kv_start is not None:
        start = kv_start[:, None].long()
    valid = position >= start
    visual = visual & valid
    has_visual = visual.any(1, keepdim=True)
    first = torch.where(visual, position, length).amin(1, keepdim=True)
    last = torch.where(visual, position, -1).amax(1, keepdim=True)
    before = (position < first) & (position >= first - MOST_KEPT_TEXT)
    after = (position > last) & (position >= length - MOST_KEPT_TEXT)
    newest = position >= length - MOST_OBSERVERS
    sinks = position < start + SINKS
    always = valid & (sinks | torch.where(has_visual, before | after, newest))
    observers = torch.where(has_visual, length - 1 - last, length)
    voters = (length - start)[:, 0].clamp(max=new_tokens)
    observers = torch.minimum(observers[:, 0].clamp(1, MOST_OBSERVERS), voters)
    kept, seen, window = torch.stack([always.sum(1), valid.sum(1), observers]).amax(dim=1).tolist()
    width = min(kept + top_k_keys, MOST_INDICES, length)
    return Selection(
        always=always,
        candidates=valid & ~always,
        observers=observers.int(),
        window=window,
        width=width,
        complete=width >= seen,
    )

"""What patch refuses of its options: each message names it, what it was, and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from std_decode.admission.bits import ROWS

MOST_DRAFTS = 63  # verification takes up to 64 tokens: the pending one and the drafts


def check(
    top_k_keys: Any,
    draft_length: Any,
    lookup: Any,
    reselect: Any,
    graphs: Any,
    compile: Any,
    fused: Any,
) -> None:
    for name, value in (("top_k_keys", top_k_keys), ("draft_length", draft_length)):
        wanted = "an int" + (' or "auto"' if name == "draft_length" else "")
        if name == "draft_length" and value == "auto":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"patch: {name} is {value!r}, expected {wanted}")
    if top_k_keys < 1:
        raise ValueError(
            f"patch: top_k_keys is {top_k_keys}, expected at least 1; 1024 is the default, a "
            "larger number makes drafts better and slower"
        )
    if draft_length != "auto" and not 0 <= draft_length <= MOST_DRAFTS:
        raise ValueError(
            f"patch: draft_length is {draft_length}, expected 0 <= draft_length <= {MOST_DRAFTS} "
            'or "auto"; 0 decodes densely'
        )
    if lookup != "auto" and not isinstance(lookup, bool):
        raise TypeError(f'patch: prompt_lookup is {lookup!r}, expected "auto", True or False')
    if not isinstance(reselect, bool):
        raise TypeError(f"patch: reselect is {reselect!r}, expected True or False")
    for name, value in (("cuda_graphs", graphs), ("fused_layers", fused)):
        if value != "auto" and not isinstance(value, bool):
            raise TypeError(f'patch: {name} is {value!r}, expected "auto", True or False')
    if not isinstance(compile, bool):
        raise TypeError(f"patch: compile is {compile!r}, expected True or False")


def check_offloading(
    kv_cache: Any, graphs: Any, compile: Any, fused: Any, windows: Sequence[int | None]
) -> None:
    if kv_cache is None:
        return
    if kv_cache != "offloaded":
        raise ValueError(f'patch: kv_cache is {kv_cache!r}, expected None or "offloaded"')
    for name, value in (("cuda_graphs", graphs), ("compile", compile), ("fused_layers", fused)):
        if value is True:
            raise ValueError(
                f'patch: {name} is True with kv_cache="offloaded", expected its default; the '
                "keys of such a pass are where no captured, compiled or fused one looks"
            )
    if any(windows):
        raise NotImplementedError(
            f'patch: kv_cache is "offloaded" for a model with sliding windows (of '
            f"{max(filter(None, windows))} tokens), expected one whose layers all attend to "
            "everything; leave kv_cache as it is"
        )


def check_reproducible(wanted: Any, draft_length: int | Literal["auto"]) -> None:
    if isinstance(wanted, bool) or wanted in ("auto", "unpatched"):
        rows = ROWS
        if wanted is not True:
            return
    elif isinstance(wanted, int):
        rows = wanted
        if not 2 <= rows <= MOST_DRAFTS + 1:
            raise ValueError(
                f"patch: reproducible is {wanted}, expected 2 to {MOST_DRAFTS + 1} tokens a pass; "
                f"True feeds {ROWS}"
            )
    else:
        raise TypeError(
            f'patch: reproducible is {wanted!r}, expected True, False, "auto", "unpatched" or the '
            "number of tokens in each pass"
        )
    if draft_length != "auto" and draft_length >= rows:
        raise ValueError(
            f"patch: draft_length is {draft_length}, expected less than the {rows} tokens that "
            f"reproducible={wanted!r} feeds in each pass; reproducible={draft_length + 1} feeds "
            "as many as these drafts need"
        )


def check_visual(visual_token_ids: Any, visual_mask: Any) -> None:
    if visual_token_ids is not None:
        ids = visual_token_ids if isinstance(visual_token_ids, Sequence) else [None]
        if isinstance(ids, str) or not all(type(i) is int for i in ids):
            raise TypeError(
                f"patch: visual_token_ids is {visual_token_ids!r}, expected a list of ints; for "
                "one id give [id]"
            )
    if visual_mask is None or callable(visual_mask):
        return
    if not isinstance(visual_mask, Tensor) or visual_mask.dtype != torch.bool:
        found = getattr(visual_mask, "dtype", repr(visual_mask))
        raise TypeError(
            f"patch: visual_mask is {found}, expected a bool tensor [B, S] or a function of "
            "input_ids that returns one"
        )

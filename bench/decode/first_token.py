"""Time to the first token of a prompt that is read from nothing, unpatched and patched."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import std_decode
from bench.decode.tables import DENSE, DRAFTS, STATIC, UNPATCHED, Results
from bench.models.prompts import Prompt


def first_tokens(
    prompt: Prompt, options: argparse.Namespace, results: Results, where: dict[str, Any],
    late: Callable[[], bool],
) -> None:  # fmt: skip
    """One row's, each way that is asked for; nothing is begun once it is `late`."""
    wanted: dict[str, AbstractContextManager[Any]] = {UNPATCHED: nullcontext()}
    if "static" in options.ways:
        wanted[STATIC] = nullcontext()
    if "dense" in options.ways:
        wanted[DENSE] = std_decode.patched(prompt.model, draft_length=0)
    if "drafts" in options.ways:
        drafts = dict(draft_length=options.draft_length[0], top_k_keys=options.top_k_keys[0])
        wanted[DRAFTS] = std_decode.patched(prompt.model, **drafts)
    for what, patched in wanted.items():
        record = {"kind": "first", "what": what, **where}
        if results.done(record):
            continue
        if late():
            results.keep({**record, "status": "skipped: out of time"})
            continue
        try:
            with patched:
                spans = prompt.first_token_seconds(static=what == STATIC)
        except Exception as error:  # whatever one runs into must not cost the others
            results.fail(record, error, what.startswith("ours"))
            continue
        results.keep(
            {**record, "status": "ok", "first_token_s": median(spans), "runs": len(spans)}
        )

"""``std-decode generate``: answer one question, patched, as it comes."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rich.console import Console
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import std_decode
from std_decode import parallel
from std_decode.app.answer import answer, one_line, patch_options, sampling
from std_decode.app.question import ask, check_question
from std_decode.parallel import Place


def generate(options: argparse.Namespace) -> int:
    """Run ``std-decode generate``: the answer to stdout, all else to stderr. Returns 0."""
    check_question(options)
    patch, chosen = patch_options(options), sampling(options)
    if options.tp:
        return parallel.run(lambda place: _generate(options, patch, chosen, place))
    return _generate(options, patch, chosen)


def _generate(
    options: argparse.Namespace,
    patch: dict[str, Any],
    chosen: dict[str, Any],
    place: Place | None = None,
) -> int:
    first = place is None or place.first  # the others compute, and say nothing
    console = Console(stderr=True, quiet=not first)
    disable_progress_bar()
    if not first:  # its warnings are the first one's
        set_verbosity_error()
    with one_line():
        question = ask(options, console, place)
        with std_decode.patched(question.model, **patch) as model:
            answer(
                model,
                question.inputs,
                question.tokenizer,
                options.seed,
                _write if first else None,
                max_new_tokens=question.most_tokens,
                **chosen,
            )
            stats = std_decode.last_stats(model)
    assert stats is not None
    if options.stats:
        console.print(str(stats), markup=False, highlight=False, soft_wrap=True)
    elif stats.fallback is not None:
        console.print(f"ran as unpatched: {stats.fallback}", markup=False, highlight=False)
    return 0


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

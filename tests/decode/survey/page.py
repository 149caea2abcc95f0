"""The list in docs/causal-lms.md, made from the outcomes."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from tests.decode.survey.ask import IDENTICAL, NOT_BUILT, REFUSED, UNPATCHED, Outcome

PAGE = Path(__file__).parents[3] / "docs" / "causal-lms.md"
MEANINGS = {
    IDENTICAL: "accelerated, and every token is that of the model unpatched",
    UNPATCHED: "`patch` takes it, and each call runs as if it had not; `last_stats` says why",
    REFUSED: "`patch` raises NotImplementedError with these words; the model is as it was",
    NOT_BUILT: "not asked: its default configuration makes no small model here",
}
_HEAD = """\
# Is my model in?

What `std_decode.patch` makes of every class that `AutoModelForCausalLM` and `AutoModelForImageTextToText` load in
transformers {version}, {count} in all. `type(model).__name__` gives the name to look for.

| outcome | classes | |
|---|---|---|
{counts}

Each was asked as a tiny model of its default configuration: a few layers, one at least of each kind,
random weights, float32, text alone; greedy and sampled, one prompt and a left-padded batch. A
checkpoint may be configured otherwise (other kinds of layers, a sliding window or none, wider
heads), and then something else may be true of it: what counts is what `patch` says of the model itself.
Models that see are tested with [real pixels](models.md#models-that-are-tested), too.

Written by `python -m tests.decode.survey --write`.

| class | outcome |
|---|---|
"""  # noqa: E501


def written(outcomes: dict[str, Outcome], version: str) -> str:
    """The whole page.

    Args:
        outcomes: by the name of the class.
        version: of transformers.
    """
    count = Counter(outcome.kind for outcome in outcomes.values())
    counts = "\n".join(f"| {kind} | {count[kind]} | {MEANINGS[kind]} |" for kind in MEANINGS)
    lines = [f"| `{name}` | {line(outcomes[name])} |" for name in sorted(outcomes, key=str.lower)]
    head = _HEAD.format(version=version, count=len(outcomes), counts=counts)
    return head + "\n".join(lines) + "\n"


def line(outcome: Outcome) -> str:
    """An outcome as the page and the command print it."""
    joint = ", " if outcome.kind == IDENTICAL else ": "
    return outcome.kind + (joint + outcome.why.replace("|", "\\|") if outcome.why else "")


def listed(page: str) -> dict[str, str]:
    """By the name of the class, what the page says of it."""
    return dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", page, re.MULTILINE))


def version_of(page: str) -> str:
    """The version of transformers that the page was written with."""
    return re.search(r"transformers ([\w.]+), \d+ in all", page)[1]

"""All that is measured of one question, and the options that it speaks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.progress import Progress
from torch import Tensor

from std_decode.app.sparsity import measure
from std_decode.app.sparsity.measure import DraftsPoint, KeysPoint, NotMeasurable
from std_decode.app.sparsity.prompt import with_cache
from std_decode.app.sparsity.suggest import Suggestion, suggest, suggest_keys
from std_decode.stats import DecodeStats


@dataclass(frozen=True)
class Findings:
    """What `investigate` measured.

    Attributes:
        answer: the dense one, greedy, ``[T]``.
        stats: of the call that gave it.
        keys: by ascending number of keys, the last one all that compete.
        kept_by_text, kept_by_best: see `measure.Teacher`; by layer, the latter {} without
            hindsight.
        rounds: by ascending draft length from 0, with the suggested number of keys.
    """

    answer: Tensor
    stats: DecodeStats
    keys: list[KeysPoint]
    kept_by_text: dict[int, list]
    kept_by_best: dict[int, list]
    rounds: list[DraftsPoint]
    suggestion: Suggestion


def investigate(
    model: Any,
    inputs: dict[str, Any],
    most_tokens: int,
    top_k_keys: Sequence[int],
    draft_lengths: Sequence[int],
    progress: Progress,
    *,
    hindsight: bool = True,
    **options: Any,
) -> Findings:
    """Answer densely, then along that answer with each number of keys and each draft length.

    Args:
        model: unpatched.
        inputs: of one prompt, as generate takes them.
        most_tokens: `max_new_tokens`.
        top_k_keys: to compare, besides all.
        draft_lengths: to compare, besides none.
        hindsight: whether to measure what the best keys of each token keep, too.
        **options: of `patch`, for the drafts.

    Raises:
        NotMeasurable: the model's calls cannot be looked into, or the answer is too short.
        NotImplementedError: the model cannot be patched.
    """
    most = measure.candidates(model, inputs)
    sweep = sorted({k for k in top_k_keys if k < most} | {most})
    lengths = [0, *sorted(set(draft_lengths))]
    task = progress.add_task("the dense answer", total=2 + len(sweep) + 2 * len(lengths))
    _, answer, stats = measure.watched(model, inputs, measure.Timed, most_tokens, draft_length=0)
    if len(answer) < 3:
        raise NotMeasurable(
            f"the dense answer has {len(answer)} tokens, too few to measure drafts by; ask for "
            "a longer one"
        )
    progress.update(task, advance=1, description="the video, once and for all")
    inputs = with_cache(model, inputs, answer)
    points, text, best = [], {}, {}
    for keys in sweep:
        progress.update(task, advance=1, description=f"along the answer with {keys} keys")
        best_of = sweep if hindsight and keys == most else ()
        point, teacher = measure.teach(model, inputs, answer, keys, best_of, **options)
        points.append(point)
        if keys == most:
            text = teacher.mean(teacher.kept_by_text)
            best = teacher.mean(teacher.kept_by_best)
    chosen = suggest_keys(points)

    def tell(gamma: int) -> None:
        progress.update(task, advance=1, description=f"rounds of {gamma} drafts, {chosen} keys")

    rounds = measure.time_rounds(model, inputs, len(answer), chosen, lengths, tell, **options)
    suggestion = suggest(points, rounds, chosen)
    return Findings(answer, stats, points, text, best, rounds, suggestion)

"""Where two answers part, and whether rounding explains it.

Feeding several tokens at once rounds differently from feeding them one by one. So where the two
best tokens are close, the choice may fall either way. How close is close: in float32 the margin
that is promised; in 16 bits what rounding does to the unpatched model's own margins, measured by
having it read its own answer in one pass.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MARGIN = 1e-4  # of log-probability (less log noise): below it float32 rounding may decide
MORE = 64  # steps, so that rounding is judged by many, however early answers part


@dataclass(frozen=True)
class Difference:
    """The first step at which the patched answer is another one than the unpatched.

    Attributes:
        step: of the answer, from 0.
        unpatched, patched: the tokens there; None where that answer is at its end.
        margin: log-probability of the unpatched model's best token less that of its second (when
            sampling, of each less the log of its random number); None where one answer just ends,
            or the unpatched model did not repeat its own.
        behind: the same of the best less the patched answer's token; `margin` as a rule.
        moved: how far the margins of the unpatched model's steps, to `MORE` after this one, move
            at most when it reads the same text in one pass; None where it could not be told.
        dtype: of the model.
        promised: whether the patched answer was to have the unpatched model's bits.
    """

    step: int
    unpatched: int | None
    patched: int | None
    margin: float | None
    behind: float | None
    moved: float | None
    dtype: torch.dtype
    promised: bool = False

    @property
    def is_rounding(self) -> bool:
        """Whether the difference is one that rounding explains, and so no bug."""
        if self.behind is None or self.promised:
            return False
        if self.dtype in (torch.float32, torch.float64):
            return self.behind < MARGIN
        # Either answer has been moved.
        return self.moved is not None and self.behind <= 2 * self.moved

    def explained(self) -> str:
        """What it is, in a sentence or three."""
        kind = str(self.dtype).removeprefix("torch.")
        if self.promised:
            return (
                "The unpatched model's own bits were promised, which no rounding excuses: please "
                "report it as a bug."
            )
        if self.unpatched is None or self.patched is None:
            return "One answer ends there, the other goes on: please report it as a bug."
        if self.margin is None or self.behind is None:
            return (
                "The unpatched model, asked again, does not give its own answer again, so no "
                "margin can be told and nothing be said of the patch."
            )
        said = f"The two best tokens are {self.margin:.2g} apart there in log-probability"
        if self.behind != self.margin:
            said += f", and the patched answer's is {self.behind:.2g} behind the best"
        if self.is_rounding and kind in ("float32", "float64"):
            return (
                f"{said}: a near tie, closer than {MARGIN:g}, which the rounding of {kind} may "
                "decide either way. It is the one exception to identical tokens."
            )
        if kind in ("float32", "float64"):
            return f"{said}, more than rounding explains: please report it as a bug."
        check = (
            "Compare with --dtype float32: if the tokens differ there too, where the best ones "
            f"are more than {MARGIN:g} apart, please report it as a bug."
        )
        if self.moved is None:
            return f"{said}. What the rounding of {kind} does could not be measured. {check}"
        said += (
            f". The unpatched model's own margins move by up to {self.moved:.2g} when it reads "
            "the same text in one pass instead of token by token"
        )
        if self.is_rounding:
            return f"{said}. It is the rounding of {kind}: neither answer is the more exact one."
        return f"{said}, which does not explain it. {check}"


def first_difference(
    model: Any,
    inputs: dict[str, Tensor],
    seed: int,
    expected: Tensor,
    got: Tensor,
    **options: Any,
) -> Difference | None:
    """Compare a patched answer with the unpatched one.

    Args:
        model: unpatched.
        inputs: of the prompt, one row.
        seed: of both answers.
        expected, got: prompt and answer of the unpatched and the patched model, ``[1, S + T]``.
        **options: of generate, as they were for both; `max_new_tokens` is left to this function.
    """
    prompt = inputs["input_ids"].shape[1]
    right, found = expected[0, prompt:].tolist(), got[0, prompt:].tolist()
    if right == found:
        return None
    both = min(len(right), len(found))
    step = next((n for n in range(both) if right[n] != found[n]), both)
    if step == both:  # one answer just ends
        ours, theirs = (told[step] if step < len(told) else None for told in (found, right))
        return Difference(step, theirs, ours, None, None, None, model.dtype)
    ours, theirs = found[step], right[step]
    torch.manual_seed(seed)
    output = model.generate(
        **inputs,
        **{**options, "max_new_tokens": min(len(right), step + 1 + MORE)},
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    again = output.sequences
    value = output.scores[step][0].float().log_softmax(dim=-1)
    if options.get("do_sample"):
        value = value - _noise(value, seed, step).log()
    best, second = value.topk(2).values.tolist()
    # An answer that does not repeat itself, or a random number that was not foreseen, would make
    # the margin another choice's.
    repeated = torch.equal(again.cpu(), expected[:, : again.shape[1]].cpu())
    if not repeated or value[theirs] < best:
        return Difference(step, theirs, ours, None, None, None, model.dtype)
    moved = _moved(model, inputs, again[:, :-1], torch.cat(output.logits).float())
    behind = best - float(value[ours])
    return Difference(step, theirs, ours, best - second, behind, moved, model.dtype)


def _noise(like: Tensor, seed: int, step: int) -> Tensor:
    """Draws of torch.multinomial at `step`, ``[V]``: it takes the largest of p / Exp(1)."""
    torch.manual_seed(seed)
    noise = torch.empty(1, *like.shape, device=like.device)
    for _ in range(step + 1):
        noise.exponential_(1)
    return noise[0]


@torch.no_grad()
def _moved(
    model: Any, inputs: dict[str, Tensor], sequence: Tensor, by_step: Tensor
) -> float | None:
    """How far margins move, at most, where `sequence` is read in one pass; by_step ``[T, V]``."""
    ids = inputs["input_ids"]
    whole: dict[str, Any] = {"use_cache": False}
    for name, value in inputs.items():
        if getattr(value, "shape", None) == ids.shape:
            more = sequence.shape[1] - ids.shape[1]
            filling = 1 if name == "attention_mask" else 0
            value = torch.nn.functional.pad(value, (0, more), value=filling)
        whole[name] = value
    whole["input_ids"] = sequence.to(ids.device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        whole["logits_to_keep"] = len(by_step)
    try:
        at_once = model(**whole).logits[0, -len(by_step) :].float()
    except Exception:  # what a model has against it says nothing of the answers
        return None
    best = by_step.topk(2, dim=-1).indices
    margins = [x.gather(1, best).diff(dim=1) for x in (by_step, at_once)]
    return float((margins[0] - margins[1]).abs().max())

"""What `patch` makes of one model, and whether it then says what it said before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import std_decode
from std_decode.admission.eligibility import SUPPORTED
from tests.decode.conftest import Case
from tests.decode.survey.build import PAD, note_on

PROMPT, NEW, PADDING = 60, 24, 7
FEWEST_TOKENS = 12  # of those that all calls say
OPTIONS = dict(draft_length=4, top_k_keys=8)
IDENTICAL, UNPATCHED, REFUSED, NOT_BUILT, FAULT = (
    "identical", "runs as unpatched", "refused", "not built", "FAULT",
)  # fmt: skip

NO_TRIAL = "did not run a trial"


@dataclass(frozen=True)
class Outcome:
    """Of one class: one of the five above, and why."""

    kind: str
    why: str = ""


def ask(model: Any, no_weights: str | None = None) -> Outcome:
    """Patch `model` and compare what it generates, and what it is, with what that was before.

    Args:
        no_weights: why it is on the meta device and cannot be run, if it is.
    """
    cases = questions(model) if no_weights is None else []
    expected = [said(case) for case in cases]  # first: some models keep their newest positions
    broken = next((e for e in expected if isinstance(e, Exception)), None)
    name, before = type(model).__name__, state(model)
    try:
        std_decode.patch(model, **OPTIONS)
    except NotImplementedError as error:
        why = str(error)
    except TypeError as error:
        if "expected a transformers model that can generate()" not in str(error):
            return Outcome(FAULT, f"patch raised {told(error)}")
        return Outcome(REFUSED, "has no generate() (this one is a TypeError)")
    except Exception as error:
        return Outcome(FAULT, f"patch raised {told(error)}")
    else:
        if broken is not None:
            return Outcome(FAULT, f"accepted, but does not run unpatched: {told(broken)}")
        return _compared(model, before, cases, expected)
    changed = _changed(model, before)
    if changed is not None:
        return Outcome(FAULT, f"refused, and {changed} changed")
    if any(not _same(right, said(case)) for case, right in zip(cases, expected)):
        return Outcome(FAULT, "refused, and now it says something else")
    if name not in why or not why.endswith(f"; {SUPPORTED}"):
        return Outcome(FAULT, f"the refusal names no {name}: {why}")
    why = (
        why.removeprefix(f"patch: {name} ").removeprefix("patch: ").removesuffix(f"; {SUPPORTED}")
    )
    if NO_TRIAL in why and no_weights is not None:
        return Outcome(NOT_BUILT, no_weights)
    if NO_TRIAL in why and broken is not None:
        return Outcome(NOT_BUILT, f"does not run when small: {told(broken)}")
    return Outcome(REFUSED, why)


def _compared(
    model: Any, before: dict[str, Any], cases: list[Case], expected: list[Tensor]
) -> Outcome:
    got, stats = [], []
    for case in cases:
        got.append(said(case))
        stats.append(std_decode.last_stats(model))
    std_decode.unpatch(model)
    for found in got:
        if isinstance(found, Exception):
            return Outcome(FAULT, f"patched, generate raised {told(found)}")
    changed = _changed(model, before)
    if changed is not None:
        return Outcome(FAULT, f"unpatched, and {changed} changed")
    for case, right, found in zip(cases, expected, got):
        try:
            case.assert_same_tokens(right, found)
        except AssertionError as error:
            return Outcome(FAULT, f"other tokens: {error}")
    tokens = {token for rows in expected for token in rows[:, PROMPT:].flatten().tolist()}
    if len(tokens) < FEWEST_TOKENS:
        return Outcome(FAULT, f"says {len(tokens)} different tokens, so that nothing shows")
    if stats[0].fallback is not None:
        return Outcome(UNPATCHED, stats[0].fallback)
    if not all(one.drafted and one.fallback is None for one in stats):
        return Outcome(FAULT, "a call was not accelerated")
    return Outcome(IDENTICAL, note_on(model.config))


def questions(model: Any) -> list[Case]:
    """Greedy, of one row and of two, one of which is padded; and these sampled."""
    torch.manual_seed(1)
    ids = torch.randint(7, 99, (2, PROMPT))
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :PADDING], mask[1, :PADDING] = PAD, 0
    one = {"input_ids": ids[:1], "attention_mask": mask[:1]}
    two = {"input_ids": padded, "attention_mask": mask}
    length = dict(max_new_tokens=NEW, min_new_tokens=NEW)
    return [
        Case(model, inputs, {"do_sample": sampled, **length})
        for inputs, sampled in ((one, False), (two, False), (two, True))
    ]


def said(case: Case) -> Tensor | Exception:
    """The tokens, or what generate raises."""
    try:
        return case.generate()
    except Exception as error:
        return error


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Exception) or isinstance(other, Exception):
        return type(one) is type(other)
    return torch.equal(one, other)


def state(model: Any) -> dict[str, Any]:
    """All that patch could leave behind on a model, by what it is called."""
    hooks = ("_forward_pre_hooks", "_forward_hooks")
    return {
        "its class": type(model),
        "its attributes": {
            (name, key): None if key.startswith("_") else _known(value)
            for name, module in model.named_modules()
            for key, value in vars(module).items()
        },
        "its hooks": [len(getattr(m, kind)) for m in model.modules() for kind in hooks],
        "its modes": [module.training for module in model.modules()],
        "its config": repr(model.config.to_dict()),
        "its attention": [
            module.config._attn_implementation
            for module in model.modules()
            if hasattr(module, "config") and hasattr(module.config, "_attn_implementation")
        ],
    }


def _known(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() < 100 else id(value)
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def _changed(model: Any, before: dict[str, Any]) -> str | None:
    after = state(model)
    changed = next((name for name in before if before[name] != after[name]), None)
    if isinstance(before.get(changed), dict):
        keys = {*before[changed], *after[changed]}
        differ = [k for k in keys if before[changed].get(k) != after[changed].get(k)]
        return ", ".join(".".join(filter(None, key)) for key in sorted(differ))
    return changed


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

"""What is measured of a model, one prompt and the dense answer to it.

Every figure comes from generate calls of the patched model itself, its own selection and its own
ops, with someone looking on: `Decoding` is subclassed, nothing of it is done a second time.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from std_decode.model.attention import Attending, Result
from std_decode.model.cache import CACHE, BufferLayer, SparseToDenseCache
from std_decode.model.selection_rules import MOST_INDICES, plan_selection, visual_tokens
from std_decode.model.switch import observed_by
from std_decode.patching import last_stats, patched
from std_decode.rounds.loop import Decoding
from std_kernels import score_keys, sparse_attention, verify_attention

SWEEP_DRAFT_LENGTH = 4  # of the runs that compare numbers of keys
# The model's own generation config may sample; None keeps transformers from warning.
GREEDY = dict(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None)


class NotMeasurable(ValueError):
    """Why a model or an answer tells nothing; the message is one line, for a user."""


@dataclass(frozen=True)
class KeysPoint:
    """What drafts that read `top_k_keys` keys see and say, along the dense answer.

    Attributes:
        top_k_keys: candidates selected per layer and KV head.
        drafted: tokens of the answer that were drafted, each after the dense answer so far.
        agreed: how many of these the sparse model chose as the dense one did.
        kept: share of the attention of the dense model's tokens that falls on the keys a draft
            reads, text included: by layer, a value for each KV head, mean over its query heads and
            the answer's tokens.
    """

    top_k_keys: int
    drafted: int
    agreed: int
    kept: dict[int, list[float]]

    @property
    def agreement(self) -> float:
        return self.agreed / max(1, self.drafted)


@dataclass(frozen=True)
class DraftsPoint:
    """Rounds of one draft length, as `generate` runs them; of length 0 dense steps.

    Attributes:
        tokens_per_pass: tokens emitted after the first, per dense pass.
        acceptance: how often a draft agreed, given that those before it in its round did; None
            where nothing was drafted.
        round_seconds: median time of a round: drafts, verification, selection, acceptance.
        draft_seconds: median time of a draft step on the host; 0 without drafts.
    """

    draft_length: int
    tokens_per_pass: float
    acceptance: float | None
    round_seconds: float
    draft_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_pass / self.round_seconds


class Teacher(Decoding):
    """Drafts along a given answer: notes what the sparse model would say, drafts what is right.

    Args:
        answer: the dense model's, ``[tokens]``.
        best_of: numbers of keys to find the best keys of in hindsight, ascending; () for none.

    Attributes:
        agreed: of each drafted token whether the sparse model chose it too.
        kept, kept_by_text, kept_by_best: attention kept, see `KeysPoint`: by the keys that a draft
            reads, by those of them that it reads in any case, and by the keys that each token
            attends to most, ``[len(best_of), Hkv]``. Sums over `tokens` tokens, by layer.
    """

    def __init__(self, *args: Any, answer: Tensor, best_of: Sequence[int] = (), **options: Any):
        super().__init__(*args, **options)
        self.answer, self.best_of = answer, list(best_of)
        self.agreed: list[bool] = []
        self.tokens: dict[int, int] = defaultdict(int)
        self.kept: dict[int, Any] = defaultdict(float)
        self.kept_by_text: dict[int, Any] = defaultdict(float)
        self.kept_by_best: dict[int, Any] = defaultdict(float)

    def run(self, *args: Any) -> Tensor:
        with observed_by(self.weigh):
            return super().run(*args)

    def draft(self, logits: Tensor, step: int) -> Tensor:
        at = self.rows.at[0] + step
        right = self.answer[at : at + 1]
        token, _ = self.choose(logits, self.rows, step)
        self.agreed.append(bool(token == right))
        self.rows.write(right[:, None], step)
        return right

    def weigh(self, attending: Attending) -> Result:
        """Note where a verification's tokens attend, query ``[1, Hq, T, D]``."""
        running, layer = attending.running, attending.layer
        if running.phase == "verify" and layer.window is None:
            self.note(attending, running.cache, layer)
        return attending()

    def note(self, attending: Attending, cache: SparseToDenseCache, layer: BufferLayer) -> None:
        query, key, value = attending.query, attending.key, attending.value
        options, selection = attending.options, self.engine.selection
        at = next(i for i, one in enumerate(cache.layers) if one is layer)
        assert selection is not None
        kv_len, tail = (x.to(query.device) for x in (cache.span.kv_len, cache.tail_start))
        always = selection.always.to(query.device)[0]
        is_text = always[layer.indices.clamp(min=0).long()]
        _, dense = verify_attention(query, key, value, kv_len, **options)

        def share(indices: Tensor) -> Tensor:
            _, lse = sparse_attention(query, key, value, indices, tail, kv_len, **options)
            by_group = (lse - dense).exp().unflatten(1, (key.shape[1], -1))  # [1, Hkv, G, T]
            return by_group.mean(dim=2).sum(dim=(0, 2)).cpu()

        self.tokens[at] += query.shape[2]
        self.kept[at] += share(layer.indices)
        self.kept_by_text[at] += share(layer.indices.masked_fill(~is_text, -1))
        if self.best_of:
            for t in range(query.shape[2]):
                one, length = query[:, :, t : t + 1], kv_len - (query.shape[2] - 1 - t)
                self.kept_by_best[at] += self.best(one, key, length, options)

    def best(self, query: Tensor, key: Tensor, kv_len: Tensor, options: dict) -> Tensor:
        """Attention kept by the keys that one token attends to most, ``[len(best_of), Hkv]``."""
        assert self.engine.selection is not None
        candidates = self.engine.selection.candidates.to(query.device)
        scores = score_keys(query, key, kv_len, **options)[0, :, : candidates.shape[1]]
        scores = scores.masked_fill(~candidates, 0)
        others = 1 - scores.sum(dim=-1)
        top = scores.topk(self.best_of[-1], dim=-1).values.cumsum(dim=-1)
        return torch.stack([others + top[:, k - 1] for k in self.best_of]).cpu()

    def mean(self, sums: dict[int, Any]) -> dict[int, list]:
        return {at: (total / self.tokens[at]).tolist() for at, total in sorted(sums.items())}


class Timed(Decoding):
    """Takes the time of each round and counts rejections.

    Attributes:
        rounds, drafts: seconds of each round, and of a draft step in it (0 without drafts).
        rejected: rounds in which a draft was rejected; the last round's are not counted, since the
            answer may have ended instead.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.rounds: list[float] = []
        self.drafts: list[float] = []
        self.rejected = 0

    def round(self) -> None:
        stats = self.engine.stats
        drafted, accepted, in_drafts = stats.drafted, stats.accepted, stats.seconds["draft"]
        start = time.perf_counter()
        super().round()  # reads the device once, so all of its work is done
        took = time.perf_counter() - start
        drafted = stats.drafted - drafted
        if drafted == self.length.choose([0]) or not self.rounds:  # the last ones may be cut
            self.rounds.append(took)
            self.drafts.append((stats.seconds["draft"] - in_drafts) / max(1, drafted))
        if self.rows.going():
            self.rejected += stats.accepted - accepted < drafted


def watched(
    model: Any,
    inputs: dict[str, Any],
    kind: Callable[..., Decoding],
    most_tokens: int,
    sampling: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, Tensor, Any]:
    """Generate with `model` patched, as `kind` has it.

    Args:
        model: unpatched.
        inputs: of one prompt, as generate takes them; a cache among them is copied, so that it
            can be given again.
        kind: makes the `Decoding` of the call.
        most_tokens: `max_new_tokens`.
        sampling: options of generate; None decodes greedily.
        **options: of `patch`.

    Returns:
        The `Decoding`, the tokens generated ``[T]``, and the call's stats.

    Raises:
        NotMeasurable: the call ran as unpatched, or in lockstep.
    """
    made: list[Decoding] = []

    def make(*arguments: Any, **more: Any) -> Decoding:
        made.append(kind(*arguments, **more))
        return made[-1]

    if CACHE in inputs:
        inputs = {**inputs, CACHE: copy.deepcopy(inputs[CACHE])}
    with patched(model, **options):
        model._std_decode.decoding = make
        output = model.generate(**inputs, **(sampling or GREEDY), max_new_tokens=most_tokens)
        stats = last_stats(model)
    assert stats is not None
    if not made:
        reason = stats.fallback or stats.lockstep_because
        raise NotMeasurable(f"this model's generate calls cannot be looked into: {reason}")
    return made[0], output[0, inputs["input_ids"].shape[1] :], stats


def candidates(model: Any, inputs: dict[str, Any]) -> int:
    """How many keys of the prompt compete to be read, at most as many as a draft may read."""
    ids = inputs["input_ids"]
    visual = visual_tokens(ids, model.config, inputs.get("mm_token_type_ids"))
    plan = plan_selection(visual, None, 1, ids.shape[1])
    return min(int(plan.candidates.sum()), MOST_INDICES - int(plan.always.sum()))


def teach(
    model: Any,
    inputs: dict[str, Any],
    answer: Tensor,
    keys: int,
    best_of: Sequence[int] = (),
    **options: Any,
) -> tuple[KeysPoint, Teacher]:
    """Draft along `answer` with `keys` keys, and other `options` of `patch`."""
    teacher, _, _ = watched(
        model,
        inputs,
        lambda *args, **more: Teacher(*args, answer=answer, best_of=best_of, **more),
        len(answer),
        top_k_keys=keys,
        draft_length=SWEEP_DRAFT_LENGTH,
        **{**options, "cuda_graphs": False, "compile": False},  # or it cannot be looked into
    )
    kept = teacher.mean(teacher.kept)
    return KeysPoint(keys, len(teacher.agreed), sum(teacher.agreed), kept), teacher


def time_rounds(
    model: Any,
    inputs: dict[str, Any],
    tokens: int,
    keys: int,
    draft_lengths: Sequence[int],
    tell: Callable[[int], None] = lambda draft_length: None,
    **options: Any,
) -> list[DraftsPoint]:
    """Generate `tokens` tokens with drafts of each length, twice.

    The second time in the opposite order, so that a machine that grows slower or faster meanwhile
    favours none.

    Args:
        tell: is told the draft length before each run.
        **options: of `patch`, besides.
    """
    runs: dict[int, list[tuple[Timed, Any]]] = {gamma: [] for gamma in draft_lengths}
    for gamma in (*draft_lengths, *reversed(draft_lengths)):
        tell(gamma)
        timed, _, stats = watched(
            model, inputs, Timed, tokens, top_k_keys=keys, draft_length=gamma, **options
        )
        runs[gamma].append((timed, stats))
    points = []
    for gamma, twice in runs.items():
        _, stats = twice[0]  # both have drafted the same
        tried = stats.accepted + twice[0][0].rejected
        points.append(
            DraftsPoint(
                gamma,
                stats.mean_accepted_length,
                stats.accepted / tried if tried else None,
                statistics.median(took for timed, _ in twice for took in timed.rounds),
                statistics.median(took for timed, _ in twice for took in timed.drafts),
            )
        )
    return points

"""Choosing draft tokens exactly as generate is going to choose the real ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process

# Row-wise functions of the tokens so far and the scores, with no memory of earlier calls: running
# them on tokens that are later rejected leaves no trace. Any other processor sees verified logits
# only, in generate's own loop: its effect on a draft token is missed, never its effect on the
# output.
_STATELESS = frozenset(
    getattr(logits_process, name)
    for name in (
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    )
    if hasattr(logits_process, name)
)


class Drafter:
    """Chooses draft tokens, and keeps the little of generate's state that this takes.

    Attributes:
        criteria: generate's stopping criteria, to be handed to its loop in place of the original:
            the calls they get are the same, and the drafter learns which rows have ended.
        input_ids: prompt and generated tokens, ``[B, S + steps]``.
        was_active: rows that had not ended before the newest token, bool ``[B]``.
        steps: tokens generated per row.
        emitted, drafted: counts over rows, each up to its own end, as device scalars.
    """

    def __init__(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ):
        self.processors = LogitsProcessorList(p for p in processors if type(p) in _STATELESS)
        self.criteria = _WatchedCriteria(criteria)
        self.criteria.watcher = self._watch
        self.max_length, self.do_sample = config.max_length, config.do_sample
        ends = [c.eos_token_id for c in criteria if hasattr(c, "eos_token_id")]
        self.ends = (
            torch.cat([end.flatten() for end in ends]).to(input_ids.device) if ends else None
        )
        self.pad = config._pad_token_tensor
        self.input_ids = input_ids
        self.active = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self.was_active = self.active
        self.steps = 0
        self.emitted = self.drafted = torch.zeros((), dtype=torch.int64, device=input_ids.device)

    def _watch(self, input_ids: Tensor, ended: Tensor) -> None:
        self.input_ids, self.was_active = input_ids, self.active
        self.emitted = self.emitted + self.active.sum()
        self.active = self.active & ~ended
        self.steps += 1

    def steps_left(self) -> int:
        return self.max_length - self.input_ids.shape[1]

    def start(self, gamma: int) -> Callable[[Tensor], Tensor]:
        """Begin a round after the newest token of `input_ids`.

        Returns:
            A function to call `gamma` times with draft logits ``[B, V]``, for tokens ``[B, 1]``.
        """
        self.drafted = self.drafted + gamma * self.active.sum()
        ids, active, noise = self.input_ids, self.active, None

        def choose(logits: Tensor) -> Tensor:
            nonlocal ids, active, noise
            logits = logits.to(copy=True, dtype=torch.float32, device=ids.device)
            scores = self.processors(ids, logits)
            if self.do_sample:
                probabilities = scores.softmax(dim=-1)
                noise = iter(upcoming_noise(probabilities, gamma)) if noise is None else noise
                token = (probabilities / next(noise)).argmax(dim=-1)
            else:
                token = scores.argmax(dim=-1)
            if self.ends is not None:  # rows that have ended go on as padding
                token = torch.where(active, token, self.pad.to(token.device))
                active = active & ~torch.isin(token, self.ends)
            ids = torch.cat([ids, token[:, None]], dim=1)
            return token[:, None]

        return choose


class _WatchedCriteria(StoppingCriteriaList):
    """The same criteria, called the same way, whose answer someone else hears too."""

    watcher: Callable[[Tensor, Tensor], None]

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        ended = super().__call__(input_ids, scores, **kwargs)
        self.watcher(input_ids, ended)
        return ended


def upcoming_noise(probabilities: Tensor, steps: int) -> list[Tensor]:
    """The Exp(1) noise that generate's next `steps` calls of ``torch.multinomial`` will draw.

    ``torch.multinomial(p, 1)`` is ``argmax(p / q)`` with one draw of q ~ Exp(1) like p
    (aten/src/ATen/native/Distributions.cpp). A draft that divides by the q of its own step chooses
    the token that generate will choose, wherever draft and dense model agree well enough
    (drafter-invariant sampling, Daliri et al. 2024, arXiv 2408.07978). The generator is left as it
    was: generate draws the same numbers again, itself, so any other user of it sees no difference.
    """
    device = probabilities.device
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
    elif device.type == "cpu":
        generator = torch.default_generator
    else:  # a generator that cannot be put back must not be drawn from
        return [torch.ones_like(probabilities)] * steps
    state = generator.get_state()
    try:
        return [torch.empty_like(probabilities).exponential_(1) for _ in range(steps)]
    finally:
        generator.set_state(state)

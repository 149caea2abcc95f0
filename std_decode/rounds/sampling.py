"""Choosing tokens exactly as generate does: the same processors, and the same random numbers."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process

from std_decode.rounds.lookup import Lookup
from std_decode.rounds.noise import Noise, upcoming_noise
from std_decode.rounds.processors import DraftProcessors
from std_decode.rounds.rows import Rows

# Row-wise functions with no memory of earlier calls: running them on tokens that are later
# rejected leaves no trace. These look at the scores alone,
_OF_SCORES = (
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MinPLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopHLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TypicalLogitsWarper",
)
# and these at the tokens so far, too.
_OF_TEXT = (
    "ExponentialDecayLengthPenalty",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
)


# Which take an entropy: PyTorch shares the sum of a single row out to its threads.
_SUMMING = ("EtaLogitsWarper", "TopHLogitsWarper", "TypicalLogitsWarper")


def summing(processors: LogitsProcessorList) -> list[str]:
    """Those whose last bits depend on how many rows they are given."""
    names = [type(processor).__name__ for processor in processors]
    return [name for name in names if name in _SUMMING]


def _types(names: tuple[str, ...]) -> frozenset[type]:
    return frozenset(getattr(logits_process, n) for n in names if hasattr(logits_process, n))


MOST_AT_ONCE = 1 << 24  # logits, of which there may be four float32 copies

_SCORE_PROCESSORS = _types(_OF_SCORES)
STATELESS = _SCORE_PROCESSORS | _types(_OF_TEXT)


class Chooser:
    """Chooses each row's next token after its own text, rows being at different steps.

    Args:
        processors: all of them of a type in `STATELESS`.
        sample: whether tokens are drawn, or the likeliest taken.
        window: see `Noise`.

    Attributes:
        noise: None for greedy decoding, and before `begin`.
    """

    def __init__(self, processors: LogitsProcessorList, batch: int, sample: bool, window: int):
        self.processors, self.sample, self.window = processors, sample, window
        self.row_processors = [_of_row(processors, row) for row in range(batch)]
        self.reads_text = any(type(p) not in _SCORE_PROCESSORS for p in processors)
        self.noise: Noise | None = None

    def begin(self, logits: Tensor, device: torch.device) -> None:
        """Learn from the first logits, ``[B, V]``, how much noise a step takes."""
        if self.sample:
            batch, vocabulary = logits.shape
            self.noise = Noise(batch, vocabulary, self.window, device)

    def __call__(self, logits: Tensor, rows: Rows, ahead: int) -> tuple[Tensor, Tensor]:
        """The token that generate would choose for each row, `ahead` past its newest.

        Args:
            logits: ``[B, V]``.
            rows: their `text` holds the `ahead` tokens to assume in between.

        Returns:
            Tokens ``[B]``, and where none can be drawn because the probabilities are NaN, bool
            ``[B]``.
        """
        scores = logits.to(copy=True, dtype=torch.float32, device=rows.text.device)
        if self.reads_text:
            prefixes = [
                rows.text[row : row + 1, : rows.prompt + at + ahead]
                for row, at in enumerate(rows.at)
            ]
            each = zip(self.row_processors, prefixes, scores.split(1))
            scores = torch.cat([process(ids, row) for process, ids, row in each])
        else:
            scores = self.processors(rows.text, scores)
        if self.noise is None:
            token = scores.argmax(dim=-1)
            return token, torch.zeros_like(token, dtype=torch.bool)
        probabilities = scores.softmax(dim=-1)
        token = (probabilities / self.noise.at(rows.steps + ahead)).argmax(dim=-1)
        return token, probabilities[:, 0].isnan()  # softmax makes a whole row NaN, or none of it

    def each(self, logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """The same for the tokens of a round, each assuming those before it, ``[B, T, V]``.

        Returns:
            ``[B, T]`` both; None where none is drawn.
        """
        batch, count, _ = logits.shape
        if self.reads_text or logits.numel() > MOST_AT_ONCE:
            choices = [self(logits[:, t], rows, t) for t in range(count)]
            tokens, undefined = (torch.stack(both, dim=1) for both in zip(*choices))
            return tokens, undefined
        # The processors look at nothing but a token's own scores: all tokens may be rows to them.
        flat = logits.flatten(0, 1).to(copy=True, dtype=torch.float32, device=rows.text.device)
        scores = self.processors(rows.text, flat)
        if self.noise is None:
            return scores.argmax(dim=-1).view(batch, count), None
        probabilities = scores.softmax(dim=-1)
        noise = self.noise.at(rows.steps[:, None] + rows.ahead[:count]).flatten(0, 1)
        tokens = (probabilities / noise).argmax(dim=-1).view(batch, count)
        return tokens, probabilities[:, 0].isnan().view(batch, count)


def _of_row(processors: LogitsProcessorList, row: int) -> LogitsProcessorList:
    """The processors as they are for one row of the batch."""
    own = LogitsProcessorList(processors)
    for index, processor in enumerate(processors):
        # The one option of one value a row: where left padding ends, for the repetition penalty.
        lengths = getattr(processor, "prompt_ignore_length", None)
        if isinstance(lengths, Tensor):
            own[index] = copy(processor)
            own[index].prompt_ignore_length = lengths[row : row + 1]
    return own


class Drafter:
    """Chooses draft tokens for lockstep decoding, where generate itself chooses the real ones.

    A processor that is not known to be stateless sees verified logits only, in generate's own
    loop; drafts go through a copy of it, or without it, see `DraftProcessors`.

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
        self.processors = DraftProcessors(processors, STATELESS)
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
        self.steps = self.told = 0
        self.emitted = self.drafted = torch.zeros((), dtype=torch.int64, device=input_ids.device)

    def _watch(self, input_ids: Tensor, ended: Tensor) -> None:
        self.input_ids, self.was_active = input_ids, self.active
        self.emitted = self.emitted + self.active.sum()
        self.active = self.active & ~ended
        self.steps += 1

    def steps_left(self) -> int:
        return self.max_length - self.input_ids.shape[1]

    def tell(self, lookup: Lookup) -> list[int]:
        """Have `lookup` know the tokens so far; the host waits for them.

        Returns:
            The rows that go on; those that have ended and go on as padding are told no more.
        """
        newest = self.input_ids[:, self.input_ids.shape[1] - (self.steps - self.told) :]
        goes_on = self.active if self.ends is not None else torch.ones_like(self.active)
        told = torch.cat([goes_on[:, None].long(), newest], dim=1).tolist()
        self.told = self.steps
        going = [row for row, (goes_on, *_) in enumerate(told) if goes_on]
        for row in going:
            lookup.extend(row, told[row][1:])
        return going

    def padded(self, drafts: Tensor) -> Tensor:
        """Drafts ``[B, gamma]`` with those of rows that have ended as generate has them."""
        if self.ends is None:
            return drafts
        return torch.where(self.active[:, None], drafts, self.pad.to(drafts.device))

    def start(self, gamma: int) -> Callable[[Tensor, int], Tensor]:
        """Begin a round after the newest token of `input_ids`.

        Returns:
            A function to call `gamma` times with draft logits ``[B, V]`` and the number of drafts
            so far, for tokens ``[B]``.
        """
        self.drafted = self.drafted + gamma * self.active.sum()
        ids, active = self.input_ids, self.active
        noise: list[Tensor] = []

        def choose(logits: Tensor, step: int) -> Tensor:
            nonlocal ids, active, noise
            if step == 0:
                self.processors.begin()
            scores = self.processors(ids, logits)
            if self.do_sample:
                probabilities = scores.softmax(dim=-1)
                noise = noise or upcoming_noise(probabilities, gamma)
                token = (probabilities / noise[step]).argmax(dim=-1)
            else:
                token = scores.argmax(dim=-1)
            if self.ends is not None:  # rows that have ended go on as padding
                token = torch.where(active, token, self.pad.to(token.device))
                active = active & ~torch.isin(token, self.ends)
            ids = torch.cat([ids, token[:, None]], dim=1)
            return token

        return choose


class _WatchedCriteria(StoppingCriteriaList):
    """The same criteria, called the same way, whose answer someone else hears too."""

    watcher: Callable[[Tensor, Tensor], None]

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        ended = super().__call__(input_ids, scores, **kwargs)
        self.watcher(input_ids, ended)
        return ended

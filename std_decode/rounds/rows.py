"""The text of every row of a batch, how far each has come, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.generation.stopping_criteria import StopStringCriteria

from std_decode.model.cache import MOST_NEW_TOKENS, bucket

MOST_TOKENS_PER_PASS = 64  # of std_kernels.verify_attention
NEVER = 2**62  # the step at which a row ends that has not ended


@dataclass(frozen=True)
class Ends:
    """When a row ends, as generate's built-in stopping criteria have it.

    Attributes:
        most_steps: tokens after which every row ends.
        tokens: ids that end a row; None without such a criterion.
        pad: what a row goes on as once it has ended; None without `tokens`: then rows go on as
            themselves until the last one has ended.
        strings: stop strings, none longer in tokens than the prompt.
    """

    most_steps: int
    tokens: Tensor | None = None
    pad: Tensor | None = None
    strings: tuple[StopStringCriteria, ...] = ()

    def __call__(self, text: Tensor, columns: Tensor, tokens: Tensor) -> Tensor:
        """Whether a row ends with each of the `tokens` in these `columns`, bool ``[B, T]``."""
        if self.tokens is None:
            ends = torch.zeros_like(tokens, dtype=torch.bool)
        else:
            ends = (tokens[..., None] == self.tokens).any(-1)
        for criterion in self.strings:
            tail = torch.arange(1 - criterion.maximum_token_len, 1, device=text.device)
            for t in range(columns.shape[1]):
                ends[:, t] |= criterion(text.gather(1, columns[:, t, None] + tail), None)
        return ends


class Rows:
    """Rows that advance on their own. Step t is the t-th generated token of a row, from 0.

    Args:
        input_ids: the prompt, ``[B, S]``.

    Attributes:
        text: ``[B, capacity]``: prompt, generated tokens, and behind them drafts or anything.
        steps: tokens each row has generated, int64 ``[B]``.
        ended: the number of them with which it ended, or `NEVER`, int64 ``[B]``.
        at, ended_at: the same two as the host read them last.
    """

    def __init__(self, input_ids: Tensor, ends: Ends):
        self.text, self.ends = input_ids, ends
        self.prompt = input_ids.shape[1]
        self.steps = torch.zeros_like(input_ids[:, 0])
        self.ended = torch.full_like(self.steps, NEVER)
        self.ahead = torch.arange(MOST_TOKENS_PER_PASS, device=input_ids.device)
        self.columns_at_0 = (
            self.prompt - 1 + torch.arange(2 * MOST_TOKENS_PER_PASS, device=input_ids.device)
        )
        self.at = [0] * len(input_ids)
        self.ended_at = [NEVER] * len(input_ids)

    def reserve(self, tokens: int) -> None:
        """Have room for `tokens` more behind every row."""
        needed = self.prompt + max(self.at) + tokens
        if needed > self.text.shape[1]:
            room = self.prompt + min(self.ends.most_steps, MOST_NEW_TOKENS) + tokens
            width = bucket(max(needed, room, self.text.shape[1] * 3 // 2))
            self.text = F.pad(self.text, (0, width - self.text.shape[1]))

    def columns(self, count: int, ahead: int = 0) -> Tensor:
        """Where the next `count` tokens of each row go, ``[B, count]``."""
        return self.steps[:, None] + self.columns_at_0[ahead + 1 : ahead + 1 + count]

    def pending(self) -> Tensor:
        """Each row's newest token, ``[B, 1]``."""
        return self.text.gather(1, self.columns(1, -1))

    def write(self, tokens: Tensor, ahead: int = 0) -> None:
        """Put ``[B, T]`` tokens behind each row without counting them as generated."""
        self.text.scatter_(1, self.columns(tokens.shape[1], ahead), tokens)

    def keep(self, tokens: Tensor, agreed: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """Append each row's agreed tokens and one more, as far as the row's end and `limit`.

        Args:
            tokens: ``[B, T]``.
            agreed: ``[B]``, less than T.
            limit: the most steps that a row may have come to by now.

        Returns:
            How many tokens each row was given, and how many of these count as its own, not being
            beyond its end, ``[B]`` each.
        """
        count = tokens.shape[1]
        columns, step = self.columns(count), self.ahead[:count]
        self.text.scatter_(1, columns, tokens)
        last = self.ends(self.text, columns, tokens)
        # What the host knows cannot happen in this round is not asked of the device.
        if max(self.at) + count >= self.ends.most_steps:
            last |= columns >= self.prompt + self.ends.most_steps - 1
        given = agreed + 1
        if max(self.at) + count > limit:
            given = torch.minimum(given, (limit - self.steps).clamp_(min=0))
        own = given
        if min(self.ended_at) < NEVER:
            own = torch.where(self.ended == NEVER, given, 0)
        last &= step < own[:, None]
        first = torch.where(last, step, count).amin(dim=1)
        own = torch.minimum(own, first + 1)
        self.ended = torch.where(first < count, self.steps + own, self.ended)
        if self.ends.pad is not None:
            given = own
        elif self.ends.strings:
            # A row that has ended only goes along: alone it might go further than the batch.
            furthest = torch.minimum(self.steps + given, self.ended).amax()
            given = torch.minimum(given, furthest - self.steps)
        self.steps = self.steps + given
        return given, own

    def read(self, *others: Tensor) -> list[list[int]]:
        """Have the host know how far the rows have come; the one time in a round that it waits.

        Returns:
            The other tensors, int64 ``[B]``, read along.
        """
        self.at, self.ended_at, *values = torch.stack([self.steps, self.ended, *others]).tolist()
        return values

    def end(self) -> int:
        """How many steps the batch takes, once every row has ended."""
        return max(self.ended_at)

    def taken(self, more: int = 0) -> int:
        """How many steps the batch has taken for sure; with one more of each unended row."""
        return max(min(at + more, end) for at, end in zip(self.at, self.ended_at))

    def progress(self) -> tuple[Tensor, Tensor, list[int], list[int]]:
        """How far the rows have come, for `back_to`."""
        return self.steps, self.ended, self.at, self.ended_at

    def back_to(self, progress: tuple[Tensor, Tensor, list[int], list[int]]) -> None:
        """Have come no further than that; the text behind it may be anything."""
        self.steps, self.ended, self.at, self.ended_at = progress

    def going(self) -> list[int]:
        """The rows that still need tokens."""
        if self.ends.pad is not None:
            return [row for row, ended in enumerate(self.ended_at) if ended == NEVER]
        return [row for row, at in enumerate(self.at) if at < self.end()]

    def most_steps_left(self) -> int:
        """Tokens to come at most, of the row that is furthest from its end."""
        most = min(self.end(), self.ends.most_steps)
        return most - min(self.at[row] for row in self.going())

    def sequences(self) -> Tensor:
        """Prompt and generated tokens, ``[B, S + steps]``."""
        text = self.text[:, : self.prompt + self.end()].clone()
        if self.ends.pad is not None:
            step = torch.arange(text.shape[1], device=text.device) - self.prompt
            text = torch.where(step < self.ended[:, None], text, self.ends.pad)
        return text

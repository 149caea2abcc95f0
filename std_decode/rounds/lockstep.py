"""Rounds inside transformers' own loop, for calls that let their own code see every step.

transformers' sampling loop stays in charge. It asks the model for the logits after one more token;
the answers come from rounds. A round's dense pass answers the question at hand and up to `gamma`
following ones: as long as the token that generate chooses is the one that was drafted, its logits
are already there. The first time it is not, in any row, the rest of the round is forgotten and a
new one starts from the chosen token.

So processors, stopping criteria, streamers, scores and random numbers are handled by the very code
that handles them without us. The price is that a batch advances by its smallest acceptance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from std_decode.model.cache import CACHE
from std_decode.passes.engine import Engine, shared_inputs, spoiled
from std_decode.rounds.lookup import Lookup
from std_decode.rounds.policy import DraftLength, FixedLength
from std_decode.rounds.sampling import Drafter


@dataclass
class Round:
    """What one dense pass settled.

    Attributes:
        tokens: the pending token and the drafts after it, ``[B, gamma + 1]``.
        logits: the dense model's, after each of them, ``[B, gamma + 1, V]``.
        answered: how many of these logits generate has been given.
        looked_up: whether the drafts were.
    """

    tokens: Tensor
    logits: Tensor
    answered: int = 0
    looked_up: bool = False


class Lockstep:
    """Answers generate's questions for logits, a round of draft and verification at a time.

    Args:
        engine: before prefill.
        drafter: chooses draft tokens as generate would.
        length: how many tokens each round drafts.
        lookup: where rounds may find drafts in the text; None: nowhere.
    """

    def __init__(
        self,
        engine: Engine,
        drafter: Drafter,
        length: DraftLength | FixedLength,
        lookup: Lookup | None = None,
    ):
        self.engine, self.drafter, self.length = engine, drafter, length
        self.lookup = lookup
        self.round: Round | None = None
        self.spent = (0.0, 0.0, 0.0)  # see Engine.spent, when the round began
        self.accepted: Tensor | int = 0
        self.looked_up: Tensor | int = 0  # drafts,
        self.accepted_of_lookup: Tensor | int = 0  # and those that were emitted

    def __call__(self, **inputs: Any) -> Any:
        """Stand in for ``model(**inputs)`` inside generate."""
        cache = self.engine.cache
        if cache.prefilling:
            return self.engine.prefill(**inputs)
        if self.round is None or not self.agrees(self.round, inputs["input_ids"]):
            self.round = self.draft_and_verify(inputs)
        cache.advance(1, cache.longest + 1)  # a rejected draft is just never counted
        logits = self.round.logits[:, self.round.answered, None]
        self.round.answered += 1
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})

    def agrees(self, round: Round, pending: Tensor) -> bool:
        """Whether every row's chosen token is the drafted one, so that its logits are known."""
        if round.answered == round.tokens.shape[1]:
            return False
        same = pending[:, 0] == round.tokens[:, round.answered]
        accepted = (same & self.drafter.was_active).sum()
        self.accepted = self.accepted + accepted
        if round.looked_up:
            self.accepted_of_lookup = self.accepted_of_lookup + accepted
        return bool(same.all())

    def draft_and_verify(self, inputs: dict[str, Any]) -> Round:
        self.observe()
        going, found = [], None
        if self.lookup is not None:
            going = self.drafter.tell(self.lookup)
            found = self.lookup.found_together(going, self.length.most_looked_up)
        gamma, left = self.length.choose([0], found), self.drafter.steps_left()
        looks_up, gamma = gamma < 0, abs(gamma)
        if self.engine.graphs is None:  # with graphs shapes repeat, and drafts too many are cut
            gamma = max(0, min(gamma, left - 1))
        round = self.pass_of(inputs, gamma, left, going if looks_up and gamma else [])
        if gamma and bool(spoiled(round.logits).any()):
            round = self.pass_of(inputs, 0, left)
        return round

    def pass_of(
        self, inputs: dict[str, Any], gamma: int, left: int, going: Sequence[int] = ()
    ) -> Round:
        """Draft `gamma` tokens and verify them.

        Args:
            left: how many tokens are to come at most.
            going: rows whose drafts are to be looked up; () for the model's own.
        """
        position = inputs["position_ids"][..., -1:]
        # The last possible token is never read; drafts from there on are not kept, but a position
        # table may end.
        ahead = torch.arange(gamma + 1, device=position.device).clamp(max=max(0, left - 1))
        positions = position + ahead
        choose = self.drafter.start(gamma)
        pending, shared = inputs["input_ids"], shared_inputs(inputs)
        if not going or self.lookup is None:
            drafted = self.engine.draft_and_verify(pending, positions, gamma, choose, shared)
            return Round(*drafted)
        drafts = self.lookup.tensor(self.lookup.drafts(going, gamma), gamma, pending.device)
        tokens = torch.cat([pending, self.drafter.padded(drafts)], dim=1)
        self.engine.stats.lookup_rounds += 1
        self.looked_up = self.looked_up + gamma * self.drafter.active.sum()
        logits = self.engine.verify_looked_up(tokens, positions, shared)
        return Round(tokens, logits, looked_up=True)

    def observe(self) -> None:
        """Tell what came of the round that is over; its own time is that of its passes."""
        spent = self.engine.spent()
        if self.round is not None:
            draft, rest, first_use = (now - then for now, then in zip(spent, self.spent))
            gamma, answered = self.round.tokens.shape[1] - 1, self.round.answered
            agreed = {0: answered - 1}  # all rows advance as one
            gamma = -gamma if self.round.looked_up else gamma
            self.length.observe(gamma, agreed, draft, rest, answered, first_use > 0)
        self.spent = spent

    def finish(self, sequences: Tensor) -> None:
        """Settle the counts once generate has its sequences, ``[B, S]``."""
        if self.round is not None:
            self.agrees(self.round, sequences[:, -1:])  # the last token was never asked about
        stats, drafter = self.engine.stats, self.drafter
        stats.accepted, stats.drafted = int(self.accepted), int(drafter.drafted)
        stats.lookup_drafted = int(self.looked_up)
        stats.lookup_accepted = int(self.accepted_of_lookup)
        stats.emitted = int(drafter.emitted)
        # The first token came from prefill.
        stats.settle(drafter.steps - 1, stats.calls["verify"] + stats.calls["dense"])

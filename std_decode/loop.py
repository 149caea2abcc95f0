"""The method: draft with sparse attention, verify densely, keep what agrees.

transformers' own sampling loop stays in charge. It asks a patched model for the logits after one
more token; the answers come from rounds. A round drafts `gamma` tokens after the pending one with
sparse attention, then runs one dense pass over all of them, which answers that question and up to
`gamma` following ones: as long as the token that generate chooses is the one that was drafted, its
logits are already there. The first time it is not, the rest of the round is forgotten and a new
one starts from the chosen token.

So processors, stopping criteria, streamers, scores and random numbers are handled by the very code
that handles them without us, and one rule, "chosen token == draft token", serves greedy decoding
and sampling, in every row of a batch at once (lockstep: a batch advances by its smallest
acceptance).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from std_decode.attention import Pass, Phase, attention_of
from std_decode.cache import SparseToDenseCache
from std_decode.sampling import Drafter
from std_decode.selection import Selection
from std_decode.stats import DecodeStats, peak_memory_bytes
from std_kernels import select_topk

# Tokens per dense pass on the demo model, mean of 6 clips, gamma 4: never re-selecting, going by
# the newest scores alone, and with this: at 1,024 video tokens and K 32 3.48, 2.27, 3.95; K 64
# 3.51, 3.86, 4.94; K 128 3.61, 4.74, 4.94; at 128 video tokens and K 32 2.12, 2.64, 3.18.
FADE = 0.9

# What generate passes per token that a round works out for itself; the rest it hands on.
_OWN_INPUTS = {
    "input_ids", "position_ids", "attention_mask", "past_key_values", "logits_to_keep",
    "token_type_ids", "mm_token_type_ids", "cache_position", "return_dict",
}  # fmt: skip


@dataclass
class Round:
    """What one dense pass settled.

    Attributes:
        tokens: the pending token and the drafts after it, ``[B, gamma + 1]``.
        logits: the dense model's, after each of them, ``[B, gamma + 1, V]``.
        answered: how many of these logits generate has been given.
    """

    tokens: Tensor
    logits: Tensor
    answered: int = 0


class Rounds:
    """Answers generate's questions for logits, a round of draft and verification at a time.

    Args:
        forward: the unpatched model's forward call.
        config: of the text decoder, whose attention is switched for the length of a pass.
        layers: the decoder's attention modules.
        cache: empty.
        selection: the rules of this prompt; None where nothing will be drafted.
        drafter: chooses draft tokens as generate would.
        draft_length: gamma, the most tokens a round drafts.
        reselect: whether each verification renews the selection.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        config: Any,
        layers: frozenset,
        cache: SparseToDenseCache,
        selection: Selection | None,
        drafter: Drafter,
        draft_length: int,
        reselect: bool,
        stats: DecodeStats,
    ):
        self.forward, self.config, self.layers = forward, config, layers
        self.cache, self.selection, self.drafter = cache, selection, drafter
        self.draft_length, self.stats = draft_length, stats
        self.reselect = reselect and selection is not None and not selection.complete
        self.round: Round | None = None
        self.importance: Tensor | None = None  # [layers, B, Hkv, S]
        self.accepted: Tensor | int = 0

    def __call__(self, **inputs: Any) -> Any:
        """Stand in for ``model(**inputs)`` inside generate."""
        if self.cache.length == 0:
            return self.prefill(inputs)
        if self.round is None or not self.agrees(self.round, inputs["input_ids"]):
            self.round = self.draft_and_verify(inputs)
        self.cache.length += 1  # one more token accepted; a rejected draft is just never counted
        logits = self.round.logits[:, self.round.answered, None]
        self.round.answered += 1
        return CausalLMOutputWithPast(logits=logits, past_key_values=self.cache)

    def prefill(self, inputs: dict[str, Any]) -> Any:
        length = inputs["input_ids"].shape[1]
        self.cache.expect(length)
        with self.stats.timed("prefill"):
            outputs = self.run("prefill", **inputs)
        self.cache.finish_prefill(length)
        if self.selection is not None:
            self.select(self.selection)
        return outputs

    def agrees(self, round: Round, pending: Tensor) -> bool:
        """Whether every row's chosen token is the drafted one, so that its logits are known."""
        if round.answered == round.tokens.shape[1]:
            return False
        same = pending[:, 0] == round.tokens[:, round.answered]
        self.accepted = self.accepted + (same & self.drafter.was_active).sum()
        return bool(same.all())

    def draft_and_verify(self, inputs: dict[str, Any]) -> Round:
        gamma = 0
        if self.selection is not None:
            gamma = max(0, min(self.draft_length, self.drafter.steps_left() - 1))
        self.cache.reserve(gamma + 1)
        positions = inputs["position_ids"][..., -1:]
        shared = {k: v for k, v in inputs.items() if k not in _OWN_INPUTS}
        tokens = self.draft(inputs["input_ids"], positions, gamma, shared)
        logits = self.verify(tokens, positions, shared)
        if gamma:
            self.stats.rounds += 1
            self.stats.draft_lengths.append(gamma)
            if self.reselect and self.selection is not None:
                self.select(self.selection)
        return Round(tokens, logits)

    def draft(self, pending: Tensor, positions: Tensor, gamma: int, shared: dict) -> Tensor:
        """The pending token and `gamma` more, by sparse attention, ``[B, gamma + 1]``."""
        for layer in self.cache.layers:
            layer.draft_lse.clear()
        tokens, choose = pending, self.drafter.start(gamma)
        for step in range(gamma):
            with self.stats.timed("draft"):
                self.cache.expect(1, ahead=step)
                newest = {"input_ids": tokens[:, -1:], "position_ids": positions + step}
                logits = self.run("draft", **newest, **shared).logits[:, -1]
                tokens = torch.cat([tokens, choose(logits)], dim=1)
        return tokens

    def verify(self, tokens: Tensor, positions: Tensor, shared: dict) -> Tensor:
        """The dense model's logits after each of the tokens, ``[B, gamma + 1, V]``."""
        count = tokens.shape[1]
        with self.stats.timed("verify" if count > 1 else "dense"):
            self.cache.expect(count)
            positions = positions + torch.arange(count, device=positions.device)
            return self.run(
                "verify",
                rescore=self.reselect and count > 1,
                input_ids=tokens,
                position_ids=positions,
                **shared,
            ).logits

    def select(self, selection: Selection) -> None:
        """Pick each layer's and KV head's keys for the next drafts from the newest scores.

        A key's importance is its share of the attention of the round in which it mattered most,
        fading by `FADE` a round: what was needed lately is often needed again.
        """
        layers, prompt = self.cache.selecting_layers, selection.always.shape[1]
        with self.stats.timed("select"):
            scores = torch.stack([layer.scores[..., :prompt] for layer in layers])
            importance = scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-30)
            if self.importance is not None:
                importance = torch.maximum(importance, FADE * self.importance)
            self.importance = importance
            indices = select_topk(
                importance,
                selection.width,
                candidates=selection.candidates,
                always=selection.always,
            )
            for layer, chosen in zip(layers, indices):
                layer.indices, layer.scores = chosen, None

    def run(self, phase: Phase, *, rescore: bool = False, **inputs: Any) -> Any:
        running = Pass(phase, self.cache, self.layers, self.selection, rescore)
        inputs.update(past_key_values=self.cache, use_cache=True, return_dict=True)
        with attention_of(self.config, running):
            return self.forward(**inputs)

    def finish(self, sequences: Tensor) -> None:
        """Settle the counts once generate has its sequences, ``[B, S]``."""
        if self.round is not None:
            self.agrees(self.round, sequences[:, -1:])  # the last token was never asked about
        stats, drafter = self.stats, self.drafter
        stats.accepted, stats.drafted = int(self.accepted), int(drafter.drafted)
        stats.emitted = int(drafter.emitted)
        stats.acceptance_rate = stats.accepted / max(1, stats.drafted)
        passes = stats.calls["verify"] + stats.calls["dense"]
        steps = drafter.steps - 1  # the first token came from prefill
        stats.mean_accepted_length = steps / passes if passes else 0.0
        stats.peak_memory_bytes = peak_memory_bytes(sequences.device)

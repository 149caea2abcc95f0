"""The method: draft with sparse attention, verify densely, keep what agrees.

A round drafts `gamma` tokens after each row's pending one with sparse attention, then runs one
dense pass over all of them, which tells for each the token that dense decoding would have chosen
next. The longest prefix of drafts that agrees is kept, and the dense choice after it: 1 to
`gamma + 1` tokens a round, and exactly the text of dense decoding.

One rule chooses draft and dense tokens alike, greedy or sampled: the same processors, and when
sampling the same random numbers, each belonging to one step of one row. So rows need not wait for
each other (ragged mode): each advances by its own acceptance. Where code of the caller's has to
see every step of the whole batch, lockstep.py does it instead.

Drafts may come from elsewhere (lookup.py): what is compared with the dense choices is a token,
whoever proposed it.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from std_decode.passes.engine import Engine, shared_inputs, spoiled
from std_decode.rounds.lookup import Lookup
from std_decode.rounds.policy import DraftLength, FixedLength
from std_decode.rounds.rows import MOST_TOKENS_PER_PASS, Rows
from std_decode.rounds.sampling import Chooser


class Decoding:
    """One generate call in ragged mode.

    Args:
        engine: before prefill.
        choose: the rule that chooses draft and dense tokens.
        rows: the prompt, and when its rows end.
        length: how many tokens each round drafts.
        streamer: gets each token once it is known; only with a single row.
        lookup: where rounds may find drafts in the text; None: nowhere.
    """

    def __init__(
        self,
        engine: Engine,
        choose: Chooser,
        rows: Rows,
        length: DraftLength | FixedLength,
        streamer: Any = None,
        lookup: Lookup | None = None,
    ):
        self.engine, self.choose, self.rows = engine, choose, rows
        self.length, self.streamer, self.lookup = length, streamer, lookup
        self.step_limit = 0  # that the rows may come to in this round
        self.row_passes = 0  # dense passes after prefill, once for each row that went on
        self.spoiled = False  # whether a row got nothing, see `accept`
        self.chosen: list[list[int]] = []  # the dense choices of the round, by step and row

    def run(self, model: Any, input_ids: Tensor, config: Any, kwargs: dict[str, Any]) -> Tensor:
        """Generate; the arguments are those of a transformers model's ``_sample``.

        Returns:
            Prompt and generated tokens, ``[B, S + steps]``.
        """
        rows = self.rows
        outputs = model._prefill(input_ids, config, kwargs)
        self.choose.begin(outputs.logits[:, -1], rows.text.device)
        self.begin_round(0)
        self.accept(rows.text[:, :0], outputs.logits[:, -1:])
        kwargs = model._update_model_kwargs_for_generation(
            outputs, kwargs, is_encoder_decoder=False
        )
        del outputs  # the prompt's logits may be large
        first = rows.text[:, : rows.prompt + 1]
        inputs = model.prepare_inputs_for_generation(first, next_sequence_length=1, **kwargs)
        self.first_position, self.shared = inputs["position_ids"], shared_inputs(inputs)
        with model._optimize_model_for_decode():
            while rows.going():
                self.round()
        if self.choose.noise is not None:
            self.engine.stats.workspace_bytes += self.choose.noise.ring.nbytes
        if self.streamer is not None:
            self.streamer.end()
        self.engine.stats.settle(sum(rows.at) - len(rows.at), self.row_passes)
        return rows.sequences()

    def round(self) -> None:
        rows, cache = self.rows, self.engine.cache
        going, before, spent = rows.going(), time.perf_counter(), self.engine.spent()
        again = self.spoiled
        found = None if self.lookup is None else self.lookup.found(going)
        gamma = 0 if again else self.length.choose(going, found)
        looks_up, gamma = gamma < 0, abs(gamma)
        if self.engine.graphs is None:  # with graphs shapes repeat, and drafts too many are cut
            gamma = max(0, min(gamma, rows.most_steps_left() - 1))
        looks_up = looks_up and gamma > 0
        self.row_passes += len(going)
        self.begin_round(gamma)
        proposed = self.look_up(going, gamma) if looks_up else self.sparse(going, gamma)
        drafted, drafts, logits = proposed
        given, own, agreed = self.accept(drafts, logits)
        self.engine.stats.count(drafted, map(min, drafted, agreed, own), looks_up)
        cache.advance(given, cache.prompt + max(rows.at) - 1)
        drafting, _, first_use = (now - then for now, then in zip(self.engine.spent(), spent))
        rest = time.perf_counter() - before - drafting
        gained = sum(own[row] for row in going) / len(going)
        right = {row: agreed[row] for row in going}
        if not again:
            gamma = -gamma if looks_up else gamma
            self.length.observe(gamma, right, drafting, rest, gained, first_use > 0)

    def sparse(self, going: list[int], gamma: int) -> tuple[list[int], Tensor, Tensor]:
        """Drafts of the model's own, verified.

        Returns:
            How many drafts each row has, ``[B]``; these, ``[B, gamma]``; and the dense logits as
            of `accept`.
        """
        tokens, logits = self.engine.draft_and_verify(
            self.rows.pending(), self.positions(gamma + 1), gamma, self.draft, self.shared
        )
        drafted = [gamma if row in going else 0 for row in range(len(tokens))]
        return drafted, tokens[:, 1:], logits

    def look_up(self, going: list[int], gamma: int) -> tuple[list[int], Tensor, Tensor]:
        """The same of what was found in the text; behind a row's drafts are any tokens."""
        assert self.lookup is not None
        rows, found = self.rows, self.lookup.drafts(going, gamma)
        drafts = self.lookup.tensor(found, gamma, rows.text.device)
        rows.write(drafts)
        tokens = torch.cat([rows.pending(), drafts], dim=1)
        positions = self.positions(gamma + 1)
        logits = self.engine.verify_looked_up(tokens, positions, self.shared)
        return list(map(len, found)), drafts, logits

    def begin_round(self, gamma: int) -> None:
        """Make room for a round's tokens, and foresee the random numbers of its drafts."""
        rows, noise = self.rows, self.choose.noise
        rows.reserve(gamma + 1)
        self.step_limit = rows.ends.most_steps
        if noise is not None:
            at = [rows.at[row] for row in rows.going()]
            # A row that is too far ahead of the slowest waits for it.
            self.step_limit = min(self.step_limit, max(at) + gamma + 1, min(at) + noise.window)
            noise.foresee(min(max(at) + gamma, self.step_limit))

    def draft(self, logits: Tensor, step: int) -> Tensor:
        """The token ``[B]`` to draft after `step` others, given the draft logits ``[B, V]``."""
        token, _ = self.choose(logits, self.rows, step)
        self.rows.write(token[:, None], step)
        return token

    def accept(self, drafts: Tensor, logits: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Keep the drafts that agree with the dense choice, and the dense choice after them.

        A row gets nothing where a draft has spoiled the logits; then a dense step follows.

        Args:
            drafts: ``[B, gamma]``.
            logits: dense, before each of them and after the last, ``[B, gamma + 1, V]``.

        Returns:
            How many tokens each row was given, ``[B]``; and as the host knows it, how many of
            these are its own, and how many drafts agreed.
        """
        rows, stats = self.rows, self.engine.stats
        before = rows.at
        given, own, agreed, unusable = self.settle(drafts, logits)
        if unusable:  # as torch.multinomial has it
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        self.spoiled = any(agreed[row] < 0 for row in rows.going())
        agreed = [max(0, count) for count in agreed]
        stats.emitted += sum(own)
        if self.lookup is not None:
            for row, (at, now) in enumerate(zip(before, rows.at)):
                self.lookup.extend(row, [tokens[row] for tokens in self.chosen[: now - at]])
        if self.streamer is not None:
            for token in rows.text[0, rows.prompt + before[0] : rows.prompt + rows.at[0]].cpu():
                self.streamer.put(token[None])
        return given, own, agreed

    def settle(self, drafts: Tensor, logits: Tensor) -> tuple[Tensor, list[int], list[int], bool]:
        """Keep what `accept` says, chosen by random numbers that are this call's own."""
        rows, noise = self.rows, self.choose.noise
        if noise is None:
            return self.keep(drafts, logits)
        noise.draw(min(rows.taken(1), self.step_limit))
        noise.foresee(self.step_limit)
        before = rows.progress()
        kept = self.keep(drafts, logits)
        if not noise.draw(rows.taken()):
            # Another thread has drawn what was foreseen: once more, by what was drawn instead.
            rows.back_to(before)
            rows.write(drafts)
            self.step_limit = noise.drawn
            kept = self.keep(drafts, logits)
        return kept

    def keep(self, drafts: Tensor, logits: Tensor) -> tuple[Tensor, list[int], list[int], bool]:
        """The same by the random numbers that there are.

        Returns:
            As `accept`, drafts that agreed being -1 in a row that a draft has spoiled, and
            whether a token was kept that cannot be drawn.
        """
        rows = self.rows
        chosen, undefined = self.choose.each(logits, rows)
        agreeing = torch.zeros_like(rows.steps)
        if drafts.shape[1]:
            agreeing = (drafts == chosen[:, :-1]).long().cumprod(dim=1).sum(dim=1)
            agreeing = torch.where(spoiled(logits), -1, agreeing)
        given, kept = rows.keep(chosen, agreeing, self.step_limit)
        if undefined is not None:
            undefined = (undefined & (rows.ahead[: chosen.shape[1]] < given[:, None])).sum(dim=1)
        unusable = [] if undefined is None else [undefined]
        known = [] if self.lookup is None else chosen.unbind(1)
        own, agreed, *more = rows.read(kept, agreeing, *unusable, *known)
        self.chosen = more[len(unusable) :]
        return given, own, agreed, any(map(any, more[: len(unusable)]))

    def positions(self, count: int) -> Tensor:
        """Position ids of each row's pending token and those after it, ``[..., B, count]``."""
        step = self.rows.steps[:, None] - 1 + self.rows.ahead[:count]
        # The last possible token is never read; drafts from there on are not kept, but a position
        # table may end.
        return self.first_position + step.clamp(max=max(0, self.rows.ends.most_steps - 2))

    def complete_cache(self, sequences: Tensor) -> None:
        """Make the cache hold what plain decoding leaves there: all tokens but the last.

        Rows that ended early lack their padding.
        """
        rows, cache = self.rows, self.engine.cache
        if cache.recurrent:
            self.complete_rows(sequences)
            return
        shortest, end = min(rows.at), rows.end()
        cache.rewind(cache.prompt + min(shortest, end) - 1)
        most = self.engine.promise.rows or MOST_TOKENS_PER_PASS
        for start in range(shortest - 1, end - 1, most):
            count = min(most, end - 1 - start)
            tokens = sequences[:, rows.prompt + start :][:, :count]
            position = start + torch.arange(count, device=tokens.device)
            self.engine.read(tokens, self.first_position + position, self.shared)
            cache.advance(count, cache.longest + count)

    def complete_rows(self, sequences: Tensor) -> None:
        """The same where a state cannot go back to the shortest row: each row from where it is."""
        engine, cache, end = self.engine, self.engine.cache, self.rows.end()
        at = [min(steps, end) for steps in self.rows.at]
        while min(at) < end:
            count = min(cache.most_per_pass, end - min(at))
            room = max(count, engine.promise.rows)
            if cache.reserve(room) and engine.graphs is not None:
                engine.graphs.clear()
            steps = torch.tensor(at, device=sequences.device)[:, None] - 1
            steps = steps + torch.arange(count, device=sequences.device)
            columns = (self.rows.prompt + steps).clamp_(max=sequences.shape[1] - 1)
            positions = self.first_position + steps
            engine.read(sequences.gather(1, columns), positions, self.shared)
            given = [min(count, end - step) for step in at]
            at = [step + more for step, more in zip(at, given)]
            more = torch.tensor(given, device=cache.lengths.device)
            cache.advance(more, cache.prompt + max(at) - 1)

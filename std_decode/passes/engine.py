"""The forward passes of a patched model (prefill, draft, verify) and the selection in between."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from std_decode.model.cache import CACHE, SparseToDenseCache
from std_decode.model.layer_group import LayerGroup, OneByOne, group_layers
from std_decode.model.running_pass import Pass, Phase, compiled_for, uncompiled
from std_decode.model.selection_rules import Selection
from std_decode.model.switch import attention_of
from std_decode.passes.compiling import compile_pass, compiling, settings
from std_decode.passes.graphs import Graphs
from std_decode.passes.promise import ROUNDED, Promise
from std_decode.stats import Clock, DecodeStats
from std_decode.weights.twins import Twins
from std_kernels import select_topk

# What generate passes per token that a round works out for itself; the rest it hands on.
_OWN_INPUTS = {
    "input_ids", "position_ids", "attention_mask", CACHE, "logits_to_keep",
    "token_type_ids", "mm_token_type_ids", "cache_position", "return_dict",
}  # fmt: skip
# What generate hands to every pass of Phi-4 multimodal, but only the prompt's has a place for:
# where a draft is the token that stands for an image, its forward would look for the image.
_PROMPT_INPUTS = {
    "image_pixel_values", "image_attention_mask",
    "audio_input_features", "audio_embed_sizes", "audio_attention_mask",
}  # fmt: skip


def shared_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Those of a decoding step's model inputs that every pass takes as they are."""
    own = _OWN_INPUTS | _PROMPT_INPUTS
    return {name: value for name, value in inputs.items() if name not in own}


def spoiled(logits: Tensor) -> Tensor:
    """Which rows' dense logits ``[B, T, V]`` may be NaN because of a draft, bool ``[B]``.

    A draft whose values (V) are NaN or infinite spoils all tokens before it in the pass, that may
    not see it: attention weighs it by zero, and 0 x NaN is NaN. The row's pending token comes
    first; NaN in its attention is NaN in all its logits.
    """
    return logits[:, 0, 0].isnan()


class Engine:
    """Runs the passes of one generate call at a time over its cache.

    Args:
        config: of the text decoder, whose attention is switched for the length of a pass.
        layers: the decoder's attention modules, by `layer_idx`.
        cache: see `SparseToDenseCache`.
        reselect: whether each verification renews the selection.
        graphs: captured passes; None where every pass runs as it is.
        compiles: whether drafting and verifying passes are compiled.
    """

    def __init__(
        self,
        config: Any,
        layers: dict[int, nn.Module],
        cache: SparseToDenseCache,
        reselect: bool,
        graphs: Graphs | None = None,
        compiles: bool = False,
    ):
        self.config, self.layers = config, layers
        self.cache, self.graphs = cache, graphs
        self.wants_reselection, self.compiles = reselect, compiles
        self.groups: list[LayerGroup] = []
        self.inputs: dict[Hashable, dict[str, Tensor]] = {}  # of captured passes
        # With graphs, what the shapes of captured passes follow from, beside the cache.
        self.key: Hashable = None
        self.uneven = False  # whether a product of one row depended on the others of the batch
        self.columns, self.width = cache.capacity, 0  # of importance and of index lists

    def fits(self, key: Hashable, prompt: int, room: int) -> bool:
        """Whether a call of such shapes can use this engine's buffers and captured passes."""
        return key == self.key and prompt <= self.columns and room <= self.cache.capacity

    def finish(self) -> None:
        """Let go of a call's own objects; the buffers stay for the next."""
        self.cache.answer = self.cache.template = None
        del self.forward, self.compiled, self.selection, self.stats, self.clock
        del self.twins, self.fused, self.products

    def start(
        self,
        forward: Callable[..., Any],
        template: DynamicCache,
        kv_start: Tensor | None,
        selection: Selection | None,
        stats: DecodeStats,
        twins: Twins | None = None,
        order: Tensor | None = None,
        promise: Promise = ROUNDED,
        fused: object = None,
        prompt: int = 0,
        products: object = None,
    ) -> None:
        """Begin a generate call.

        Args:
            forward: the unpatched model's forward call.
            template: see `SparseToDenseCache`.
            kv_start: first valid position of each row, int32 ``[B]``, or None.
            selection: the rules of the prompt; None where nothing will be drafted.
            stats: of this call.
            twins: whose weights drafts read, see `Pass`.
            order: see `SparseToDenseCache`.
            promise: that the decoding passes have to keep.
            fused: whose layers run fused in them, see `Pass`.
            prompt: see `SparseToDenseCache.to_read`.
            products: those that round as they like, see `Pass`.
        """
        self.forward, self.selection, self.stats = forward, selection, stats
        self.clock = Clock(stats, self.cache.lengths.device)
        self.twins, self.fused, self.products = twins, fused, products
        self.promise = promise
        compiles = self.compiles and promise.kind != "unpatched"  # compiled passes round otherwise
        self.compiled = compile_pass(forward) if compiles else None
        # What is captured must not depend on a length that the host knows.
        on_cpu = self.graphs is None and self.cache.lengths.device.type == "cpu"
        self.one_read = on_cpu and kv_start is None and promise.kind == "rounded"
        self.reselects = (
            self.wants_reselection and selection is not None and not selection.complete
        )
        self.cache.start(template, kv_start, order, prompt)

    def release(self) -> None:
        """Free the buffers now: engine, cache and layers refer to each other in a circle."""
        if self.graphs is not None:
            self.graphs.clear()
        for group in self.groups:
            group.layers.clear()
        self.groups.clear()
        self.cache.release()

    def prefill(self, **inputs: Any) -> Any:
        """A pass of the prompt's (or the new question's), through the model's own attention.

        Nothing is selected before the last of them.
        """
        new = inputs["input_ids"].shape[1]
        self.cache.expect(new)
        with self.clock.timed("prefill"):
            running = Pass("prefill", self.cache, self.layers, self.selection)
            running.partial = self.cache.longest + new < self.cache.to_read
            outputs = self.run(running, inputs)
        if running.partial:
            self.cache.advance(new, self.cache.longest + new)
            return outputs
        self.cache.finish_prefill(new)
        if self.selection is not None:
            self.select(self.selection)
        return outputs

    def draft_and_verify(
        self,
        pending: Tensor,
        positions: Tensor,
        gamma: int,
        choose: Callable[[Tensor, int], Tensor],
        shared: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """One round, or without drafts one dense step.

        Args:
            pending: each row's newest token, whose logits are not known yet, ``[B, 1]``.
            positions: the pending and the `gamma` following position ids, ``[..., B, gamma + 1]``.
            gamma: tokens to draft.
            choose: the draft token ``[B]`` given draft logits ``[B, V]`` and how many drafts
                came before.
            shared: see `shared_inputs`.

        Returns:
            The pending token and the drafts after it, ``[B, gamma + 1]``, and the dense model's
            logits after each of them, ``[B, gamma + 1, V]``.
        """
        self.reserve(gamma + 1)
        tokens = pending
        if gamma:
            tokens = self.draft(pending, positions, gamma, choose, shared)
        logits = self.verify(tokens, positions, shared, self.reselects and gamma > 0)
        if gamma:
            self.count_round(gamma)
            if self.reselects and self.selection is not None:
                self.select(self.selection)
        return tokens, logits

    def verify_looked_up(
        self, tokens: Tensor, positions: Tensor, shared: dict[str, Any]
    ) -> Tensor:
        """A round whose drafts the model had no part in.

        The selection stays: no draft step has told the log-sum-exp that scores are relative to.

        Args:
            tokens: the pending token and the drafts after it, ``[B, gamma + 1]``.
            positions: theirs, ``[..., B, gamma + 1]``.

        Returns:
            The dense model's logits after each of them, ``[B, gamma + 1, V]``.
        """
        self.reserve(tokens.shape[1])
        logits = self.verify(tokens, positions, shared)
        self.count_round(tokens.shape[1] - 1)
        return logits

    def reserve(self, tokens: int) -> None:
        """Make room for a pass over so many tokens of each row."""
        if self.cache.reserve(max(tokens, self.promise.rows)) and self.graphs is not None:
            self.graphs.clear()

    def count_round(self, gamma: int) -> None:
        self.stats.rounds += 1
        self.stats.draft_lengths.append(gamma)

    def draft(
        self,
        pending: Tensor,
        positions: Tensor,
        gamma: int,
        choose: Callable[[Tensor, int], Tensor],
        shared: dict[str, Any],
    ) -> Tensor:
        """The pending token and `gamma` more, by sparse attention, ``[B, gamma + 1]``."""
        tokens = [pending]
        for step in range(gamma):
            with self.clock.timed("draft"):
                here = positions[..., step : step + 1]
                logits = self.step("draft", tokens[-1], here, 0, shared)
                tokens.append(choose(logits[:, -1], step)[:, None])
                self.cache.ahead += 1
        self.cache.ahead.zero_()
        return torch.cat(tokens, dim=1)

    def verify(
        self, tokens: Tensor, positions: Tensor, shared: dict[str, Any], scored: bool = False
    ) -> Tensor:
        """The dense model's logits after each of the tokens, ``[B, T, V]``.

        Args:
            scored: whether the importance of the prompt's keys is renewed.
        """
        with self.clock.timed("verify" if tokens.shape[1] > 1 else "dense"):
            for group in self.groups if scored else ():
                group.make_room(self.cache.capacity)  # which has grown since the first, perhaps
            logits = self.step("verify", *self.pad(tokens, positions), shared, scored)
        return logits[:, : tokens.shape[1]]

    def read(self, tokens: Tensor, positions: Tensor, shared: dict[str, Any]) -> None:
        """Put the keys and values of tokens ``[B, T]`` behind each row, where there is room."""
        self.compiled = None  # at the end of a call, T is any number: none to compile for
        self.compute("verify", *self.pad(tokens, positions), shared)

    def pad(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, int]:
        """Tokens and positions of a pass as wide as the promise has it, and how many were added.

        Those behind a row's own tokens are seen by none of these and are overwritten.
        """
        padding = max(0, self.promise.rows - tokens.shape[1])
        if padding:
            tokens = torch.cat([tokens, tokens[:, :1].expand(-1, padding)], dim=1)
            last = positions[..., -1:]
            positions = torch.cat([positions, last.expand(*last.shape[:-1], padding)], dim=-1)
        return tokens, positions, padding

    def step(
        self,
        phase: Phase,
        tokens: Tensor,
        positions: Tensor,
        padding: int,
        shared: dict[str, Any],
        rescore: bool = False,
    ) -> Tensor:
        """A pass's logits ``[B, T, V]``, by replaying it where it is captured.

        They may be overwritten by the next pass.
        """
        if self.graphs is None or not self.capturable(shared):
            return self.compute(phase, tokens, positions, padding, shared, rescore)
        given = {"tokens": tokens, "positions": positions}
        given |= {name: value for name, value in shared.items() if isinstance(value, Tensor)}
        shapes = tuple((name, value.shape, value.dtype) for name, value in given.items())
        others = tuple((name, value) for name, value in shared.items() if name not in given)
        key = (phase, rescore, padding, self.promise, shapes, others)
        new = key not in self.inputs
        if new:
            for forgotten in self.inputs.keys() - self.graphs.captured.keys():
                del self.inputs[forgotten]
            self.inputs[key] = {name: torch.empty_like(value) for name, value in given.items()}
        static = self.inputs[key]
        for name, value in given.items():
            static[name].copy_(value)
        shared = {name: static.get(name, value) for name, value in shared.items()}

        def step() -> Tensor:
            given = static["tokens"], static["positions"], padding
            return self.compute(phase, *given, shared, rescore)

        with compiling(phase) if new and self.compiles else nullcontext():
            return self.graphs.run(key, step)

    def capturable(self, shared: dict[str, Any]) -> bool:
        if self.promise.kind == "unpatched":
            self.stats.eager_because = "each token's attention is a call of its own length"
            return False
        unknown = [name for name, value in shared.items() if not isinstance(value, Hashable)]
        if unknown:
            self.stats.eager_because = f"every step takes {', '.join(unknown)}"
        return not unknown

    def compute(
        self,
        phase: Phase,
        tokens: Tensor,
        positions: Tensor,
        padding: int,
        shared: dict[str, Any],
        rescore: bool = False,
    ) -> Tensor:
        """A pass as it is captured: nothing in it asks the device for a value."""
        self.cache.expect(tokens.shape[1], drafted=phase == "draft")
        running = Pass(phase, self.cache, self.layers, rescore=rescore, padding=padding)
        running.fused = self.fused
        if phase == "draft" or self.promise.kind == "rounded":
            running.products = self.products
        inputs = {"input_ids": tokens, "position_ids": positions, **shared}
        if phase == "draft":
            running.twins = self.twins
            with nullcontext() if self.twins is None else self.twins.reading():
                logits = self.run(running, inputs).logits
            for group in self.groups:
                group.note_lse(self.cache.ahead)
            return logits
        one_read = len(tokens) == 1 and self.one_read
        if one_read or self.promise.kind == "unpatched":
            lengths = self.cache.lengths.tolist()
            running.one_read = lengths[0] if one_read else None
            running.alone = lengths if tokens.shape[1] == 1 or not one_read else None
        # A compiler fuses what portions would be of, and rounds alike wherever a token is.
        portions = None if self.compiled is not None else self.promise.portions(*tokens.shape)
        for group in self.groups if rescore else ():
            group.expect(tokens.shape[1], padding)
        with nullcontext() if portions is None else portions:
            logits = self.run(running, inputs).logits
        self.cache.settle()
        self.uneven |= portions is not None and portions.uneven
        if rescore:
            self.renew()
        return logits

    def renew(self) -> None:
        """Renew the importance of keys from the scores that a verification has left."""
        for group in self.groups:
            group.renew(self.cache.tail_start)

    def run(self, running: Pass, inputs: dict[str, Any]) -> Any:
        inputs = {**inputs, CACHE: self.cache, "use_cache": True, "return_dict": True}
        with attention_of(self.config, running):
            if self.compiled is None or running.phase == "prefill":
                with uncompiled():
                    return self.forward(**inputs)
            with compiled_for(running), settings():
                return self.compiled(**inputs)

    def select(self, selection: Selection) -> None:
        """Pick each layer's and KV head's keys for the next drafts, by their importance."""
        with self.clock.timed("select"):
            if not self.groups:
                self.groups = group_layers(self.cache.selecting_layers, selection)
            for group in self.groups:
                if self.reselects:
                    group.make_room(self.cache.capacity)
                if isinstance(group, OneByOne):  # each layer has selected
                    group.selection = selection
                    continue
                device = group.importance.device
                chosen = select_topk(
                    group.importance,
                    group.indices.shape[-1],
                    candidates=selection.candidates.to(device),
                    always=selection.always.to(device),
                )
                group.indices.copy_(chosen)

    def spent(self) -> tuple[float, float, float]:
        """Seconds so far of draft steps, of all other stages of rounds, and of first uses.

        For when the host has read what the passes came to.
        """
        self.clock.settle()
        seconds = self.stats.seconds
        rest = seconds["verify"] + seconds["dense"] + seconds["select"]
        return seconds["draft"], rest, self.graphs.seconds if self.graphs is not None else 0.0

    @property
    def workspace(self) -> int:
        """Bytes that selection keeps: importance, index lists and scores."""
        return sum(group.nbytes for group in self.groups)

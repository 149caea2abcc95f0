"""The forward passes of a patched model (prefill, draft, verify) and the selection in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from std_decode.attention import Pass, Phase, attention_of
from std_decode.cache import BufferLayer, SparseToDenseCache
from std_decode.selection import Selection
from std_decode.stats import DecodeStats
from std_kernels import select_topk

# What generate passes per token that a round works out for itself; the rest it hands on.
_OWN_INPUTS = {
    "input_ids", "position_ids", "attention_mask", "past_key_values", "logits_to_keep",
    "token_type_ids", "mm_token_type_ids", "cache_position", "return_dict",
}  # fmt: skip


def shared_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Those of a decoding step's model inputs that every pass takes as they are."""
    return {name: value for name, value in inputs.items() if name not in _OWN_INPUTS}


class Engine:
    """Runs one generate call's passes over its cache.

    Args:
        forward: the unpatched model's forward call.
        config: of the text decoder, whose attention is switched for the length of a pass.
        layers: the decoder's attention modules.
        cache: before prefill.
        selection: the rules of this prompt; None where nothing will be drafted.
        reselect: whether each verification renews the selection.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        config: Any,
        layers: frozenset,
        cache: SparseToDenseCache,
        selection: Selection | None,
        reselect: bool,
        stats: DecodeStats,
    ):
        self.forward, self.config, self.layers = forward, config, layers
        self.cache, self.selection, self.stats = cache, selection, stats
        self.reselect = reselect and selection is not None and not selection.complete
        # Layers of one device, and their importance in one tensor, [layers, B, Hkv, S].
        self.groups: list[tuple[list[BufferLayer], Tensor]] = []

    def prefill(self, **inputs: Any) -> Any:
        """The prompt's (or the new question's) pass, through the model's own attention."""
        new = inputs["input_ids"].shape[1]
        self.cache.expect(new)
        with self.stats.timed("prefill"):
            outputs = self.run("prefill", **inputs)
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
        self.cache.reserve(gamma + 1)
        tokens = self.draft(pending, positions, gamma, choose, shared)
        logits = self.verify(tokens, positions, shared)
        if gamma:
            self.stats.rounds += 1
            self.stats.draft_lengths.append(gamma)
            if self.reselect and self.selection is not None:
                self.select(self.selection)
        return tokens, logits

    def draft(
        self,
        pending: Tensor,
        positions: Tensor,
        gamma: int,
        choose: Callable[[Tensor, int], Tensor],
        shared: dict[str, Any],
    ) -> Tensor:
        """The pending token and `gamma` more, by sparse attention, ``[B, gamma + 1]``."""
        for layer in self.cache.layers:
            layer.draft_lse.clear()
        tokens = [pending]
        for step in range(gamma):
            with self.stats.timed("draft"):
                self.cache.expect(1, ahead=step)
                here = positions[..., step : step + 1]
                outputs = self.run("draft", input_ids=tokens[-1], position_ids=here, **shared)
                tokens.append(choose(outputs.logits[:, -1], step)[:, None])
        return torch.cat(tokens, dim=1)

    def verify(self, tokens: Tensor, positions: Tensor, shared: dict[str, Any]) -> Tensor:
        """The dense model's logits after each of the tokens, ``[B, T, V]``."""
        count = tokens.shape[1]
        with self.stats.timed("verify" if count > 1 else "dense"):
            self.cache.expect(count)
            return self.run(
                "verify",
                rescore=self.reselect and count > 1,
                input_ids=tokens,
                position_ids=positions,
                **shared,
            ).logits

    def read(self, tokens: Tensor, positions: Tensor, shared: dict[str, Any]) -> None:
        """Put the keys and values of tokens ``[B, T]`` behind each row."""
        self.cache.reserve(tokens.shape[1])
        self.cache.expect(tokens.shape[1])
        self.run("verify", input_ids=tokens, position_ids=positions, **shared)

    def select(self, selection: Selection) -> None:
        """Pick each layer's and KV head's keys for the next drafts, by their importance."""
        with self.stats.timed("select"):
            if not self.groups:
                self.groups = self.group_layers()
            for layers, importance in self.groups:
                indices = select_topk(
                    importance,
                    selection.width,
                    candidates=selection.candidates.to(importance.device),
                    always=selection.always.to(importance.device),
                )
                for layer, chosen in zip(layers, indices):
                    layer.indices = chosen

    def group_layers(self) -> list[tuple[list[BufferLayer], Tensor]]:
        by_device: dict[torch.device, list[BufferLayer]] = {}
        for layer in self.cache.selecting_layers:
            by_device.setdefault(layer.importance.device, []).append(layer)
        groups = []
        for layers in by_device.values():
            importance = torch.stack([layer.importance for layer in layers])
            for layer, own in zip(layers, importance):
                layer.importance = own
            groups.append((layers, importance))
        return groups

    @property
    def workspace(self) -> int:
        """Bytes that selection keeps: importance and index lists."""
        lists = [layer.indices for layer in self.cache.layers if layer.indices is not None]
        return sum(kept.nbytes for kept in [*lists, *(group for _, group in self.groups)])

    def run(self, phase: Phase, *, rescore: bool = False, **inputs: Any) -> Any:
        running = Pass(phase, self.cache, self.layers, self.selection, rescore)
        inputs.update(past_key_values=self.cache, use_cache=True, return_dict=True)
        with attention_of(self.config, running):
            return self.forward(**inputs)

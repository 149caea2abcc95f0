"""What drafting costs and gains, in bytes, seconds and tokens.

A decoding step waits for memory: it reads the weights once and the keys and values of every row.
A draft step reads the same weights (or fewer bytes of them) and a few keys; verification reads all
of it again, once for all drafts of the round. What comes of it depends on how many drafts agree.
What the device has no room for comes over a link: at best while something else is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What bounds a step: memory bandwidth in bytes/s and dense matrix throughput in FLOP/s.

    Attributes:
        cycles: a second, of all multiprocessors together; an H100's (132 of 1.85 GHz).
        link: bytes/s from the host's memory.
    """

    bandwidth: float
    flops: float
    cycles: float = 132 * 1.85e9
    link: float = math.inf

    def seconds(self, bytes_moved: float, operations: float) -> float:
        return max(bytes_moved / self.bandwidth, operations / self.flops)


@dataclass(frozen=True)
class Workload:
    """One decoding step of a model, at one batch size and context length.

    Attributes:
        weight_bytes: what a dense step of many tokens reads of the weights: the text decoder and
            the LM head, with all experts.
        parameters: weights that are multiplied for a token: of experts, those that it takes.
        kv_bytes: of one cached token, keys and values, all layers that attend to everything.
        batch: rows.
        context: cached tokens of a row.
        draft_keys: keys of a row that a draft step reads, per layer.
        draft_weight_bytes: what a draft step reads of the weights; None: the same as a dense one.
        window_bytes: keys and values of a row in all sliding-window layers, which drafts read too.
        state_bytes: of a row, of layers with a recurrent state, which every pass reads and dense
            passes write.
        expert_bytes: of the weights, dense and draft, those of experts of which a token takes few.
        expert_share: how many of these it takes, 0 to 1.
        layers: of the text decoder, for what a GPU launches.
        kv_heads: that keys are selected for, of all layers together.
        link_bytes, draft_link_bytes: what a dense pass, and a draft, fetches over the link while
            it computes: weights, keys and values that the device has no room for.
    """

    weight_bytes: float
    parameters: float
    kv_bytes: float
    batch: int
    context: int
    draft_keys: int
    draft_weight_bytes: float | None = None
    window_bytes: float = 0.0
    state_bytes: float = 0.0
    expert_bytes: float = 0.0
    expert_share: float = 1.0
    layers: int = 0
    kv_heads: int = 0
    link_bytes: float = 0.0
    draft_link_bytes: float = 0.0

    def dense_seconds(self, device: Device, tokens: int = 1) -> float:
        """A dense pass over `tokens` new tokens of each row: a plain step, or a verification."""
        cached = self.context * self.kv_bytes + self.window_bytes + 2 * self.state_bytes
        tokens *= self.batch
        read = self.read(self.weight_bytes, tokens) + self.batch * cached
        computed = device.seconds(read, 2 * self.parameters * tokens)
        return max(computed, self.link_bytes / device.link)

    def draft_seconds(self, device: Device) -> float:
        read = min(self.draft_keys, self.context) * self.kv_bytes
        read += self.window_bytes + self.state_bytes
        weights = self.weight_bytes
        if self.draft_weight_bytes is not None:
            weights = self.draft_weight_bytes
        weights = self.read(weights, self.batch)
        computed = device.seconds(weights + self.batch * read, 2 * self.parameters * self.batch)
        return max(computed, self.draft_link_bytes / device.link)

    def read(self, weight_bytes: float, tokens: int) -> float:
        """What a pass over `tokens` tokens of all rows reads of the weights, in bytes.

        Tokens are taken to choose experts evenly and independently of each other: E experts, of
        which each takes k, have E (1 - (1 - k/E)^tokens) of them read. Those of one text often
        choose alike, so fewer may be.
        """
        return weight_bytes - self.expert_bytes * (1 - self.expert_share) ** tokens

    def round_seconds(self, device: Device, gamma: int) -> float:
        """`gamma` draft steps and the verification of all of them."""
        return gamma * self.draft_seconds(device) + self.dense_seconds(device, gamma + 1)


def expected_tokens(acceptance: float, gamma: int) -> float:
    """Tokens that a round of `gamma` drafts gives a row, the dense model's own one included.

    Args:
        acceptance: chance that a draft agrees, given that those before it did, 0 to 1.

    Source: Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023,
    equation 1.
    """
    if not 0 < acceptance < 1:
        return gamma * acceptance + 1.0
    # (1 - acceptance^(gamma + 1)) / (1 - acceptance), exact for acceptances close to 1 as well.
    return -math.expm1((gamma + 1) * math.log(acceptance)) / (1 - acceptance)

"""Dimensions of models that people run, and what a decoding step reads of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from std_decode.costs.expected import FOUR_BIT_BYTES

HEAD, CONVOLUTION = 128, 4  # of gated delta layers: width of a head, tokens of the convolution
GROUP = 128  # draft weights: 4 bits each, and a bfloat16 scale and zero for each so many


class Counts(NamedTuple):
    """How many weights a text decoder has of each kind, all layers together.

    Attributes:
        embedding: of which a step reads a row per token, that is nothing.
        matrices: that every token is multiplied with, the LM head included.
        expert: the matrices of one expert.
        rest: norms, biases, convolutions and the routers of experts, which stay bfloat16.
    """

    embedding: int
    matrices: int
    expert: int
    rest: int


class Recurrent(NamedTuple):
    """Gated delta layers, of which a model with them has three for each that attends.

    Attributes:
        key_heads, value_heads: with a state of 128 x 128 for each value head.
    """

    key_heads: int
    value_heads: int

    @property
    def channels(self) -> int:
        """What goes through the convolution: queries, keys and values."""
        return HEAD * (2 * self.key_heads + self.value_heads)

    def counts(self, hidden: int) -> tuple[int, int]:
        """Of one layer: weights of matrices, and the rest."""
        values = HEAD * self.value_heads
        out_features = self.channels + values + 2 * self.value_heads  # gates, betas and decays
        matrices = hidden * (out_features + values)
        return matrices, CONVOLUTION * self.channels + 2 * self.value_heads + HEAD

    @property
    def state_bytes(self) -> int:
        """Of one layer and row, float32."""
        return 4 * HEAD * HEAD * self.value_heads


@dataclass(frozen=True)
class Shape:
    """The text decoder of a model that people run.

    Attributes:
        family: the model type in transformers.
        intermediate: width of the MLP, or of one expert.
        head_dim: 0: hidden / heads.
        experts: per layer; 0: one MLP that every token takes.
        experts_per_token: how many of them a token takes.
        recurrent: what three of four layers are in place of attention; None: all attend.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    rope_theta: float = 1e6
    initializer_range: float = 0.02
    head_dim: int = 0
    experts: int = 0
    experts_per_token: int = 0
    recurrent: Recurrent | None = None

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden // self.heads)

    @cached_property
    def counts(self) -> Counts:
        attending, others = self.attending, self.layers - self.attending
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = attending * self.hidden * (2 * queries + 2 * keys)
        mlp = 3 * self.hidden * self.intermediate
        small = self.layers * 2 * self.hidden  # norms
        if self.family.startswith("qwen3"):
            small += attending * 2 * self.head_dim  # of queries and keys
        elif self.text_family != "llama":
            small += attending * (queries + 2 * keys)  # biases
        small += self.layers * self.hidden * self.experts  # the router
        if self.recurrent is not None:
            attention += attending * self.hidden * queries  # a gate of what was attended
            matrices, rest = self.recurrent.counts(self.hidden)
            attention, small = attention + others * matrices, small + others * rest
            if self.experts:  # one that every token takes besides, and its gate
                attention += self.layers * mlp
                small += self.layers * self.hidden
        table = self.vocabulary * self.hidden
        return Counts(
            embedding=table,
            matrices=attention + (0 if self.experts else self.layers * mlp) + table,
            expert=self.layers * mlp if self.experts else 0,
            rest=small + self.hidden,
        )

    @property
    def attending(self) -> int:
        """Layers that attend to cached keys."""
        return self.layers if self.recurrent is None else self.layers // 4

    @property
    def state_bytes(self) -> int:
        """Of the recurrent layers of one row, float32; no longer with a longer context."""
        if self.recurrent is None:
            return 0
        return (self.layers - self.attending) * self.recurrent.state_bytes

    @property
    def text_family(self) -> str:
        """The model type of the text decoder."""
        wrapped = {"llava_onevision": "qwen2", "internvl": "qwen2", "llava_next_video": "llama"}
        return wrapped.get(self.family, self.family)

    @property
    def parameters(self) -> int:
        """All of the text decoder, embedding and LM head included."""
        embedding, matrices, expert, rest = self.counts
        return embedding + matrices + self.experts * expert + rest

    @property
    def active(self) -> int:
        """Weights that one token is multiplied with."""
        return (
            self.counts.matrices + self.experts_per_token * self.counts.expert + self.counts.rest
        )

    def weight_bytes(self, tokens: int, four_bit: bool = False) -> float:
        """What a pass over `tokens` tokens reads of the weights, in bytes.

        Experts are read if a token takes them. Tokens are taken to choose evenly and independently
        of each other; those of one text often choose alike, so fewer experts may be read.
        """
        share = self.experts_per_token / self.experts if self.experts else 0.0
        experts = self.experts * (1 - (1 - share) ** tokens)
        matrices = self.counts.matrices + experts * self.counts.expert
        return (FOUR_BIT_BYTES if four_bit else 2) * matrices + 2 * self.counts.rest

    def stored_bytes(self, four_bit: bool) -> float:
        """Of all weights in bfloat16; with `four_bit`, of the second copy for drafts too."""
        stored = 2.0 * self.parameters
        if four_bit:
            matrices = self.counts.matrices + self.experts * self.counts.expert
            stored += FOUR_BIT_BYTES * matrices  # the rest and the embedding are shared
        return stored

    @property
    def kv_values(self) -> int:
        """Numbers cached per token, keys and values, all layers."""
        return 2 * self.attending * self.kv_heads * self.head_dim


# From the models' config.json on Hugging Face; `intermediate` of an MoE is moe_intermediate_size.
_QWEN_7B = (3584, 28, 28, 4, 18944)
_QWEN_32B = (5120, 64, 40, 8, 27648)
_QWEN_72B = (8192, 80, 64, 8, 29568)
SHAPES = {
    "qwen2-vl-7b": Shape("qwen2_vl", *_QWEN_7B, 152064),
    "qwen2-vl-72b": Shape("qwen2_vl", *_QWEN_72B, 152064),
    "llava-onevision-7b": Shape("llava_onevision", *_QWEN_7B, 152128),
    "llava-onevision-72b": Shape("llava_onevision", *_QWEN_72B, 152128),
    "qwen2.5-vl-7b": Shape("qwen2_5_vl", *_QWEN_7B, 152064),
    "qwen2.5-vl-32b": Shape("qwen2_5_vl", *_QWEN_32B, 152064),
    "qwen2.5-vl-72b": Shape("qwen2_5_vl", *_QWEN_72B, 152064),
    "qwen3-vl-8b": Shape("qwen3_vl", 4096, 36, 32, 8, 12288, 151936, 5e6),
    "qwen3-vl-32b": Shape("qwen3_vl", 5120, 64, 64, 8, 25600, 151936, 5e6, head_dim=128),
    "qwen3-vl-30b-a3b": Shape(
        "qwen3_vl_moe",
        2048,
        48,
        32,
        4,
        768,
        151936,
        5e6,
        head_dim=128,
        experts=128,
        experts_per_token=8,
    ),  # fmt: skip
    # Qwen3.6 has the same.
    "qwen3.5-27b": Shape(
        "qwen3_5", 5120, 64, 24, 4, 17408, 248320, 1e7, head_dim=256, recurrent=Recurrent(16, 48)
    ),
    "qwen3.5-35b-a3b": Shape(
        "qwen3_5_moe",
        2048,
        40,
        16,
        2,
        512,
        248320,
        1e7,
        head_dim=256,
        experts=256,
        experts_per_token=8,
        recurrent=Recurrent(16, 32),
    ),
    "internvl3-8b": Shape("internvl", *_QWEN_7B, 151674),
    "internvl3-38b": Shape("internvl", *_QWEN_32B, 151674),
    "internvl3-78b": Shape("internvl", *_QWEN_72B, 151674),
    "llama-3-8b": Shape("llama", 4096, 32, 32, 8, 14336, 128256, 5e5),
    # As many KV heads as query heads.
    "llava-next-video-7b": Shape("llava_next_video", 4096, 32, 32, 32, 11008, 32064, 1e4),
    # Wide weights: attention is far from uniform, and the two best tokens are rarely close.
    "tiny": Shape("qwen2_vl", 64, 2, 4, 2, 96, 128, 1e4, 0.2),
}

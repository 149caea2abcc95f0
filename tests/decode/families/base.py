"""Sizes and prompts that all of the tiny models share, and the list that they enter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOCABULARY, VIDEO, IMAGE, VISION_START, VISION_END, PAD = 120, 101, 102, 103, 104, 0
TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=None,
    # Wide, so that the two best tokens are rarely close and attention is far from uniform.
    initializer_range=0.2,
)

Built = tuple[Any, dict[str, Tensor]]


@dataclass(frozen=True)
class Family:
    """A family of models that is tested.

    Attributes:
        name: as people call it.
        sees: "video", "frames" (a video as images, one a frame), "images" or "text".
        special: what of its attention or prompts is not that of a plain Llama.
        build: takes a number of rows; the model, and what its processor would give.
        since: the first version of transformers that has it, of those supported.
    """

    name: str
    sees: str
    special: str
    build: Callable[[int], Built]
    since: str


FAMILIES: dict[str, Family] = {}


def family(
    name: str, sees: str, special: str = "", *, since: str = "5.17"
) -> Callable[[Callable[[int], Built]], Callable[[int], Built]]:
    """Enters a function, whose name becomes the key."""

    def enter(build: Callable[[int], Built]) -> Callable[[int], Built]:
        FAMILIES[build.__name__] = Family(name, sees, special, build, since)
        return build

    return enter


def words(count: int) -> list[int]:
    return torch.randint(7, 99, (count,)).tolist()


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    length = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}

"""The demo model: a tiny trained Qwen2-VL, its tokenizer and its inputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from std_decode.demo.camera import COLOURS, FRAME, PATTERNS, TOKENS_PER_SECOND

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration

FOLDER = Path(__file__).parent / "checkpoint"
PATCH, MERGE, TEMPORAL = 14, 2, 2
_SPECIAL = (
    "<pad>", "<bos>", "<eos>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>",
    "<|image_pad|>",
)  # fmt: skip
_WORDS = ("narrate", " from", " #", "\n#", ".")
VOCABULARY = {
    **{word: i for i, word in enumerate(_SPECIAL + _WORDS)},
    **{str(i): 16 + i for i in range(8)},
    **{f" {word}": 32 + i for i, word in enumerate(COLOURS)},
    **{f" {word}": 48 + i for i, word in enumerate(PATTERNS)},
}
VIDEO_TOKEN = VOCABULARY["<|video_pad|>"]


def new_model() -> Qwen2VLForConditionalGeneration:
    """The untrained model, float32, 2.9M parameters, from torch's global seed.

    Attention is multi-head, as in video LLMs built on Vicuna: each query head has keys of its own.
    With keys shared by four query heads a CPU would verify at the pace of its arithmetic, where a
    GPU does at that of its memory, and the demo would be of another trade than the one it shows.
    """
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    hidden = 256
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=64,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=65536,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]),
            pad_token_id=VOCABULARY["<pad>"],
            bos_token_id=VOCABULARY["<bos>"],
            eos_token_id=VOCABULARY["<eos>"],
        ),
        vision_config=dict(
            depth=2,
            embed_dim=64,
            num_heads=4,
            hidden_size=hidden,
            mlp_ratio=2,
            patch_size=PATCH,
            spatial_merge_size=MERGE,
            temporal_patch_size=TEMPORAL,
            in_channels=3,
        ),
        image_token_id=VOCABULARY["<|image_pad|>"],
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VOCABULARY["<|vision_start|>"],
        vision_end_token_id=VOCABULARY["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(config)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that gives back exactly the text it was given."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\n ]#| ?[a-z]+|[0-7]|\."), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=list(_SPECIAL[3:]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def load_model(folder: Path = FOLDER) -> Qwen2VLForConditionalGeneration:
    """The trained model on the CPU in float32, ready to generate; stored in bfloat16."""
    from transformers import Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def load_tokenizer(folder: Path = FOLDER) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def prompt(seconds: int, first_tag: int) -> str:
    video = "<|video_pad|>" * (seconds * TOKENS_PER_SECOND)
    return f"<bos><|vision_start|>{video}<|vision_end|>narrate from #{first_tag:02o}."


def patchify(seconds: torch.Tensor) -> torch.Tensor:
    """Qwen2-VL's patch rows for one picture a second, each shown for both of its frames.

    Args:
        seconds: pictures in 0..1, float32 ``[seconds, 3, 56, 56]`` or, where the two frames of a
            second differ, ``[seconds, 2, 3, 56, 56]``.

    Returns:
        float32 ``[seconds * 16, 1176]``: rows in merge-block order, as the vision tower expects.
    """
    if seconds.ndim == 4:
        seconds = seconds[:, None].expand(-1, TEMPORAL, -1, -1, -1)
    grid = FRAME // (PATCH * MERGE)
    rows = ((seconds - 0.5) / 0.25).reshape(
        -1, TEMPORAL, 3, grid, MERGE, PATCH, grid, MERGE, PATCH
    )
    return rows.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(
        seconds.shape[0] * (FRAME // PATCH) ** 2, 3 * TEMPORAL * PATCH * PATCH
    )


def generate_inputs(
    frames: np.ndarray, first_tag: int, tokenizer: PreTrainedTokenizerFast
) -> dict[str, torch.Tensor]:
    """What `model.generate` needs to narrate a clip from tag `first_tag` on.

    Args:
        frames: uint8 RGB, two a second, ``[2 * seconds, 56, 56, 3]``.
        first_tag: 0..63.
        tokenizer: of `load_tokenizer`.
    """
    seconds = len(frames) // TEMPORAL
    pictures = torch.from_numpy(frames[: seconds * TEMPORAL]).permute(0, 3, 1, 2).float() / 255
    ids = tokenizer(prompt(seconds, first_tag), return_tensors="pt", add_special_tokens=False)
    input_ids = ids["input_ids"]
    side = FRAME // PATCH
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == VIDEO_TOKEN).int() * 2,
        "pixel_values_videos": patchify(pictures.unflatten(0, (seconds, TEMPORAL))),
        "video_grid_thw": torch.tensor([[seconds, side, side]]),
    }

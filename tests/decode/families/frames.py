"""Models that take whole frames, as a video or one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.decode.families.base import (
    IMAGE,
    PAD,
    TEXT,
    VIDEO,
    VISION_END,
    VISION_START,
    family,
    padded,
    words,
)

SIGLIP = dict(
    model_type="siglip_vision_model",
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=32,
    patch_size=4,
    num_channels=3,
    vision_use_head=False,
)


@family("LLaVA-OneVision", "video")
def llava_onevision(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        vision_config=dict(SIGLIP),
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[32, 32]],
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    frames = 4
    prompts = [
        words(4 + 2 * row) + [VIDEO] * (frames * 16 + 1) + words(8 - row) for row in range(rows)
    ]
    return model, {**padded(prompts), "pixel_values_videos": torch.randn(rows, frames, 3, 32, 32)}


@family("InternVL", "frames")
def internvl(rows: int) -> tuple[Any, dict[str, Tensor]]:
    """A video as images, one a frame."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig(
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=[32, 32],
            patch_size=[4, 4],
        ),
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_id=IMAGE,
        image_seq_length=16,
    )
    frames = 4
    prompts = []
    for row in range(rows):
        video = [token for _ in range(frames) for token in words(2) + [IMAGE] * 16]
        prompts.append(words(4 + 2 * row) + video + words(8 - row))
    pixels = torch.randn(rows * frames, 3, 32, 32)
    return InternVLForConditionalGeneration(config), {**padded(prompts), "pixel_values": pixels}


CLIP = dict(
    model_type="clip_vision_model",
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=32,
    patch_size=4,
    num_channels=3,
    projection_dim=32,
)


def video_inputs(rows: int, tokens: int, frames: int = 4) -> dict[str, Tensor]:
    """Prompts with a video of so many tokens, 32 pixels wide and high."""
    prompts = [words(4 + 2 * row) + [VIDEO] * tokens + words(8 - row) for row in range(rows)]
    return {**padded(prompts), "pixel_values_videos": torch.randn(rows, frames, 3, 32, 32)}


def frame_inputs(
    rows: int, tokens: int = 16, frames: int = 4, around: tuple[list[int], list[int]] = ([], [])
) -> dict[str, Tensor]:
    """Prompts with a video as images, one a frame, some text before each."""
    prompts = []
    for row in range(rows):
        prompt = words(4 + 2 * row)
        for _ in range(frames):
            prompt += words(2) + around[0] + [IMAGE] * tokens + around[1]
        prompts.append(prompt + words(8 - row))
    return padded(prompts)


@family("LLaVA-NeXT-Video", "video")
def llava_next_video(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    config = LlavaNextVideoConfig(
        vision_config=dict(CLIP),
        text_config={**TEXT, "model_type": "llama"},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[32, 32]],
        image_seq_length=64,
        video_seq_length=16,
    )
    return LlavaNextVideoForConditionalGeneration(config), video_inputs(rows, 4 * 16)


@family("Video-LLaVA", "video")
def video_llava(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

    config = VideoLlavaConfig(
        vision_config=dict(CLIP),
        text_config={**TEXT, "model_type": "llama"},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=64,
        video_seq_length=4 * 65,
    )
    inputs = video_inputs(rows, 2 * 65, frames=2)
    return VideoLlavaForConditionalGeneration(config), inputs


@family("SmolVLM", "frames")
def smolvlm(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    config = SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
        ),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    inputs = frame_inputs(rows)
    inputs["pixel_values"] = torch.randn(rows, 4, 3, 32, 32)
    return SmolVLMForConditionalGeneration(config), inputs


@family("Gemma 3", "frames", "sliding windows; a frame's tokens see one another")
def gemma3_vl(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(
        text_config={
            **TEXT,
            "head_dim": 16,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": False,
        },
        vision_config=dict(SIGLIP),
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        mm_tokens_per_image=16,
        tie_word_embeddings=False,
    )
    model = Gemma3ForConditionalGeneration(config)
    # It starts as zero: no pixel would reach the text.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
    inputs = frame_inputs(rows, around=([VISION_START], [VISION_END]))
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    inputs["pixel_values"] = torch.randn(rows * 4, 3, 32, 32)
    return model, inputs

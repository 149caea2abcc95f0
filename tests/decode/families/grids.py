"""Models whose processor cuts a video into patches and names its grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.decode.families.base import (
    IMAGE,
    TEXT,
    VIDEO,
    VISION_END,
    VISION_START,
    family,
    padded,
    words,
)

MROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
QWEN_TOKENS = dict(
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=VISION_START,
    vision_end_token_id=VISION_END,
)


def qwen_inputs(rows: int, between: int = 0) -> dict[str, Tensor]:
    """Prompts with a video, of which Qwen3-VL has each frame by itself, behind a time stamp."""
    grids = [(max(1, 4 - row), 8, 8) for row in range(rows)]
    prompts = []
    for row, (t, h, w) in enumerate(grids):
        video, frames = [], t if between else 1
        for _ in range(frames):
            tokens = [VIDEO] * (t * h * w // 4 // frames)
            video += words(between) + [VISION_START] + tokens + [VISION_END]
        prompts.append(words(4 + row) + video + words(8 - row))
    inputs = padded(prompts)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == VIDEO).int() * 2
    inputs["video_grid_thw"] = torch.tensor(grids)
    inputs["pixel_values_videos"] = torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * 16)
    return inputs


@family("Qwen2-VL", "video", "3D positions")
def qwen2_vl(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config=dict(
            depth=1,
            embed_dim=32,
            hidden_size=64,
            num_heads=2,
            mlp_ratio=2,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
            in_channels=3,
        ),
        **QWEN_TOKENS,
    )
    # The weights are drawn first: all of these tests are about this order of random numbers.
    model = Qwen2VLForConditionalGeneration(config)
    return model, qwen_inputs(rows)


@family("Qwen2.5-VL", "video", "3D positions")
def qwen2_5_vl(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config=dict(
            depth=2,
            hidden_size=32,
            out_hidden_size=64,
            intermediate_size=64,
            num_heads=2,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
            in_channels=3,
            window_size=16,
            fullatt_block_indexes=[1],
        ),
        **QWEN_TOKENS,
    )
    inputs = qwen_inputs(rows)
    inputs["second_per_grid_ts"] = torch.ones(rows)
    return Qwen2_5_VLForConditionalGeneration(config), inputs


DEEPSTACK = dict(
    depth=3,
    hidden_size=32,
    out_hidden_size=64,
    intermediate_size=64,
    num_heads=2,
    patch_size=4,
    spatial_merge_size=2,
    temporal_patch_size=2,
    in_channels=3,
    num_position_embeddings=64,
    deepstack_visual_indexes=[0, 1],
)


@family("Qwen3-VL", "video", "3D positions, text between frames, pixels enter several layers")
def qwen3_vl(rows: int) -> tuple[Any, dict[str, Tensor]]:
    """Head norms, text between the frames, and pixels that enter several layers."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config={
            **TEXT,
            "head_dim": 16,
            "rope_parameters": {**MROPE, "mrope_interleaved": True},
        },
        vision_config=dict(DEEPSTACK),
        **QWEN_TOKENS,
    )
    return Qwen3VLForConditionalGeneration(config), qwen_inputs(rows, between=2)


@family("VideoLLaMA3", "video")
def video_llama_3(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration

    config = VideoLlama3Config(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config=dict(
            model_type="video_llama_3_vision",
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            patch_size=4,
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    inputs = qwen_inputs(rows)
    del inputs["mm_token_type_ids"]
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:, : 3 * 16]
    inputs["video_merge_sizes"] = torch.full((rows,), 2)
    return VideoLlama3ForConditionalGeneration(config), inputs


EXPERTS = dict(
    moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1
)


@family("Qwen3-VL-MoE", "video", "as Qwen3-VL, experts")
def qwen3_vl_moe(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    config = Qwen3VLMoeConfig(
        text_config={
            **TEXT,
            **EXPERTS,
            "head_dim": 16,
            "rope_parameters": {**MROPE, "mrope_interleaved": True},
        },
        vision_config=dict(DEEPSTACK),
        **QWEN_TOKENS,
    )
    return Qwen3VLMoeForConditionalGeneration(config), qwen_inputs(rows, between=2)

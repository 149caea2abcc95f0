"""Models that are given a video's frames as patches, and pool some of them to a token."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from tests.decode.families.base import IMAGE, TEXT, VIDEO, VISION_END, VISION_START, family
from tests.decode.families.frames import frame_inputs


@family("Gemma 4", "video", "sliding windows of other widths; a frame's tokens see one another")
def gemma4(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    config = Gemma4Config(
        text_config={
            **TEXT,
            "head_dim": 16,
            "global_head_dim": 16,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 120,
            "use_bidirectional_attention": "vision",
            "tie_word_embeddings": False,
        },
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            pooling_kernel_size=2,
            patch_size=4,
            position_embedding_size=64,
            initializer_range=0.2,
        ),
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        boi_token_id=VISION_START,
        eoi_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    model = Gemma4ForConditionalGeneration(config)
    inputs = frame_inputs(rows, around=([VISION_START], [VISION_END]))
    ids = inputs["input_ids"]
    ids[ids == IMAGE] = VIDEO
    inputs["mm_token_type_ids"] = (ids == VIDEO).int() * 2
    grid = torch.cartesian_prod(torch.arange(8), torch.arange(8)).flip(1)
    inputs["pixel_values_videos"] = torch.rand(rows, 4, 64, 3 * 16)
    inputs["video_position_ids"] = grid.expand(rows, 4, -1, -1)
    if "num_frames_per_video" in inspect.signature(model.model.get_video_features).parameters:
        for name in ("pixel_values_videos", "video_position_ids"):
            inputs[name] = inputs[name].flatten(0, 1)
        inputs["num_frames_per_video"] = torch.full((rows,), 4)
    return model, inputs


@family("Molmo 2", "video", "head norms; a video's tokens see one another", since="5.24")
def molmo2(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Molmo2Config, Molmo2ForConditionalGeneration

    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    config = Molmo2Config(
        text_config={**TEXT, "head_dim": 16, "additional_vocab_size": 8},
        vision_config={
            **vision,
            "num_hidden_layers": 2,
            "image_size": [32, 32],
            "patch_size": 4,
            "num_position_embeddings": 64,
            "initializer_range": 0.2,
        },
        adapter_config={
            **vision,
            "vision_feature_layer": [-1, -2],
            "text_hidden_size": 64,
            "initializer_range": 0.2,
        },
        image_patch_id=IMAGE,
    )
    inputs = frame_inputs(rows)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    inputs["pixel_values_videos"] = torch.randn(rows * 4, 64, 3 * 16)
    patches = torch.arange(rows * 4 * 64).view(-1, 4, 2, 4, 2)  # two by two to a token
    inputs["video_token_pooling"] = patches.transpose(2, 3).reshape(-1, 4)
    inputs["video_grids"] = torch.tensor([[4, 4, 4]] * rows)
    return Molmo2ForConditionalGeneration(config), inputs

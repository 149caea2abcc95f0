"""More models whose processor cuts a video into patches and names its grid, of other houses."""

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
)
from tests.decode.families.grids import MROPE, QWEN_TOKENS, qwen_inputs

VISION = dict(
    depth=2,
    hidden_size=32,
    out_hidden_size=64,
    intermediate_size=64,
    num_heads=2,
    patch_size=4,
    spatial_merge_size=2,
    temporal_patch_size=2,
    in_channels=3,
)
MROPE_HALF = {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
GLM_TOKENS = dict(
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    image_start_token_id=VISION_START,
    image_end_token_id=VISION_END,
    video_start_token_id=105,
    video_end_token_id=106,
)


def untyped_inputs(rows: int, between: int = 0) -> dict[str, Tensor]:
    """Of processors that do not name the type of each token."""
    inputs = qwen_inputs(rows, between)
    del inputs["mm_token_type_ids"]
    return inputs


def image_inputs(rows: int) -> dict[str, Tensor]:
    """Each row's frames as images of one size."""
    inputs = qwen_inputs(rows, between=2)
    ids, grids = inputs["input_ids"], inputs.pop("video_grid_thw")
    ids[ids == VIDEO] = IMAGE
    inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    inputs["image_grid_thw"] = torch.repeat_interleave(grids, grids[:, 0], dim=0)
    inputs["image_grid_thw"][:, 0] = 1
    inputs["pixel_values"] = inputs.pop("pixel_values_videos")
    return inputs


def glm_inputs(rows: int) -> dict[str, Tensor]:
    """As Qwen3-VL has them, but a video's frames are made of the tokens of images."""
    inputs = qwen_inputs(rows, between=2)
    inputs["input_ids"][inputs["input_ids"] == VIDEO] = IMAGE
    return inputs


def glm(name: str, **text: Any) -> Any:
    import transformers

    config = getattr(transformers, name + "Config")(
        text_config={**TEXT, "rope_parameters": dict(MROPE), **text},
        vision_config={**VISION, "image_size": 32},
        **GLM_TOKENS,
    )
    return getattr(transformers, name + "ForConditionalGeneration")(config)


@family("GLM-4.1V", "video", "3D positions, text between frames")
def glm4v(rows: int) -> tuple[Any, dict[str, Tensor]]:
    return glm("Glm4v"), glm_inputs(rows)


@family("GLM-4.6V", "video", "3D positions, text between frames")
def glm46v(rows: int) -> tuple[Any, dict[str, Tensor]]:
    return glm("Glm46V"), glm_inputs(rows)


@family("GLM-4.5V", "video", "3D positions, text between frames, experts")
def glm4v_moe(rows: int) -> tuple[Any, dict[str, Tensor]]:
    experts = dict(
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        head_dim=16,
        rope_parameters=MROPE_HALF,
    )
    return glm("Glm4vMoe", **experts), glm_inputs(rows)


@family("GLM-OCR", "images", "3D positions")
def glm_ocr(rows: int) -> tuple[Any, dict[str, Tensor]]:
    return glm("GlmOcr", head_dim=16, rope_parameters=MROPE_HALF), image_inputs(rows)


@family("ERNIE 4.5 VL", "video", "3D positions, experts of text and of vision")
def ernie4_5_vl(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

    config = Ernie4_5_VLMoeConfig(
        text_config={
            **TEXT,
            "rope_parameters": {**MROPE, "mrope_section": [3, 3, 2]},
            "moe_intermediate_size": [32, 32],
            "moe_num_experts": 4,
            "moe_k": 2,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "tie_word_embeddings": False,
        },
        vision_config={
            **{
                k: v
                for k, v in VISION.items()
                if k not in ("out_hidden_size", "temporal_patch_size")
            },
            "temporal_merge_size": 2,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        video_start_token_id=105,
        video_end_token_id=106,
        tie_word_embeddings=False,
    )
    inputs = qwen_inputs(rows)
    grid = inputs["video_grid_thw"]
    grid[:, 0] *= 2  # frames are merged by twos
    inputs["pixel_values_videos"] = torch.randn(int(grid.prod(1).sum()), 3 * 16)
    inputs["moe_mm_token_type_ids"] = (inputs["input_ids"] == VIDEO).int()
    return Ernie4_5_VLMoeForConditionalGeneration(config), inputs


@family("PaddleOCR-VL", "images", "3D positions")
def paddleocr_vl(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration

    config = PaddleOCRVLConfig(
        text_config={
            **TEXT,
            "head_dim": 16,
            "rope_parameters": MROPE,
            "tie_word_embeddings": False,
        },
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
            spatial_merge_size=2,
        ),
        tie_word_embeddings=False,
        **QWEN_TOKENS,
    )
    inputs = image_inputs(rows)
    inputs["pixel_values"] = inputs["pixel_values"][:, :48].reshape(-1, 3, 4, 4)
    return PaddleOCRVLForConditionalGeneration(config), inputs


AUDIO = dict(
    d_model=32,
    encoder_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=32,
    output_dim=64,
)


@family("Qwen2.5-Omni, thinker", "video", "3D positions")
def qwen2_5_omni(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    config = Qwen2_5OmniThinkerConfig(
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config={**VISION, "window_size": 16, "fullatt_block_indexes": [1]},
        audio_config=dict(AUDIO),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=107,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        audio_start_token_id=108,
        audio_end_token_id=109,
    )
    inputs = untyped_inputs(rows)
    inputs["video_second_per_grid"] = torch.ones(rows)
    return Qwen2_5OmniThinkerForConditionalGeneration(config), inputs


@family("Qwen3-Omni, thinker", "video", "3D positions, experts, pixels enter several layers")
def qwen3_omni(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration

    config = Qwen3OmniMoeThinkerConfig(
        text_config={
            **TEXT,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "rope_parameters": {**MROPE, "mrope_interleaved": True},
        },
        vision_config={
            **VISION,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        audio_config=dict(AUDIO),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=107,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        audio_start_token_id=108,
    )
    inputs = untyped_inputs(rows)
    inputs["video_second_per_grid"] = torch.ones(rows)
    return Qwen3OmniMoeThinkerForConditionalGeneration(config), inputs


@family("Command Compass", "video", "sliding windows, pixels enter several layers")
def cohere_compass(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import CohereCompassConfig, CohereCompassForConditionalGeneration

    config = CohereCompassConfig(
        text_config={
            **TEXT,
            "tie_word_embeddings": False,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                kind: {**MROPE, "mrope_interleaved": True}
                for kind in ("sliding_attention", "full_attention")
            },
        },
        vision_config={
            **VISION,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **QWEN_TOKENS,
    )
    return CohereCompassForConditionalGeneration(config), qwen_inputs(rows, between=2)


@family("Cosmos 3 Edge", "video", "3D positions")
def cosmos3_edge(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Cosmos3EdgeConfig, Cosmos3EdgeForConditionalGeneration

    config = Cosmos3EdgeConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": MROPE},
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            patch_size=4,
            num_patches=64,
            spatial_merge_size=2,
        ),
        projector_hidden_size=64,
        **QWEN_TOKENS,
    )
    inputs = qwen_inputs(rows, between=2)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:, :48]
    return Cosmos3EdgeForConditionalGeneration(config), inputs


@family("Cosmos 3 Omni", "video", "as Qwen3-VL")
def cosmos3_omni(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Cosmos3OmniConfig, Cosmos3OmniForConditionalGeneration

    config = Cosmos3OmniConfig(
        text_config={
            **TEXT,
            "head_dim": 16,
            "rope_parameters": {**MROPE, "mrope_interleaved": True},
        },
        vision_config={
            **VISION,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **QWEN_TOKENS,
    )
    return Cosmos3OmniForConditionalGeneration(config), qwen_inputs(rows, between=2)


MUSE = dict(
    patch_size=4,
    pos_emb_height=8,
    pos_emb_width=8,
    num_attention_heads=2,
    num_hidden_layers=2,
    hidden_size=32,
    intermediate_size=64,
    max_position_embeddings=64,
)


def muse(name: str, parts: dict[str, Any] | None = None, **text: Any) -> Any:
    import transformers

    config = getattr(transformers, name + "Config")(
        text_config={
            **TEXT,
            "head_dim": 16,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            **text,
        },
        vision_config=dict(MUSE),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        out_hidden_size=4 * 32,
        projector_hidden_size=64,
        **(parts or {}),
    )
    return getattr(transformers, name + "ForConditionalGeneration")(config)


@family("Muse Glimmer", "video", "sliding windows, head norms")
def muse_glimmer(rows: int) -> tuple[Any, dict[str, Tensor]]:
    return muse("MuseGlimmer"), untyped_inputs(rows)


@family("Muse Spark", "video", "sliding windows, head norms, experts", since="5.24")
def muse_spark(rows: int) -> tuple[Any, dict[str, Tensor]]:
    experts = dict(
        moe_intermediate_size=32, moe_hidden_size=64, num_local_experts=4, num_experts_per_tok=2
    )
    config = dict(audio_config=dict(out_hidden_size=64, hidden_sizes=[16, 16, 16, 16]))
    return muse("MuseSpark", config, **experts), untyped_inputs(rows)

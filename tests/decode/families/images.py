"""Models made for images, which a video is shown to as frames, and Molmo 2, which is like them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.decode.families.base import (
    IMAGE,
    PAD,
    TEXT,
    family,
)
from tests.decode.families.frames import CLIP, SIGLIP, frame_inputs

TOWER = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=32,
    patch_size=4,
)
PIXTRAL = dict(
    model_type="pixtral",
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=32,
    patch_size=4,
    head_dim=16,
)


def shown(rows: int, tokens: int, frames: int = 4, **sizes: Any) -> dict[str, Tensor]:
    """Prompts with frames of 32 x 32 pixels, so many tokens each."""
    inputs = frame_inputs(rows, tokens, frames, **sizes)
    inputs["pixel_values"] = torch.randn(rows * frames, 3, 32, 32)
    return inputs


@family("LLaVA", "images")
def llava(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=dict(CLIP),
        text_config={**TEXT, "model_type": "llama"},
        image_token_index=IMAGE,
        image_seq_length=64,
    )
    return LlavaForConditionalGeneration(config), shown(rows, 64, frames=2)


@family("LLaVA-NeXT", "images")
def llava_next(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=dict(CLIP),
        text_config={**TEXT, "model_type": "llama"},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 32]],
        image_seq_length=64,
    )
    inputs = frame_inputs(rows, 64 + 8 * 9, frames=1)
    inputs["pixel_values"] = torch.randn(rows, 2, 3, 32, 32)
    inputs["image_sizes"] = torch.tensor([[32, 32]] * rows)
    return LlavaNextForConditionalGeneration(config), inputs


@family("ViP-LLaVA", "images")
def vipllava(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

    config = VipLlavaConfig(
        vision_config=dict(CLIP),
        text_config={**TEXT, "model_type": "llama"},
        image_token_index=IMAGE,
        vision_feature_layers=[-2, -1],
        image_seq_length=64,
    )
    return VipLlavaForConditionalGeneration(config), shown(rows, 64, frames=2)


@family("Idefics 2", "images", "configured without a sliding window")
def idefics2(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration

    config = Idefics2Config(
        vision_config=dict(TOWER),
        text_config={**TEXT, "model_type": "mistral", "sliding_window": None},
        perceiver_config=dict(
            resampler_n_latents=16,
            resampler_depth=1,
            resampler_n_heads=2,
            resampler_head_dim=16,
            num_key_value_heads=1,
            hidden_size=64,
            initializer_range=0.2,
        ),
        image_token_id=IMAGE,
    )
    inputs = frame_inputs(rows)
    inputs["pixel_values"] = torch.randn(rows, 4, 3, 32, 32)
    return Idefics2ForConditionalGeneration(config), inputs


@family("Idefics 3", "images")
def idefics3(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    config = Idefics3Config(
        vision_config=dict(TOWER),
        text_config={**TEXT, "model_type": "llama"},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    inputs = frame_inputs(rows)
    inputs["pixel_values"] = torch.randn(rows, 4, 3, 32, 32)
    return Idefics3ForConditionalGeneration(config), inputs


@family("Mistral 3, Pixtral", "images")
def mistral3(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    config = Mistral3Config(
        vision_config=dict(PIXTRAL),
        text_config={**TEXT, "model_type": "mistral", "head_dim": 16, "sliding_window": None},
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    inputs = shown(rows, 16)
    inputs["image_sizes"] = torch.tensor([[32, 32]] * (rows * 4))
    return Mistral3ForConditionalGeneration(config), inputs


COHERE = {
    **TEXT,
    "model_type": "cohere2",
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "tie_word_embeddings": False,
}


@family("Aya Vision", "images", "sliding windows")
def aya_vision(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration

    config = AyaVisionConfig(
        vision_config=dict(SIGLIP),
        text_config=dict(COHERE),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return AyaVisionForConditionalGeneration(config), shown(rows, 16)


@family("Command A Vision", "images", "sliding windows")
def cohere2_vision(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Cohere2VisionConfig, Cohere2VisionForConditionalGeneration

    config = Cohere2VisionConfig(
        vision_config=dict(SIGLIP),
        text_config=dict(COHERE),
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
        tie_word_embeddings=False,
    )
    return Cohere2VisionForConditionalGeneration(config), shown(rows, 16)


@family("Ovis 2", "images")
def ovis2(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration

    config = Ovis2Config(
        vision_config={
            **TOWER,
            "vocab_size": 40,
            "hidden_stride": 2,
            "num_visual_indicator_tokens": 5,
            "initializer_range": 0.2,
        },
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_id=IMAGE,
        visual_indicator_token_ids=[105, 106, 107, 108, 109],
        vocab_size=120,
        hidden_size=64,
        tie_word_embeddings=False,
    )
    return Ovis2ForConditionalGeneration(config), shown(rows, 16)


@family("LightOnOCR", "images", "head norms")
def lighton_ocr(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import LightOnOcrConfig, LightOnOcrForConditionalGeneration

    config = LightOnOcrConfig(
        vision_config=dict(PIXTRAL),
        text_config={**TEXT, "model_type": "qwen3", "head_dim": 16},
        image_token_id=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    inputs = shown(rows, 16)
    inputs["image_sizes"] = torch.tensor([[32, 32]] * (rows * 4))
    return LightOnOcrForConditionalGeneration(config), inputs


@family("Aria", "images", "experts")
def aria(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import AriaConfig, AriaForConditionalGeneration

    config = AriaConfig(
        vision_config={**TOWER, "model_type": "idefics3_vision"},
        text_config={
            **TEXT,
            "model_type": "aria_text",
            "moe_num_experts": 4,
            "moe_topk": 2,
            "moe_num_shared_experts": 1,
        },
        image_token_index=IMAGE,
        projector_patch_to_query_dict={64: 16},
    )
    return AriaForConditionalGeneration(config), shown(rows, 16)


@family("GOT-OCR 2", "images")
def got_ocr2(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import GotOcr2Config, GotOcr2ForConditionalGeneration

    config = GotOcr2Config(
        vision_config=dict(
            hidden_size=32,
            output_channels=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
            mlp_dim=64,
            window_size=4,
            global_attn_indexes=[1],
            initializer_range=0.2,
        ),
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return GotOcr2ForConditionalGeneration(config), shown(rows, 4)


@family("Chameleon", "images", "head norms; images as words")
def chameleon(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    # Image word 17 is called IMGIMGBHZ.
    called = ["".join(chr(65 + int(digit)) for digit in str(n)) for n in range(26)]
    names = {f"IMGIMG{name}Z": 40 + n for n, name in enumerate(called)}
    config = ChameleonConfig(
        **TEXT,
        vq_config=dict(
            embed_dim=16,
            num_embeddings=26,
            resolution=32,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            latent_channels=16,
            attn_resolutions=[],
        ),
        vocabulary_map={**names, "<image>": IMAGE},
        tie_word_embeddings=False,
    )
    return ChameleonForConditionalGeneration(config), shown(rows, 256, frames=1)


@family("Phi-4 multimodal", "images", "configured without a sliding window")
def phi4_multimodal(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

    config = Phi4MultimodalConfig(
        **TEXT,
        original_max_position_embeddings=1024,
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
            crop_size=32,
            image_token_id=IMAGE,
        ),
        audio_config=dict(
            hidden_size=32,
            intermediate_size=32,
            num_blocks=1,
            num_attention_heads=2,
            ext_pw_out_channel=32,
            depthwise_separable_out_channel=32,
            nemo_conv_channels=32,
            audio_token_id=107,
        ),
    )
    # A crop and the whole of 4 x 4 tokens, each row with one more, and one between.
    inputs = frame_inputs(rows, 4 * 5 + 1 + 4 * 5, frames=1)
    inputs["image_pixel_values"] = torch.randn(rows, 2, 3, 32, 32)
    inputs["image_sizes"] = torch.tensor([[32, 32]] * rows)
    inputs["image_attention_mask"] = torch.ones(rows, 2, 8, 8)
    return Phi4MultimodalForCausalLM(config), inputs


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

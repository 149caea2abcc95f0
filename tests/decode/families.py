"""Tiny random models of the families that are tested, with real inputs.

Each takes a number of rows and returns the model and what its processor would give.
"""

from __future__ import annotations

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

MROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
QWEN_TOKENS = dict(
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=VISION_START,
    vision_end_token_id=VISION_END,
)


def _words(count: int) -> list[int]:
    return torch.randint(7, 99, (count,)).tolist()


def _padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    length = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def _qwen_inputs(rows: int, between: int = 0) -> dict[str, Tensor]:
    """Prompts with a video, of which Qwen3-VL has each frame by itself, behind a time stamp."""
    grids = [(max(1, 4 - row), 8, 8) for row in range(rows)]
    prompts = []
    for row, (t, h, w) in enumerate(grids):
        video, frames = [], t if between else 1
        for _ in range(frames):
            tokens = [VIDEO] * (t * h * w // 4 // frames)
            video += _words(between) + [VISION_START] + tokens + [VISION_END]
        prompts.append(_words(4 + row) + video + _words(8 - row))
    inputs = _padded(prompts)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == VIDEO).int() * 2
    inputs["video_grid_thw"] = torch.tensor(grids)
    inputs["pixel_values_videos"] = torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * 16)
    return inputs


def _qwen2_vl(rows: int) -> tuple[Any, dict[str, Tensor]]:
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
    return model, _qwen_inputs(rows)


def _llava_onevision(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        vision_config=dict(
            model_type="siglip_vision_model",
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
            num_channels=3,
            vision_use_head=False,
        ),
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[32, 32]],
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    frames = 4
    prompts = [
        _words(4 + 2 * row) + [VIDEO] * (frames * 16 + 1) + _words(8 - row) for row in range(rows)
    ]
    return model, {**_padded(prompts), "pixel_values_videos": torch.randn(rows, frames, 3, 32, 32)}


def _llama(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**TEXT))
    return model, _padded([_words(90 - 7 * row) for row in range(rows)])


def _gemma3(rows: int) -> tuple[Any, dict[str, Tensor]]:
    """Sliding-window layers, head norms, and a window that is shorter than the prompt."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(
        **TEXT,
        head_dim=16,
        sliding_window=24,
        layer_types=kinds,
        query_pre_attn_scalar=16,
        tie_word_embeddings=False,  # or it says its last token again and again
    )
    return Gemma3ForCausalLM(config), _padded([_words(90 - 7 * row) for row in range(rows)])


def _qwen2_5_vl(rows: int) -> tuple[Any, dict[str, Tensor]]:
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
    inputs = _qwen_inputs(rows)
    inputs["second_per_grid_ts"] = torch.ones(rows)
    return Qwen2_5_VLForConditionalGeneration(config), inputs


def _qwen3_vl(rows: int) -> tuple[Any, dict[str, Tensor]]:
    """Head norms, text between the frames, and pixels that enter several layers."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config={
            **TEXT,
            "head_dim": 16,
            "rope_parameters": {**MROPE, "mrope_interleaved": True},
        },
        vision_config=dict(
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
        ),
        **QWEN_TOKENS,
    )
    return Qwen3VLForConditionalGeneration(config), _qwen_inputs(rows, between=2)


def _internvl(rows: int) -> tuple[Any, dict[str, Tensor]]:
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
        video = [token for _ in range(frames) for token in _words(2) + [IMAGE] * 16]
        prompts.append(_words(4 + 2 * row) + video + _words(8 - row))
    pixels = torch.randn(rows * frames, 3, 32, 32)
    return InternVLForConditionalGeneration(config), {**_padded(prompts), "pixel_values": pixels}


def _gemma2(rows: int) -> tuple[Any, dict[str, Tensor]]:
    """Soft caps, which only the model's eager attention knows, and sliding windows."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        **TEXT,
        head_dim=16,
        sliding_window=24,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=5.0,
        attn_implementation="eager",
        tie_word_embeddings=False,
    )
    return Gemma2ForCausalLM(config), _padded([_words(90 - 7 * row) for row in range(rows)])


def _gpt_oss(rows: int) -> tuple[Any, dict[str, Tensor]]:
    """Attention sinks, sliding windows and experts."""
    from transformers import GptOssConfig, GptOssForCausalLM

    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = GptOssConfig(
        **TEXT,
        head_dim=16,
        sliding_window=24,
        layer_types=kinds,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return GptOssForCausalLM(config), _padded([_words(90 - 7 * row) for row in range(rows)])


def _mistral(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import MistralConfig, MistralForCausalLM

    model = MistralForCausalLM(MistralConfig(**TEXT, sliding_window=None))
    return model, _padded([_words(90 - 7 * row) for row in range(rows)])


FAMILIES = {
    "qwen2_vl": _qwen2_vl,
    "llava_onevision": _llava_onevision,
    "llama": _llama,
    "gemma3": _gemma3,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "gemma2": _gemma2,
    "gpt_oss": _gpt_oss,
    "mistral": _mistral,
}

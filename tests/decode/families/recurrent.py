"""Models with gated delta layers, which keep a state, between those that attend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.decode.families.base import TEXT, family, padded, words
from tests.decode.families.grids import MROPE, QWEN_TOKENS, qwen_inputs
from tests.decode.families.grids_more import image_inputs

KINDS = ["linear_attention", "full_attention", "linear_attention"]
HEADS: dict[str, Any] = dict(
    layer_types=KINDS,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=24,
)
HYBRID = {**TEXT, **HEADS, "head_dim": 16}
EXPERTS = dict(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
)
MROPE_PART = {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0}
VISION = dict(
    depth=2,
    hidden_size=32,
    intermediate_size=64,
    num_heads=2,
    patch_size=4,
    out_hidden_size=64,
    num_position_embeddings=64,
)


def remembering(model: Any) -> Any:
    """With states that hold on to a token for some tens of others; as drawn, for less than one."""
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "A_log"):
                module.A_log.uniform_(-5, -2)
    return model


@family("Qwen3-Next", "text", "gated delta layers, experts")
def qwen3_next(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    model = remembering(Qwen3NextForCausalLM(Qwen3NextConfig(**HYBRID, **EXPERTS)))
    return model, padded([words(90 - 7 * row) for row in range(rows)])


@family("OLMo hybrid", "text", "gated delta layers of negative eigenvalues")
def olmo_hybrid(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

    model = remembering(OlmoHybridForCausalLM(OlmoHybridConfig(**TEXT, **HEADS)))
    return model, padded([words(90 - 7 * row) for row in range(rows)])


@family("Qwen3.5, text", "text", "gated delta layers")
def qwen3_5_text(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    model = remembering(Qwen3_5ForCausalLM(Qwen3_5TextConfig(**HYBRID)))
    return model, padded([words(120 - 7 * row) for row in range(rows)])


@family("Qwen3.5", "video", "gated delta layers")
def qwen3_5(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = {**HYBRID, "rope_parameters": MROPE_PART}
    config = Qwen3_5Config(text_config=text, vision_config=dict(VISION), **QWEN_TOKENS)
    return remembering(Qwen3_5ForConditionalGeneration(config)), qwen_inputs(rows, between=2)


@family("Qwen3.5-MoE", "images", "gated delta layers, experts")
def qwen3_5_moe(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    text: dict[str, Any] = {**HYBRID, **EXPERTS, "rope_parameters": MROPE_PART}
    del text["intermediate_size"]
    config = Qwen3_5MoeConfig(text_config=text, vision_config=dict(VISION), **QWEN_TOKENS)
    return remembering(Qwen3_5MoeForConditionalGeneration(config)), image_inputs(rows)

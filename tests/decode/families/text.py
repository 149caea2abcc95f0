"""Models that take text alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.decode.families.base import TEXT, family, padded, words


@family("Llama", "text")
def llama(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**TEXT))
    return model, padded([words(90 - 7 * row) for row in range(rows)])


@family("Gemma 3, text", "text", "sliding windows, head norms")
def gemma3(rows: int) -> tuple[Any, dict[str, Tensor]]:
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
    return Gemma3ForCausalLM(config), padded([words(90 - 7 * row) for row in range(rows)])


@family("Gemma 2", "text", "soft caps, sliding windows")
def gemma2(rows: int) -> tuple[Any, dict[str, Tensor]]:
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
    return Gemma2ForCausalLM(config), padded([words(90 - 7 * row) for row in range(rows)])


@family("gpt-oss", "text", "attention sinks, sliding windows, experts")
def gpt_oss(rows: int) -> tuple[Any, dict[str, Tensor]]:
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
    return GptOssForCausalLM(config), padded([words(90 - 7 * row) for row in range(rows)])


@family("Mistral", "text", "configured without a sliding window, as from v0.2 on")
def mistral(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import MistralConfig, MistralForCausalLM

    model = MistralForCausalLM(MistralConfig(**TEXT, sliding_window=None))
    return model, padded([words(90 - 7 * row) for row in range(rows)])


@family("Qwen2", "text")
def qwen2(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**TEXT))
    return model, padded([words(90 - 7 * row) for row in range(rows)])


@family("Qwen3", "text", "head norms")
def qwen3(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=16))
    return model, padded([words(90 - 7 * row) for row in range(rows)])


@family(
    "Gemma 4, text",
    "text",
    "a head dim of 512 in layers without a window, head norms",
    since="5.24",
)
def gemma4(rows: int) -> tuple[Any, dict[str, Tensor]]:
    """Layers without a window have a head dim of their own."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        **TEXT,
        head_dim=16,
        global_head_dim=512,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        tie_word_embeddings=False,
    )
    return Gemma4ForCausalLM(config), padded([words(90 - 7 * row) for row in range(rows)])

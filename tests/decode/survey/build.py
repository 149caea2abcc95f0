"""A tiny model of any class, by its default configuration made small, whatever its fields are."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY, PAD = 120, 0
MOST_PARAMETERS = 120_000_000
# What a field that a default configuration has becomes, if it is a larger number there.
SIZES = {
    **dict.fromkeys(
        ("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size",
         "shape_vocab_size", "pronunciation_vocab_size"), VOCABULARY,
    ),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embed_dim", "out_hidden_size", "emb_dim",
         "projection_dim", "text_hidden_size", "word_embed_proj_dim", "embedding_size",
         "embedding_dim", "output_dim", "backbone_hidden_size", "lru_width",
         "input_embedding_size", "output_embedding_size", "pooler_output_size",
         "projector_input_dim", "projector_output_dim", "vision_output_dim",
         "encoder_hidden_size", "attention_hidden_size", "decoder_hidden_size",
         "vision_hidden_size"), 64,
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "mlp_dim",
         "ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size",
         "shared_intermediate_size", "d_inner", "feed_forward_size", "projector_hidden_size",
         "dff", "projection_hidden_size", "merged_hidden_size",
         "moe_shared_expert_intermediate_size", "shared_expert_intermediate_size",
         "share_expert_dim"), 96,
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_hidden_size",
         "hidden_size_per_layer_input", "router_hidden_size", "mamba_d_state", "ssm_state_size",
         "state_size", "mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "time_step_rank",
         "linear_value_head_dim", "linear_head_dim", "head_dim", "d_kv", "attention_head_size",
         "d_head", "swa_head_dim", "v_head_dim", "qk_nope_head_dim", "kv_lora_rank",
         "mamba_dt_rank", "q_lora_rank", "index_head_dim", "kv_channels", "mamba_chunk_size",
         "chunk_size", "adapter_rank", "o_lora_rank", "rotary_dim", "attention_head_dim",
         "laurel_rank", "query_pre_attn_scalar"), 16,
    ),
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads",
         "encoder_attention_heads", "decoder_attention_heads", "swa_num_attention_heads",
         "num_decoder_attention_heads", "num_encoder_attention_heads", "index_n_heads",
         "num_sliding_attention_heads", "linear_num_heads", "n_routed_experts", "num_experts",
         "num_local_experts", "moe_num_experts", "linear_num_value_heads", "zero_expert_num"), 4,
    ),
    **dict.fromkeys(
        ("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "linear_num_key_heads",
         "num_experts_per_tok", "moe_topk", "moe_k", "depth", "num_experts_per_token",
         "encoder_layers", "num_query_tokens", "num_encoder_layers"), 2,
    ),
    **dict.fromkeys(
        ("n_group", "topk_group", "num_global_layers"), 1,
    ),
    "base_channels": 32,
    "codebook_size": 40,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "attention_window_size", "index_topk",
         "attention_chunk_size", "local_attention", "window_size"), 24,
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "original_max_position_embeddings"), 1024,
    ),
}  # fmt: skip
LAYERS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers",
    "num_decoder_layers",
)  # fmt: skip
FEWEST_LAYERS, MOST_LAYERS = 3, 8
TOKENS = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None}
SWITCHES = {
    "is_decoder": True,
    "use_cache": True,
    "add_cross_attention": False,
    "tie_word_embeddings": False,  # or it says its last token again and again
}
# Three-dimensional positions, of a head of 16 dims and of a half and a quarter of one.
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
_HALF_MROPE = {**_MROPE, "mrope_section": [2, 1, 1]}
# What a configuration is given besides: where its default is None or does not fit the others, and
# where checkpoints have layers of a kind that it has not.
EXTRA: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("Cosmos3EdgeTextConfig", "Glm4vTextConfig", "GlmOcrTextConfig", "PaddleOCRTextConfig",
         "Qwen2VLTextConfig", "Qwen2_5OmniTextConfig", "Qwen2_5_VLTextConfig"),
        {"rope_parameters": _MROPE},
    ),
    "Apertus1p5Config": {"image_token_offset": 20, "audio_token_offset": 60},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 102}},
    "CohereCompassTextConfig": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "DbrxAttentionConfig": {"rope_theta": 1e4, "clip_qkv": 8.0},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "DeepseekOcr2TextConfig": {
        "mlp_layer_types": ["dense", "sparse", "sparse"], "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    },
    "Dots1Config": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "Emu3Config": {"vocabulary_map": {"<image>": 102}},
    "Ernie4_5_VLMoeTextConfig": {"rope_parameters": {**_MROPE, "mrope_section": [2, 2, 4]}},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0},
    "Glm4vMoeTextConfig": {"rope_parameters": {**_HALF_MROPE, "partial_rotary_factor": 0.5}},
    "Glm5NextTextConfig": {"index_topk": 32},
    "Granite4VisionConfig": {"deepstack_layer_map": [], "downsample_rate": "4/8"},
    "HunYuanVLTextConfig": {"rope_parameters": _MROPE},
    "HYV4VLTextConfig": {"rope_parameters": _HALF_MROPE},
    "Lfm2Config": {
        "layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3,
    },
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "Mamba2Config": {"num_heads": 8},
    "MiniMaxM3VLTextConfig": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    },
    "MinistralConfig": {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "MistralConfig": {"sliding_window": None},
    "Mistral4Config": {"head_dim": 16, "qk_head_dim": 16, "qk_nope_head_dim": 8},
    "MllamaTextConfig": {"cross_attention_layers": [1]},
    "Molmo2AdapterConfig": {"vision_feature_layer": [-1, -2]},
    "NemotronConfig": {"num_key_value_heads": 2},
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": 103},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 103},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
        "indexer_budget": 16, "indexer_compress_ratio": 4,
    },
    "RadioConfig": {"video_temporal_patch_size": 2},
    "ReformerConfig": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (32, 32)},
    "Step3p7TextConfig": {"sliding_window": 24},
    "WavTokenizerEncoderConfig": {"codebook_dim": 64},
    "XmodConfig": {"default_language": "en_XX"},
}  # fmt: skip
# What of that a user has to know.
NOTES = {"MistralConfig": "configured without a sliding window, as Mistral is from v0.2 on"}


class NotBuilt(Exception):
    """A model that the default configuration of its class does not make, or none that is small."""


def built(kind: type) -> tuple[PreTrainedModel, str | None]:
    """A tiny model of this class, of random weights in float32.

    Or one without weights and of the default widths, for what `patch` tells before it needs any,
    and why there is no tiny one.
    """
    try:
        return _tiny(kind), None
    except Exception as error:
        obstacle = error
    try:
        return _shallow(kind), _first_reason(obstacle)
    except Exception:
        raise NotBuilt(_first_reason(obstacle)) from None


def _first_reason(error: Exception) -> str:
    """A line of it that says what is wrong; a validator's first line names the validator."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if "Error: " in line), lines[0] if lines else "")
    reason = reason.split(". ")[0]
    return reason if "Error: " in reason else f"{type(error).__name__}: {reason}"


def _tiny(kind: Any) -> PreTrainedModel:
    config = kind.config_class(**small_fields(kind.config_class()))
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in kind(config).parameters())
    if parameters > MOST_PARAMETERS:
        raise NotBuilt(f"has {parameters:,} parameters when small")
    torch.manual_seed(0)
    model = kind(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                # Wide, so that attention is far from uniform and the two best tokens from close.
                parameter.normal_(0.0, 0.2)
    return model


def _shallow(kind: Any) -> PreTrainedModel:
    config = kind.config_class(**small_fields(kind.config_class(), {}))
    with torch.device("meta"):
        return kind(config).eval()


def note_on(config: PreTrainedConfig) -> str:
    """What `NOTES` has on a configuration and those in it."""
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    notes = [NOTES.get(type(config).__name__, ""), *map(note_on, inner)]
    return next(filter(None, notes), "")


def small_fields(config: PreTrainedConfig, sizes: dict[str, int] = SIZES) -> dict[str, Any]:
    """Those of `config`, by name, with which its class makes a small one."""
    fields: dict[str, Any] = {}
    values = _values(config)
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = {**small_fields(value, sizes), "model_type": value.model_type}
        elif type(value) is int and name in sizes and value > sizes[name]:
            fields[name] = sizes[name]
    if "head_dim" in sizes and values.get("head_dim", 0) is None:
        fields["head_dim"] = sizes["head_dim"]
    if sizes and "qk_rope_head_dim" in values:  # latent attention has no groups of heads
        fields["num_key_value_heads"] = sizes["num_attention_heads"]
        if values.get("head_dim") == values["qk_rope_head_dim"]:
            fields["head_dim"] = sizes["qk_rope_head_dim"]  # the part of a head that is rotated
    fields |= _layers(values)
    fields |= {name: token for name, token in TOKENS.items() if name in values}
    fields |= {name: value for name, value in SWITCHES.items() if name in values}
    if sizes:
        fields |= EXTRA.get(type(config).__name__, {})
    return fields


def _values(config: PreTrainedConfig) -> dict[str, Any]:
    """What `config` says, those of its values too that it has under another name."""
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    for name in inspect.signature(type(config).__init__).parameters:
        if name not in values and hasattr(config, name):
            values[name] = getattr(config, name)
    return values


def _layers(values: dict[str, Any]) -> dict[str, Any]:
    """How many, and what is said of each: the first few, with one at least of each kind."""
    count = next((values[n] for n in LAYERS if type(values.get(n)) is int), None)
    if count is None:
        return {}
    each = {
        name: list(value)
        for name, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == count > 1
    }
    kinds: dict[Any, int] = {}
    for index in range(count):
        kinds.setdefault(repr([value[index] for value in each.values()]), index)
    chosen = set(sorted(kinds.values())[:MOST_LAYERS])
    for index in range(count):
        if len(chosen) < FEWEST_LAYERS:
            chosen.add(index)
    fields: dict[str, Any] = {name: len(chosen) for name in LAYERS if values.get(name) == count}
    for name, value in each.items():
        fields[name] = [_size(name, value[index]) for index in sorted(chosen)]
    return fields


def _size(name: str, value: Any) -> Any:
    return min(value, 4) if "heads" in name and type(value) is int else value

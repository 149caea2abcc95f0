"""Families of models that see, and that patch refuses: by name, and saying why.

On the meta device, of default configurations with fewer layers: what is in their way shows before
any weight is read. Where it takes a trial, the model is a tiny one.
"""

import re

import pytest
import torch
import transformers
from packaging.version import Version

import std_decode
from tests.decode.families import TEXT

CODER = "is an encoder-decoder model"
BACKEND = "does not take custom attention functions"
POSITIONS = "numbers its tokens itself"
OWN = "has a generate() of its own that runs the one of its "
WINDOWS = "has sliding-window layers only"

# What each is called, what is in its way, and the first tested version that has it.
REFUSED = {
    "Blip2ForConditionalGeneration": OWN + "language_model",
    "DeepseekVLForConditionalGeneration": BACKEND,
    "DeepseekVLHybridForConditionalGeneration": BACKEND,
    "Dots3NoteForConditionalGeneration": ("indexed_attention", "5.24"),
    "EvollaForProteinText2Text": BACKEND,
    "Exaone4_5_ForConditionalGeneration": POSITIONS,
    "Florence2ForConditionalGeneration": CODER,
    "GitForCausalLM": BACKEND,
    "Glm5NextForConditionalGeneration": "linear_attention",
    "HYV4VLForConditionalGeneration": ("indexed_attention", "5.24"),
    "HyperCLOVAXVisionV2ForConditionalGeneration": (POSITIONS, "5.24"),
    "Idefics2ForConditionalGeneration": WINDOWS,  # as configured by default
    "IdeficsForVisionText2Text": "4 causal attention modules for 2 decoder layers",
    "Inkling2ForConditionalGeneration": ("hybrid, hybrid_sliding", "5.24"),
    "InstructBlipForConditionalGeneration": OWN + "language_model",
    "InstructBlipVideoForConditionalGeneration": OWN + "language_model",
    "JanusForConditionalGeneration": BACKEND,
    "Kosmos2ForConditionalGeneration": OWN + "text_model",
    "Kosmos2_5ForConditionalGeneration": POSITIONS,
    "Lfm3VlForConditionalGeneration": ("layers of type conv", "5.24"),
    "Llama4ForConditionalGeneration": "chunked_attention",
    "MistralLarge4ForConditionalGeneration": ("indexed_attention", "5.24"),
    "NemotronH_Omni_Reasoning_V3": ("linear_attention, mlp, moe", "5.24"),
    "PaliGemmaForConditionalGeneration": "0 causal attention modules for 2 decoder layers",
    "Pix2StructForConditionalGeneration": CODER,
    "Qwen2_5OmniForConditionalGeneration": OWN + "thinker",
    "T5Gemma2ForConditionalGeneration": CODER,
    "UdopForConditionalGeneration": CODER,
    "UnlimitedOcrForConditionalGeneration": ("reference_sliding_attention", "5.24"),
}


def shrink(config):
    """Leave two layers of each part, or one of each kind."""
    for name in ("num_hidden_layers", "depth", "num_layers", "encoder_layers"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 2)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if kinds:
        config.num_hidden_layers = max(2, len(kinds))
        config.layer_types = (kinds * 2)[: config.num_hidden_layers]
    if getattr(config, "mlp_layer_types", None):
        config.mlp_layer_types = config.mlp_layer_types[: config.num_hidden_layers]
    for part in vars(config).values():
        if isinstance(part, transformers.PreTrainedConfig):
            shrink(part)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    words, since = REFUSED[name] if isinstance(REFUSED[name], tuple) else (REFUSED[name], "5.17")
    if Version(transformers.__version__) < Version(since):
        pytest.skip(f"transformers has it since {since}")
    kind = getattr(transformers, name)
    config = kind.config_class()
    shrink(config)
    with torch.device("meta"):
        model = kind(config).eval()
    with pytest.raises(NotImplementedError, match="supported are") as raised:
        std_decode.patch(model)
    assert f"patch: {name} " in str(raised.value) and words in str(raised.value)
    assert not std_decode.is_patched(model)


def gemma4():
    config = transformers.Gemma4Config(
        text_config=dict(
            **TEXT,
            head_dim=16,  # of the windows
            global_head_dim=520,  # more than its checkpoints have
            sliding_window=24,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            hidden_size_per_layer_input=0,
        ),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            head_dim=16,
        ),
        audio_config=None,
    )
    return transformers.Gemma4ForConditionalGeneration(config)


def kimi():
    config = transformers.Kimi_K25Config(
        text_config=dict(
            TEXT,
            model_type="deepseek_v3",
            num_key_value_heads=4,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=8,
        ),
        vision_config=dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        ),
        projection_hidden_size=32,
    )
    return transformers.Kimi_K25ForConditionalGeneration(config)


def minimax_m3():
    config = transformers.MiniMaxM3VLConfig(
        text_config=dict(
            TEXT,
            head_dim=16,
            rotary_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        ),
        vision_config=dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        ),
        projector_hidden_size=64,
    )
    return transformers.MiniMaxM3SparseForConditionalGeneration(config)


TRIED = {
    gemma4: "expected a head dim",
    kimi: "caches keys of shape",
    minimax_m3: "layers of type minimax_m3_sparse",
}


@pytest.mark.parametrize("make", TRIED, ids=lambda make: make.__name__)
def test_refused_after_a_trial(make):
    model = make().eval()
    with pytest.raises(NotImplementedError, match="supported are") as raised:
        std_decode.patch(model)
    assert type(model).__name__ in str(raised.value) and re.search(TRIED[make], str(raised.value))
    assert not std_decode.is_patched(model)

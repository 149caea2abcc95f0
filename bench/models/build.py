"""Models of real dimensions with random weights, and what they need to decode a long prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from bench.models.dimensions import SHAPES, Shape
from std_decode import last_stats
from std_decode.costs.memory import free_memory
from std_decode.weights.draft_weights import weights_of_step
from std_decode.weights.twins import TwinnedLinear

_CLASSES = {
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "qwen3_vl_moe": "Qwen3VLMoe",
    "qwen3_5": "Qwen3_5",
    "qwen3_5_moe": "Qwen3_5Moe",
    "internvl": "InternVL",
    "llava_onevision": "LlavaOnevision",
    "llava_next_video": "LlavaNextVideo",
}


def shape_of(name: str) -> Shape:
    """Of `SHAPES`, or that of the demo model's checkpoint."""
    if name != "demo":
        return SHAPES[name]
    from std_decode.demo.model import FOLDER

    text = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))["text_config"]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "intermediate_size", "vocab_size")  # fmt: skip
    return Shape("qwen2_vl", *(text[name] for name in names))


def model_class_and_config(shape: Shape) -> tuple[Any, Any]:
    """The class in transformers, and a config of these dimensions; the vision tower is a stub."""
    import transformers

    text: dict[str, Any] = dict(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=131072,
        initializer_range=shape.initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,  # every run is as long as asked for
    )
    if shape.experts:
        text |= dict(
            num_experts=shape.experts,
            num_experts_per_tok=shape.experts_per_token,
            moe_intermediate_size=shape.intermediate,
        )
    if shape.recurrent is not None:
        text |= dict(
            linear_num_key_heads=shape.recurrent.key_heads,
            linear_num_value_heads=shape.recurrent.value_heads,
        )
        if shape.experts:
            text |= dict(shared_expert_intermediate_size=shape.intermediate)
    if shape.family == "llama":
        return transformers.LlamaForCausalLM, transformers.LlamaConfig(**text)
    image, video, start, end = range(shape.vocabulary - 4, shape.vocabulary)
    tokens: dict[str, Any] = dict(image_token_id=image, video_token_id=video)
    vision: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    if shape.family.startswith("qwen"):
        half = shape.head_dim // 2
        text["rope_parameters"]["mrope_section"] = [half // 4, half * 3 // 8, half * 3 // 8]
        tokens |= dict(vision_start_token_id=start, vision_end_token_id=end)
        vision = dict(depth=1, num_heads=2, patch_size=4)
        if shape.family == "qwen2_vl":
            vision |= dict(embed_dim=32, mlp_ratio=2, hidden_size=shape.hidden)
        else:
            vision |= dict(hidden_size=32, intermediate_size=64, out_hidden_size=shape.hidden)
        if shape.family.startswith("qwen3"):
            vision |= dict(deepstack_visual_indexes=[], num_position_embeddings=16)
    elif shape.family == "internvl":
        vision |= dict(image_size=[32, 32], patch_size=[4, 4])
    else:
        tower = "siglip" if shape.family == "llava_onevision" else "clip"
        vision |= dict(model_type=f"{tower}_vision_model", image_size=32, patch_size=4)
        vision |= dict(vision_use_head=False) if tower == "siglip" else {}
        tokens = dict(image_token_index=image, video_token_index=video)
        tokens |= dict(image_grid_pinpoints=[[32, 32]])
    if not shape.family.startswith("qwen"):
        text["model_type"] = shape.text_family
    name = _CLASSES[shape.family]
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens
    )
    return getattr(transformers, f"{name}ForConditionalGeneration"), config


def demo_model(dtype: torch.dtype, device: torch.device) -> Any:
    """The demo model with its trained weights; its texts go on after they have ended."""
    from transformers.utils.logging import disable_progress_bar

    from std_decode.demo.model import load_model

    disable_progress_bar()  # of loading weights: a flash of one line for a model this small
    model = load_model().to(device=device, dtype=dtype)
    model.generation_config.eos_token_id = None  # every run is as long as asked for
    return model


def random_model(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """The model with random weights; the device itself makes them, which takes a second."""
    cls, config = model_class_and_config(shape)
    torch.manual_seed(seed)
    with torch.device(device):
        model = cls._from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


@dataclass(frozen=True)
class Needs:
    """Bytes, for one batch and context."""

    weights: int
    kv: int
    activations: int  # of reading the prompt, one row
    free: int
    twins: int = 0  # 4-bit copies of the weights
    rows: int = 1

    @property
    def total(self) -> int:
        # The row that was read is kept for the next run while a run works on a cache of its own.
        # The tenth on top is for growth, for one layer that is there twice, and for the libraries.
        row = self.kv // self.rows
        decoding = self.kv + row
        reading = 2 * row + self.activations
        return int(1.1 * (self.weights + self.twins + max(decoding, reading))) + (1 << 26)

    def __str__(self) -> str:
        numbers = [self.total, self.weights, self.kv, self.free]
        total, weights, kv, free = (f"{x / 1e9:.2f} GB" for x in numbers)
        copies = f", {self.twins / 1e9:.2f} GB of 4-bit copies" if self.twins else ""
        parts = f"{weights} of weights{copies}, {kv} of KV cache and a row of it"
        return f"about {total} ({parts}), {free} are free"


def needs(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    tokens: int,
    twins: bool = False,
) -> Needs:
    """What decoding up to `tokens` tokens a row will take, and what there is."""
    kv = batch * tokens * kv_bytes(shape, dtype)
    activations = 4 * tokens * shape.intermediate * dtype.itemsize
    copies = round(shape.stored_bytes(True) - shape.stored_bytes(False)) if twins else 0
    free = free_memory(device)
    return Needs(parameter_bytes(shape, dtype), kv, activations, free, copies, batch)


@lru_cache
def parameter_bytes(shape: Shape, dtype: torch.dtype) -> int:
    cls, config = model_class_and_config(shape)
    with torch.device("meta"):
        model = cls._from_config(config, dtype=dtype)
    return sum(parameter.nbytes for parameter in model.parameters())


def kv_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Of one token, keys and values, all layers."""
    return shape.kv_values * dtype.itemsize


def kv_bytes_of(cache: Any) -> int:
    """Of one token of one row of a cache, all layers."""
    return sum(x[0, :, 0].nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def weight_bytes(model: Any) -> int:
    """What a decoding step reads."""
    return sum(weight.nbytes for weight in weights_of_step(model))


def draft_weight_bytes(model: Any) -> int:
    """What a draft of a patched model reads: twins where there are some, else `weight_bytes`."""
    layers = [module for module in model.modules() if isinstance(module, TwinnedLinear)]
    stats = last_stats(model)
    twins = stats.draft_weight_bytes if stats is not None else 0
    return weight_bytes(model) - sum(layer.weight.nbytes for layer in layers) + twins

"""Models of real dimensions with random weights, and what they need to decode a long prompt."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """The text decoder of a model that people run; the vision tower is a stub, it never runs."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    rope_theta: float = 1e6
    initializer_range: float = 0.02


SHAPES = {
    "qwen2-vl-7b": Shape("qwen2_vl", 3584, 28, 28, 4, 18944, 152064),
    "llava-onevision-7b": Shape("llava_onevision", 3584, 28, 28, 4, 18944, 152128),
    "llama-3-8b": Shape("llama", 4096, 32, 32, 8, 14336, 128256, 5e5),
    # Wide weights: attention is far from uniform, and the two best tokens are rarely close.
    "tiny": Shape("qwen2_vl", 64, 2, 4, 2, 96, 128, 1e4, 0.2),
}
SPECIAL = 8  # last ids of the vocabulary, which prompts leave to the visual placeholders


def model_class_and_config(shape: Shape) -> tuple[Any, Any]:
    import transformers

    half = shape.hidden // shape.heads // 2
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rope_theta}
    text: dict[str, Any] = dict(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=131072,
        initializer_range=shape.initializer_range,
        rope_parameters=rope,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,  # every run is as long as asked for
    )
    image, video, start, end = range(shape.vocabulary - 4, shape.vocabulary)
    if shape.family == "llama":
        return transformers.LlamaForCausalLM, transformers.LlamaConfig(**text)
    if shape.family == "qwen2_vl":
        rope["mrope_section"] = [half // 4, half * 3 // 8, half * 3 // 8]
        vision: dict[str, Any] = dict(depth=1, embed_dim=32, num_heads=2, mlp_ratio=2)
        config = transformers.Qwen2VLConfig(
            text_config=text,
            vision_config={**vision, "hidden_size": shape.hidden, "patch_size": 4},
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
            tie_word_embeddings=False,
        )
        return transformers.Qwen2VLForConditionalGeneration, config
    vision = dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=64)
    vision |= dict(num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=4)
    config = transformers.LlavaOnevisionConfig(
        text_config={**text, "model_type": "qwen2"},
        vision_config={**vision, "vision_use_head": False},
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=[[32, 32]],
        tie_word_embeddings=False,
    )
    return transformers.LlavaOnevisionForConditionalGeneration, config


def build(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
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

    @property
    def total(self) -> int:
        # The prompt's cache is kept for the next run while a run works on its own. The tenth on
        # top is for growth, for one layer that is there twice, and for the libraries.
        return int(1.1 * (self.weights + 2 * self.kv + self.activations)) + (1 << 26)

    def __str__(self) -> str:
        numbers = [self.total, self.weights, self.kv, self.free]
        total, weights, kv, free = (f"{x / 1e9:.2f} GB" for x in numbers)
        return f"about {total} ({weights} of weights, twice {kv} of KV cache), {free} are free"


def needs(
    shape: Shape, dtype: torch.dtype, device: torch.device, batch: int, tokens: int
) -> Needs:
    """What decoding up to `tokens` tokens a row will take, and what there is."""
    kv = batch * tokens * kv_bytes(shape, dtype)
    activations = 4 * tokens * shape.intermediate * dtype.itemsize
    return Needs(parameter_bytes(shape, dtype), kv, activations, free_memory(device))


@lru_cache
def parameter_bytes(shape: Shape, dtype: torch.dtype) -> int:
    cls, config = model_class_and_config(shape)
    with torch.device("meta"):
        model = cls._from_config(config, dtype=dtype)
    return sum(parameter.nbytes for parameter in model.parameters())


def kv_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Of one token, keys and values, all layers."""
    head_dim = shape.hidden // shape.heads
    return 2 * shape.layers * shape.kv_heads * head_dim * dtype.itemsize


def kv_bytes_of(cache: Any) -> int:
    """Of one token of one row of a cache, all layers."""
    return sum(x[0, :, 0].nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def weight_bytes(model: Any) -> int:
    """What a decoding step reads: every weight but the embedding, of which it reads some rows."""
    embedding = model.get_input_embeddings().weight
    decoder = {id(p): p.nbytes for p in model.get_decoder().parameters() if p is not embedding}
    head = model.get_output_embeddings().weight
    return sum({**decoder, id(head): head.nbytes}.values())


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):  # macOS, Windows: what is there stands in for what is free
        pages = getattr(os, "sysconf", lambda name: 1 << 20)
        return pages("SC_PHYS_PAGES") * pages("SC_PAGE_SIZE")


class Prompt:
    """A prompt that was read once. Each run goes on from its cache and reads one token more.

    One row of random tokens is read and repeated over the batch, as memory of its own: rows differ
    in the newest token only, and decoding costs the same whatever the tokens are.

    Attributes:
        ids: the tokens with the newest one, ``[B, context + 1]``.
        nbytes: of the cache that is kept; transformers' own user would not keep it.
    """

    def __init__(self, model: Any, context: int, seed: int):
        self.model, self.context = model, context
        self.vocabulary = model.get_decoder().config.vocab_size
        self.generator = torch.Generator().manual_seed(seed)
        self.row = self._words(1, context)
        options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
        ones = torch.ones_like(self.row)
        self.read = model.generate(self.row, attention_mask=ones, **options).past_key_values
        self.repeat(1)

    def _words(self, rows: int, count: int) -> Tensor:
        most = self.vocabulary - SPECIAL
        words = torch.randint(2, most, (rows, count), generator=self.generator)
        return words.to(self.model.device)

    def repeat(self, batch: int) -> None:
        """Give the prompt `batch` rows."""
        self.ids = torch.cat([self.row.expand(batch, -1), self._words(batch, 1)], dim=1)
        self.ones = torch.ones_like(self.ids)
        self.cache = self.read
        if batch > 1:
            self.cache = self.dynamic()
            for layer in self.cache.layers:
                layer.keys = layer.keys.repeat(batch, 1, 1, 1)
                layer.values = layer.values.repeat(batch, 1, 1, 1)
        caches = {id(self.read): self.read, id(self.cache): self.cache}.values()
        self.nbytes = sum(x.keys.nbytes + x.values.nbytes for c in caches for x in c.layers)

    def dynamic(self) -> Any:
        """A DynamicCache of the prompt. It shares the tensors, which no run writes into."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return cache

    def static(self, new_tokens: int) -> Any:
        """A StaticCache of the prompt with room for one token and `new_tokens` more."""
        from transformers import StaticCache

        config = self.model.config.get_text_config(decoder=True)
        cache = StaticCache(config=config, max_cache_len=self.context + 1 + new_tokens)
        for index, layer in enumerate(self.cache.layers):
            cache.update(layer.keys, layer.values, index)
        return cache

    def rewind(self, cache: Any) -> Any:
        """Take back what a run has put into a StaticCache. It stays where it is in memory."""
        for layer in cache.layers:
            layer.keys[:, :, self.context :] = 0
            layer.values[:, :, self.context :] = 0
            layer.cumulative_length.fill_(self.context)
        return cache

    def generate(self, new_tokens: int, cache: Any = None, **options: Any) -> Any:
        """What ``model.generate`` returns for the prompt, greedy."""
        return self.model.generate(
            self.ids,
            attention_mask=self.ones,
            past_key_values=self.dynamic() if cache is None else cache,
            max_new_tokens=new_tokens,
            do_sample=False,
            **options,
        )

    def tokens(self, new_tokens: int, cache: Any = None) -> Tensor:
        """The generated tokens, ``[B, new_tokens]``."""
        return self.generate(new_tokens, cache)[:, self.ids.shape[1] :]

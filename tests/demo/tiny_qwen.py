"""A Qwen2-VL checkpoint of random weights, as a folder on disk, with the real processor.

The processor needs torchvision, so tests of it are marked torchvision.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def run(code: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python `code` in a process of its own; in tests marked torchvision."""
    return subprocess.run(
        [sys.executable, "-c", f"from tests.demo import tiny_qwen\n{code}", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
    )


def tokenizer(special=_SPECIAL):
    """Of single letters; the first special token pads, the third ends an answer."""
    letters = [chr(code) for code in range(32, 127)] + ["\n"]
    words = {word: i for i, word in enumerate([*special, *letters])}
    return tokenizer_of(words, special[0], list(special[1:]), dict(eos_token=special[2]))


def tokenizer_of(words: dict[str, int], pad: str, special: list[str], named: dict[str, str]):
    """Of these ids; all that is no special token is a letter. `named` become its attributes."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel(words, unk_token=pad))
    made.decoder = Fuse()
    made.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=pad,
        additional_special_tokens=special,
        **named,
    )


def save(folder: Path) -> None:
    """Write model and processor, inside `run`."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    words = tokenizer()
    pixels = dict(min_pixels=56 * 56, max_pixels=56 * 56)
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(
            size=dict(shortest_edge=56 * 56, longest_edge=16 * 56 * 56)
        ),
        chat_template=_TEMPLATE,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]),
            initializer_range=0.2,
            eos_token_id=None,
            bos_token_id=0,
        ),
        vision_config=dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2),
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)

"""Files to run commands on: a clip, and checkpoints of random weights."""

from pathlib import Path

import numpy as np
import torch

from std_decode.demo import camera, video
from tests.decode.families.frames import SIGLIP
from tests.demo import tiny_qwen

# Six, so that the vocabulary is even: transformers 5.17 shares no other one between two processes.
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>", "<spare>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}"
    "{% else %}<{{ c.type }}>\n{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def film(path: Path) -> Path:
    """Render a clip of 20 s with 4 events."""
    rng = np.random.default_rng(1)
    video.render(camera.random_clip(20, 4, rng), path, rng)
    return path


def _text(words):
    return dict(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=None,
    )


def save_llama(folder: Path, template: str | None = TEMPLATE):
    """Write a Llama and its tokenizer; needs no torchvision."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tiny_qwen.tokenizer(SPECIAL)
    words.chat_template = template
    words.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**_text(words))).save_pretrained(folder)
    return folder


def save_llava(folder: Path) -> None:
    """Write a LLaVA-OneVision and its processor, inside `tiny_qwen.run`."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    words = tiny_qwen.tokenizer(SPECIAL)
    side = dict(height=32, width=32)
    LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=[[32, 32]]),
        tokenizer=words,
        video_processor=LlavaOnevisionVideoProcessor(size=side),
        num_image_tokens=64,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        vision_config=dict(SIGLIP),
        text_config={**_text(words), "model_type": "qwen2"},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[32, 32]],
    )
    LlavaOnevisionForConditionalGeneration(config).save_pretrained(folder)

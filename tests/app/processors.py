"""Processors as hub models have them, at the size of the tiny models of tests/decode/families.

They need torchvision. A tokenizer of single letters has its special tokens where those have them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from tests.decode.families.base import IMAGE, PAD, VIDEO, VISION_END, VISION_START, VOCABULARY
from tests.demo import tiny_qwen

SIDE = dict(height=32, width=32)
NAMED = {"image": IMAGE, "video": VIDEO, "start": VISION_START, "end": VISION_END}
QWEN = dict(image="<|image_pad|>", video="<|video_pad|>", start="<|vision_start|>",
            end="<|vision_end|>")  # fmt: skip
PLAIN = dict(image="<image>", video="<video>", start="<img>", end="</img>")


def tokenizer(named: dict[str, str], **attributes: str) -> Any:
    """One letter a token; `named` has the four of NAMED, `attributes` what a processor reads."""
    words = {chr(code): code - 31 for code in range(32, 127)} | {"\n": 96, "<pad>": PAD}
    words |= {named[kind]: token for kind, token in NAMED.items()}
    rest = (f"<{i}>" for i in range(VOCABULARY))
    taken = set(words.values())
    words |= {next(rest): i for i in range(VOCABULARY) if i not in taken}
    return tiny_qwen.tokenizer_of(words, "<pad>", list(named.values()), attributes)


def template(video: str, image: str) -> str:
    """Of a chat whose messages are lists."""
    return (
        "{% for m in messages %}{{ m.role }}\n{% for c in m.content %}"
        f"{{% if c.type == 'video' %}}{video}{{% elif c.type == 'image' %}}{image}"
        "{% else %}{{ c.text }}{% endif %}{% endfor %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )


def _qwen(kind: str, images: str, videos: str, marked: bool = True) -> Any:
    patches = dict(patch_size=4, merge_size=2)
    size = dict(shortest_edge=16 * 16, longest_edge=32 * 32)
    shown = "<|vision_start|>{}<|vision_end|>" if marked else "{}"
    return getattr(transformers, f"{kind}Processor")(
        image_processor=getattr(transformers, f"{images}ImageProcessor")(**patches, size=size),
        tokenizer=tokenizer(QWEN),
        video_processor=getattr(transformers, f"{videos}VideoProcessor")(
            **patches, size=dict(shortest_edge=16 * 16, longest_edge=8 * 32 * 32)
        ),
        chat_template=template(shown.format("<|video_pad|>"), shown.format("<|image_pad|>")),
    )


def llava_onevision() -> Any:
    return transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(
            size=SIDE, image_grid_pinpoints=[[32, 32]]
        ),
        tokenizer=tokenizer(PLAIN),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=SIDE),
        num_image_tokens=64,
        vision_feature_select_strategy="full",
        chat_template=template("<video>\n", "<image>\n"),
    )


def internvl() -> Any:
    named = {**PLAIN, "image": "<IMG_CONTEXT>"}
    words = tokenizer(
        named,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=SIDE, max_patches=2),
        tokenizer=words,
        video_processor=transformers.InternVLVideoProcessor(size=SIDE),
        image_seq_length=16,
        chat_template=template("<video>\n", "<IMG_CONTEXT>\n"),
    )


def smolvlm() -> Any:
    edge = dict(longest_edge=32)
    return transformers.SmolVLMProcessor(
        image_processor=transformers.SmolVLMImageProcessor(size=edge, max_image_size=edge),
        tokenizer=tokenizer(
            {**PLAIN, "start": "<fake_token_around_image>", "end": "<global-img>"},
            image_token="<image>",
            fake_image_token="<fake_token_around_image>",
            global_image_token="<global-img>",
        ),
        video_processor=transformers.SmolVLMVideoProcessor(size=edge, max_image_size=edge),
        image_seq_len=16,
        chat_template=template("<video>", "<image>"),
    )


# By the names in tests/decode/families, whose models they are for.
PROCESSORS: dict[str, Callable[[], Any]] = {
    "qwen2_vl": lambda: _qwen("Qwen2VL", "Qwen2VL", "Qwen2VL"),
    "qwen2_5_vl": lambda: _qwen("Qwen2_5_VL", "Qwen2VL", "Qwen2VL"),
    "qwen3_vl": lambda: _qwen("Qwen3VL", "Qwen2VL", "Qwen3VL"),
    "video_llama_3": lambda: _qwen("VideoLlama3", "VideoLlama3", "VideoLlama3", marked=False),
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "smolvlm": smolvlm,
}

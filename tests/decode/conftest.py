"""Tiny random models with real inputs, and the one question asked of all of them: same tokens?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import std_decode
from tests.decode.margin import behind_best, near_ties

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


def _words(count: int) -> list[int]:
    return torch.randint(7, 99, (count,)).tolist()


def _padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    length = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def _qwen2_vl(rows: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
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
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    model = Qwen2VLForConditionalGeneration(config)
    grids = [(max(1, 4 - row), 8, 8) for row in range(rows)]
    prompts = []
    for row, (t, h, w) in enumerate(grids):
        video = [VISION_START] + [VIDEO] * (t * h * w // 4) + [VISION_END]
        prompts.append(_words(4 + row) + video + _words(8 - row))
    inputs = _padded(prompts)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == VIDEO).int() * 2
    inputs["video_grid_thw"] = torch.tensor(grids)
    inputs["pixel_values_videos"] = torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * 16)
    return model, inputs


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
        **TEXT, head_dim=16, sliding_window=24, layer_types=kinds, query_pre_attn_scalar=16
    )
    return Gemma3ForCausalLM(config), _padded([_words(90 - 7 * row) for row in range(rows)])


FAMILIES = {
    "qwen2_vl": _qwen2_vl,
    "llava_onevision": _llava_onevision,
    "llama": _llama,
    "gemma3": _gemma3,
}


@dataclass
class Case:
    """An unpatched model, its inputs, and what it generates from them."""

    model: Any
    inputs: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def generate(self, **options: Any) -> Any:
        torch.manual_seed(self.seed)
        return self.model.generate(**self.inputs, **{**self.options, **options})

    def behind(self, **options: Any) -> Callable[[int], Tensor]:
        """`behind_best` by step, of the unpatched model that the case must be by now."""
        assert not std_decode.is_patched(self.model), "a patched model cannot be its own judge"
        full = self.generate(**options, return_dict_in_generate=True, output_scores=True)
        noise = None
        if {**self.options, **options}.get("do_sample"):
            torch.manual_seed(self.seed)
            noise = [torch.empty_like(scores).exponential_(1) for scores in full.scores]
        return lambda step: behind_best(full.scores[step], noise and noise[step])

    def assert_same_tokens(
        self, expected: Tensor, got: Tensor, **options: Any
    ) -> set[tuple[int, int]]:
        """Fail on any difference but one that rounding may have decided, see `near_ties`.

        `options` are those of the generate calls that gave the tokens.
        """
        if torch.equal(expected, got):
            return set()
        chosen = {**self.options, **options}
        ends = chosen.get("eos_token_id") or []
        return near_ties(
            expected,
            got,
            self.inputs["input_ids"].shape[1],
            self.behind(**options),
            ends=ends if isinstance(ends, list) else [ends],
            pad=chosen.get("pad_token_id"),
        )


@pytest.fixture
def make_case():
    """``make_case(family, seed, rows)``; with `eos`, rows end at different steps."""

    def make(family: str, seed: int = 0, rows: int = 1, eos: bool = False, **options: Any) -> Case:
        torch.manual_seed(seed)
        model, inputs = FAMILIES[family](rows)
        case = Case(model.float().eval(), inputs, {"max_new_tokens": 16, **options}, seed)
        if eos:  # end row r at the token that it would emit at step 3 + 5 r
            told = case.generate()[:, inputs["input_ids"].shape[1] :]
            ends = [int(told[row, 3 + 5 * row]) for row in range(rows)]
            case.options["eos_token_id"] = ends
            case.options["pad_token_id"] = PAD
        return case

    make.text = TEXT
    return make


@pytest.fixture(scope="session")
def letters():
    """A tokenizer with one letter a token, so that stop strings can be made of any tokens."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    words = {chr(97 + token): token for token in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer, tokenizer.decoder = Split(Regex("."), "isolated"), Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="a")


@pytest.fixture
def state_of():
    """Of a model: all that patch could leave behind on it."""

    def state(model: Any) -> tuple:
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        return (
            type(model),
            {key: value for key, value in vars(model).items() if not key.startswith("_modules")},
            decoder.config._attn_implementation,
            model.config.to_dict(),
        )

    return state

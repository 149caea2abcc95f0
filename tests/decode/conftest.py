"""The one question asked of all models of families/: same tokens?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import std_decode
from std_decode.passes import engine, graphs, pool
from tests.decode.families import FAMILIES, PAD, TEXT, VOCABULARY
from tests.decode.margin import behind_best, near_ties
from tests.decode.recorder import Recording


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
        model, inputs = FAMILIES[family].build(rows)
        case = Case(model.float().eval(), inputs, {"max_new_tokens": 16, **options}, seed)
        if eos:  # end row r at the token that it would emit at step 3 + 5 r
            told = case.generate()[:, inputs["input_ids"].shape[1] :]
            ends = [int(told[row, 3 + 5 * row]) for row in range(rows)]
            case.options["eos_token_id"] = ends
            case.options["pad_token_id"] = PAD
        return case

    make.text = TEXT
    return make


@pytest.fixture
def recording(monkeypatch):
    """Captures passes on the CPU, by a stand-in for CUDA graphs."""

    def refuse(forward):
        raise AssertionError("Dynamo compiles nothing within the stand-in; use `uncaptured`")

    fake = Recording()
    monkeypatch.setattr(graphs, "unavailable", lambda devices: None)
    monkeypatch.setattr(graphs, "capture", fake)
    monkeypatch.setattr(engine, "compile_pass", refuse)
    return fake


@pytest.fixture
def uncaptured(monkeypatch):
    """Passes that count as captured, and run as they are, compiled or not."""
    monkeypatch.setattr(graphs, "unavailable", lambda devices: None)
    monkeypatch.setattr(graphs, "capture", lambda step, pool: step)
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def captured(request, monkeypatch):
    """With ``--captured`` every test has its passes captured, but those marked `eager`."""
    chosen = {"recording", "uncaptured"}.intersection(request.fixturenames)
    if not request.config.getoption("--captured") or chosen:
        return
    if request.node.get_closest_marker("eager") is not None:
        pytest.skip("is about passes that are not captured")
    request.getfixturevalue("recording")
    # Whole buckets of selected keys would be all that these short prompts have.
    monkeypatch.setattr(pool, "bucket", lambda tokens: tokens)


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

"""Prompts that are read once, from whose cache every way to decode goes on."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench.probes import seconds
from std_decode.model.cache import CACHE

SPECIAL = 8  # last ids of the vocabulary, which prompts leave to the visual placeholders
QUICK = 1.0  # seconds: what takes less to read is read three times


class Prompt:
    """Random tokens, read once. Each run goes on from their cache and reads one token more.

    One row is read and repeated over the batch: rows differ in the newest token only, and decoding
    costs the same whatever the tokens are. The rows share the memory of the one; each run makes
    memory of its own for them as it begins.

    Args:
        context: tokens of a row in the cache.

    Attributes:
        ids: the tokens with the new ones, ``[B, S]``.
        cached: how many tokens of a row the cache holds.
        whole: what `generate` takes to read one row from nothing.
        trained: whether the model is; else nothing can be said about how many drafts it accepts.
        nbytes: of the caches that are kept; transformers' own user would not keep them.
    """

    trained = False
    ids: Tensor
    cache: Any

    def __init__(self, model: Any, context: int, seed: int):
        self.model, self.context, self.cached = model, context, context
        self.seed = seed
        self.row = self._words(1, context)
        ones = torch.ones_like(self.row)
        self.read = read(model, {"input_ids": self.row, "attention_mask": ones})
        self.repeat(1)
        self.whole = {"input_ids": self.ids, "attention_mask": self.ones}

    @property
    def vocabulary(self) -> int:
        return self.model.get_decoder().config.vocab_size

    def _words(self, rows: int, count: int) -> Tensor:
        most = self.vocabulary - SPECIAL
        # The same for a batch size whatever was asked for before.
        generator = torch.Generator().manual_seed(self.seed + (rows if count == 1 else 0))
        words = torch.randint(2, most, (rows, count), generator=generator)
        return words.to(self.model.device)

    def repeat(self, batch: int) -> None:
        """Give the prompt `batch` rows."""
        ids = torch.cat([self.row.expand(batch, -1), self._words(batch, 1)], dim=1)
        self._hold(ids, [self.read])

    def _hold(self, ids: Tensor, reads: list[Any]) -> None:
        self.ids, self.ones = ids, torch.ones_like(ids)
        """Hold one cache for all rows, or one for each."""
        self.cache = reads[0]
        if len(ids) > 1:
            self.cache = self.dynamic()
            for index, layer in enumerate(self.cache.layers):
                for name in ("keys", "values"):
                    rows = [getattr(one.layers[index], name) for one in reads]
                    alike = rows[0].expand(len(ids), -1, -1, -1)
                    setattr(layer, name, alike if len(rows) == 1 else torch.cat(rows))
        tensors = [x for c in (*reads, self.cache) for y in c.layers for x in (y.keys, y.values)]
        memory = [x.untyped_storage() for x in tensors]
        self.nbytes = sum({one.data_ptr(): one.nbytes() for one in memory}.values())

    def dynamic(self) -> Any:
        """A DynamicCache of the prompt. It shares the tensors, which no run writes into."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return cache

    def empty_static(self, new_tokens: int) -> Any:
        """A StaticCache with room for the prompt and `new_tokens` more."""
        from transformers import StaticCache

        config = self.model.config.get_text_config(decoder=True)
        return StaticCache(config=config, max_cache_len=self.ids.shape[1] + new_tokens)

    def static(self, new_tokens: int) -> Any:
        """The same, holding what was read."""
        cache = self.empty_static(new_tokens)
        for index, layer in enumerate(self.cache.layers):
            cache.update(layer.keys, layer.values, index)
        return cache

    def rewind(self, cache: Any) -> Any:
        """Take back what a run has put into a StaticCache. It stays where it is in memory."""
        for layer in cache.layers:
            layer.keys[:, :, self.cached :] = 0
            layer.values[:, :, self.cached :] = 0
            layer.cumulative_length.fill_(self.cached)
        return cache

    def generate(self, new_tokens: int, cache: Any = None, **options: Any) -> Any:
        """What ``model.generate`` returns for the prompt, greedy."""
        return self.model.generate(
            self.ids,
            attention_mask=self.ones,
            max_new_tokens=new_tokens,
            do_sample=False,
            **{CACHE: self.dynamic() if cache is None else cache},
            **options,
        )

    def tokens(self, new_tokens: int, cache: Any = None) -> Tensor:
        """The generated tokens, ``[B, new_tokens]``."""
        return self.generate(new_tokens, cache)[:, self.ids.shape[1] :]

    def from_nothing(self, new_tokens: int, **options: Any) -> Tensor:
        """The tokens after one row's prompt, which is read anew, ``[1, new_tokens]``."""
        told = self.model.generate(
            **self.whole, max_new_tokens=new_tokens, do_sample=False, **options
        )
        return told[:, self.whole["input_ids"].shape[1] :]

    def right(self, tokens: Tensor) -> float | None:
        """Share of what is asked that the answers ``[B, T]`` tell right, where that is known."""
        return None

    def first_token_seconds(self, static: bool = False) -> list[float]:
        """Times of reading one row's prompt and choosing a token, of the model as it is now."""

        def call() -> None:
            self.from_nothing(1, **({CACHE: self.empty_static(1)} if static else {}))

        seconds(call, self.model.device)  # compiles kernels
        spans = [seconds(call, self.model.device)]
        while len(spans) < 3 and spans[0] < QUICK:
            spans.append(seconds(call, self.model.device))
        return spans


class DemoPrompt(Prompt):
    """Clips of the demo model's camera, read once. Each run goes on with the question.

    Row r is a clip of its own, with seed + r; all have as many events, so that their narrations
    are as long.

    Args:
        context: video tokens of a row, 4 a second.
        events: that each clip has, 5 tokens of the narration each.
    """

    trained = True

    def __init__(self, model: Any, context: int, seed: int, events: int):
        self.model, self.context = model, context
        self.seed, self.events = seed, events
        self.rows: list[tuple[Any, Tensor, Any]] = []  # clip, tokens, cache
        self.repeat(1)

    @cached_property
    def tokenizer(self) -> Any:
        from std_decode.demo.model import load_tokenizer

        return load_tokenizer()

    def repeat(self, batch: int) -> None:
        """Read clips until there are `batch`."""
        while len(self.rows) < batch:
            self._film(self.seed + len(self.rows))
        _, ids, caches = zip(*self.rows[:batch])
        self._hold(torch.cat(ids), list(caches))

    def _film(self, seed: int) -> None:
        import numpy as np

        from std_decode.demo import camera
        from std_decode.demo.model import VIDEO_TOKEN, generate_inputs
        from std_decode.demo.train import camera_noise

        rng = np.random.default_rng(seed)
        second = camera.TOKENS_PER_SECOND
        clip = camera.random_clip(self.context // second, self.events, rng)
        pictures = camera_noise(camera.draw_seconds(clip), rng).repeat(2, axis=0)
        frames = (pictures.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
        inputs = generate_inputs(frames, clip.first_tag, self.tokenizer)
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        ids = inputs["input_ids"]
        # The video and the token that ends it; what follows is the question.
        self.cached = int((ids[0] == VIDEO_TOKEN).nonzero()[-1]) + 2
        if not self.rows:
            self.whole = inputs
        part = {k: v[:, : self.cached] if v.shape == ids.shape else v for k, v in inputs.items()}
        self.rows.append((clip, ids, read(self.model, part)))

    def right(self, tokens: Tensor) -> float:
        from std_decode.demo.camera import attributes_right

        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        shares = [attributes_right(text, row[0]) for text, row in zip(texts, self.rows)]
        return sum(shares) / len(shares)


def read(model: Any, inputs: dict[str, Tensor]) -> Any:
    """The cache of a prompt."""
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    return getattr(model.generate(**inputs, **options), CACHE)

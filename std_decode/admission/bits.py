"""Which promise the calls of a model can keep: a trial of its passes, bit for bit.

In float32 two ways to round a logit hardly ever choose different tokens; in half precision they
often do. So there the passes themselves are made alike, bit for bit, and the promise is tried on
the model and the device: tokens fed one by one against the same tokens fed together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from std_decode.admission.eligibility import undisturbed
from std_decode.admission.trial import input_device
from std_decode.model.cache import CACHE, SparseToDenseCache
from std_decode.model.running_pass import uncompiled
from std_decode.model.switch import attention_name
from std_decode.passes.engine import Engine
from std_decode.passes.promise import ROUNDED, Kind, Promise
from std_decode.stats import DecodeStats

Wanted = bool | int | Literal["auto", "unpatched"]
ROWS = 8  # tokens in each pass of a reproducible call, unless drafts are longer
_PROMPT, _TOKENS = 7, 9
_HALF = (torch.float16, torch.bfloat16)


@dataclass
class Promises:
    """What the calls of one patched model promise.

    Args:
        wanted: `patch`'s argument `reproducible`.
        most: the longest draft that its policy may come to; None: any, so it is cut to fit.
    """

    wanted: Wanted
    most: int | None
    found: dict[Any, tuple[Promise, str | None]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Tokens in each pass of a reproducible call."""
        if isinstance(self.wanted, int) and not isinstance(self.wanted, bool):
            return self.wanted
        return ROWS * -(-((self.most or 0) + 1) // ROWS)

    def of_call(
        self,
        model: PreTrainedModel,
        tried: Any,
        batch: int,
        holes: bool = False,
        fused: Any = None,
    ) -> tuple[Promise, str | None]:
        """The promise of a call of `model`, and why it is not the one that was asked for.

        Args:
            tried: `std_decode.admission.changes.Tried` of the model.
            holes: whether masked tokens are in the midst of the prompt.
            fused: `std_decode.admission.fusing.Fused` of the model, or None.
        """
        count = 0 if fused is None else fused.active
        key = tried.trials, batch, holes, model.dtype, torch.get_num_threads(), count
        if key not in self.found:
            self.found[key] = self._try(model, tried.layers, batch, holes, fused)
        return self.found[key]

    def _try(
        self,
        model: PreTrainedModel,
        layers: dict[int, nn.Module],
        batch: int,
        holes: bool,
        fused: Any,
    ) -> tuple[Promise, str | None]:
        device = input_device(model)
        auto_exact = model.dtype in _HALF and device.type == "cpu"
        if self.wanted is False or (self.wanted == "auto" and not auto_exact):
            return ROUNDED, None
        because = None
        if kind_of(self.wanted) == "unpatched":
            because = unlike_unpatched(model, layers, batch, holes)
            if because is None:
                return Promise("unpatched"), None
        promise = Promise("reproducible", self.rows)
        differing = unlike_itself(model, layers, batch, promise, fused)
        if differing is None:
            return promise, because
        return ROUNDED, differing if because is None else f"{because}; {differing}"


def kind_of(wanted: Wanted) -> Kind:
    """What that value of `patch`'s `reproducible` asks for, at best."""
    if wanted is False:
        return "rounded"
    return "unpatched" if isinstance(wanted, str) else "reproducible"


def unlike_unpatched(
    model: PreTrainedModel, layers: dict[int, nn.Module], batch: int, holes: bool = False
) -> str | None:
    """Why tokens fed together cannot have the bits of the unpatched model's, or None."""
    if input_device(model).type != "cpu":
        return "the unpatched model's bits are to be had on the CPU only"
    if attention_name(model.get_decoder().config) not in ("eager", "sdpa"):
        return "the unpatched model's bits are to be had with eager and SDPA attention only"
    if holes:
        return "the attention mask has holes, and keys are put in another order"
    trial = _Trial(model, layers, batch)
    return trial.difference(trial.one_by_one_unpatched, Promise("unpatched"))


def unlike_itself(
    model: PreTrainedModel,
    layers: dict[int, nn.Module],
    batch: int,
    promise: Promise,
    fused: object = None,
) -> str | None:
    """Why a token's bits depend on its place in passes of one shape, or None."""
    trial = _Trial(model, layers, batch, fused)
    return trial.difference(lambda: trial.one_by_one(promise), promise)


class _Trial:
    """A few tokens, fed one by one and together.

    Attributes:
        seen: of the pass under way: what each module made of which tokens ``[B, T, ...]``, in the
            order of their ends.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: dict[int, nn.Module],
        batch: int,
        fused: object = None,
    ):
        self.model, self.decoder, self.layers = model, model.get_decoder(), layers
        self.fused = fused
        self.head, device = model.get_output_embeddings(), input_device(model)
        vocabulary = self.decoder.config.get_text_config().vocab_size
        steps = torch.arange(_PROMPT + _TOKENS, device=device)
        rows = torch.arange(batch, device=device)[:, None]
        self.ids = (vocabulary // 3 + 7 * steps + 13 * rows) % vocabulary
        # In a batch, one row is padded.
        self.padded = (2 * (rows == 0)).int() if batch > 1 else torch.zeros_like(rows).int()
        self.mask = (steps >= self.padded).long()
        self.positions = (steps - self.padded).clamp(min=0)
        self.seen: list[tuple[str, Tensor | None, Tensor]] = []
        self.fed = 0  # tokens
        self.thread = threading.get_ident()

    @torch.no_grad()
    def difference(self, one_by_one: Callable[[], list], promise: Promise) -> str | None:
        try:
            with undisturbed(self.model), self._watching():
                expected, got = one_by_one(), self._together(promise)
        except Exception as error:
            return f"a trial of it failed ({type(error).__name__}: {error})"
        if isinstance(got, str):
            return got
        return _first_difference(expected, got)

    def one_by_one_unpatched(self) -> list:
        cache = DynamicCache(config=self.decoder.config)
        seen = []
        for start, end in ((0, _PROMPT), *((t, t + 1) for t in range(_PROMPT, len(self.ids[0])))):
            inputs = self._inputs(slice(start, end))
            inputs["attention_mask"] = self.mask[:, :end]
            with uncompiled():
                self._forward(**inputs, use_cache=True, **{CACHE: cache})
            seen.append(self.seen)
        return seen[1:]

    def one_by_one(self, promise: Promise) -> list:
        seen = []
        with self._engine(promise) as engine:
            for t in range(_TOKENS):
                engine.verify(*self._tokens(slice(_PROMPT + t, _PROMPT + t + 1)), {})
                engine.cache.advance(1, engine.cache.longest + 1)
                seen.append(self.seen)
        return seen

    def _together(self, promise: Promise) -> Any:
        """The same, as many at a time as a pass may have."""
        count = min(_TOKENS, promise.rows or _TOKENS)
        parts = []
        with self._engine(promise) as engine:
            for start in range(_PROMPT, _PROMPT + _TOKENS, count):
                here = slice(start, min(start + count, _PROMPT + _TOKENS))
                tokens, positions = self._tokens(here)
                engine.verify(tokens, positions, {})
                engine.cache.advance(tokens.shape[1], engine.cache.longest + tokens.shape[1])
                parts.append((tokens.shape[1], self.seen))
            if engine.uneven:
                return "its experts' results depend on the other rows of the batch"
        return parts

    def _tokens(self, here: slice) -> tuple[Tensor, Tensor]:
        return self.ids[:, here], self.positions[:, here]

    def _inputs(self, here: slice) -> dict[str, Any]:
        return {"input_ids": self.ids[:, here], "position_ids": self.positions[:, here]}

    @contextmanager
    def _engine(self, promise: Promise) -> Iterator[Engine]:
        config, batch = self.decoder.config, len(self.ids)
        room = _PROMPT + _TOKENS + promise.rows
        cache = SparseToDenseCache(config, room, batch, self.ids.device)
        engine = Engine(config, self.layers, cache, reselect=False)
        try:
            starts = self.padded[:, 0] if batch > 1 else None
            stats = DecodeStats()
            engine.start(
                self._forward,
                DynamicCache(),
                starts,
                None,
                stats,
                promise=promise,
                fused=self.fused,
            )
            inputs = self._inputs(slice(0, _PROMPT))
            engine.prefill(**inputs, attention_mask=self.mask[:, :_PROMPT])
            yield engine
        finally:
            cache.release()

    def _forward(self, **inputs: Any) -> Any:
        self.seen, self.fed = [], inputs["input_ids"].shape[1]
        states = self.decoder(**inputs).last_hidden_state
        logits = states if self.head is None else self.head(states)
        return SimpleNamespace(logits=logits)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        parts = [("", self.decoder), *([] if self.head is None else [("LM head", self.head)])]
        names = {m: f"{p}{n}" or p for p, part in parts for n, m in part.named_modules()}
        handles = [m.register_forward_hook(self._hook(name)) for m, name in names.items() if name]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable:
        def of_tokens(tensor: Any) -> bool:
            shape = getattr(tensor, "shape", ())
            return len(shape) == 3 and shape[:2] == (len(self.ids), self.fed)

        def note(module: nn.Module, args: tuple, output: Any) -> None:
            made = output[0] if isinstance(output, tuple) and output else output
            given = args[0] if args else None
            if of_tokens(made) and threading.get_ident() == self.thread:
                part = f"{name} ({type(module).__name__})"
                self.seen.append((part, given if of_tokens(given) else None, made))

        return note


def _first_difference(expected: list, got: list) -> str | None:
    """The first part that makes other bits of a token among others, or None."""
    at = 0
    for count, parts in got:
        for (name, given, made), *alone in zip(parts, *expected[at : at + count]):
            for token, (_, given_alone, made_alone) in enumerate(alone):
                if torch.equal(made[:, token], made_alone[:, 0]):
                    continue
                known = given is not None
                same = known and torch.equal(given[:, token], given_alone[:, 0])
                part = name if same else f"the attention, or what else comes before {name},"
                return f"{part} makes other bits of a token that is fed with others"
        at += count
    return None

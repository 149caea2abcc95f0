"""A trial of a model's attention: is it what our ops compute, on what its layers really have?

Nine tokens go through the decoder as plain generate feeds them, seven and then one by one, and
again as a round does: seven, one drafted, two verified. Each layer is judged alone. It begins the
second time with what it had the first time, and goes on with what its attention gave then, so
that nothing adds up from layer to layer: the last layer of a pretrained model in bfloat16 differs
from itself by a fifth when tokens are fed one at a time instead of together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from std_decode.model.attention import Attending, Result
from std_decode.model.cache import CACHE, SparseToDenseCache
from std_decode.model.recurrent import recurrent_modules
from std_decode.model.running_pass import Pass, uncompiled
from std_decode.model.selection_rules import plan_selection
from std_decode.model.switch import attention_name, attention_of, observed_by
from std_decode.passes.engine import Engine
from std_decode.stats import DecodeStats
from std_kernels import verify_attention

PROMPT, TOKENS = 7, 9
# What rounding may do to a layer's result, of the largest value that it adds or has.
EXACT, ROUNDED = 1e-3, 0.1
TIGHT = 1e-4  # of the largest value, between two functions on the same numbers in float32
LARGEST_LOGIT = 8.0  # with which a wrong scale, bias or cap shows
TEXTS = 3  # in half precision, in all of which a layer has to fail


class Failed(Exception):
    """What differs in a trial."""


@dataclass
class Seen:
    """What one layer's attention was asked and answered for one token, ``[B, H, 1, D]`` each."""

    query: Tensor
    key: Tensor
    value: Tensor
    keys: int  # that it could attend to
    out: Tensor  # [B, 1, Hq, D]
    mask: Tensor | None
    given: dict[str, Any]


@torch.no_grad()
def try_attention(model: PreTrainedModel, layers: dict[int, nn.Module], rows: int) -> None:
    """Raises `Failed`, or what the model or our ops raise on the way.

    Args:
        layers: the attention modules of the text decoder, by `layer_idx`.
        rows: of the batch that is tried.
    """
    name, decoder, device = type(model).__name__, model.get_decoder(), input_device(model)
    vocabulary = decoder.config.get_text_config().vocab_size
    positions = torch.arange(TOKENS, device=device).repeat(rows, 1)
    suspects: dict[str, float] | None = None
    for text in range(TEXTS):
        ids = (positions + text * (vocabulary // TEXTS)) % vocabulary
        found = _Trial(name, decoder, layers, ids, positions).differences()
        # A layer of experts may by rounding take another one. Not with every text.
        before = found if suspects is None else suspects
        suspects = {part: difference for part, difference in found.items() if part in before}
        if not suspects or _is_exact(model.dtype):
            break
    for part, difference in (suspects or {}).items():
        raise Failed(
            f"{part} of {name} makes something else of a token that is fed with others than of "
            f"one that is fed alone (a trial differs by {difference:.1%})"
        )


class _Trial:
    """Of one text.

    Args:
        name: of the model.
        ids, positions: ``[B, TOKENS]``.

    Attributes:
        tokens: those that the pass under way is fed.
        plain: whether that is as plain generate does it.
        attended: the layers whose attention ran in it.
        seen: by layer and token, what attention did the first time,
        states: and what each part was given and made of it, ``[B, H]``.
        differs: the parts that make something else of it in a round, and by how much.
    """

    def __init__(
        self,
        name: str,
        decoder: nn.Module,
        layers: dict[int, nn.Module],
        ids: Tensor,
        positions: Tensor,
    ):
        self.name, self.decoder, self.layers = name, decoder, layers
        self.ids, self.positions = ids, positions
        self.blocks = _blocks(decoder, {**layers, **recurrent_modules(decoder)})
        # Where that is what the model's own function computes in, when it is given it.
        self.in_float32 = (
            attention_name(decoder.config) in ("eager", "sdpa")
            and torch.get_float32_matmul_precision() == "highest"
        )
        self.tokens, self.plain = range(0), True
        self.attended: list[int] = []
        self.seen: dict[tuple[int, int], Seen] = {}
        self.states: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.given: dict[str, Tensor] = {}
        self.differs: dict[str, float] = {}

    def differences(self) -> dict[str, float]:
        with self._watching():
            self._as_generate_does()
            self.plain = False
            self._as_a_round_does()
        return self.differs

    @contextmanager
    def _watching(self) -> Iterator[None]:
        handles = []
        try:
            for name, block in self.blocks.items():
                before, after = self._hooks(name)
                handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(block.register_forward_hook(after))
            with observed_by(self._attend):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _as_generate_does(self) -> None:
        cache = DynamicCache(config=self.decoder.config)
        running = Pass("prefill", cache, self.layers)
        for start, end in ((0, PROMPT), *((t, t + 1) for t in range(PROMPT, TOKENS))):
            here = slice(start, end)
            with attention_of(self.decoder.config, running), uncompiled():
                self._forward(
                    input_ids=self.ids[:, here],
                    position_ids=self.positions[:, here],
                    use_cache=True,
                    **{CACHE: cache},
                )
            for layer in (cache.layers[index] for index in self.layers):
                keys, values = tuple(layer.keys.shape), tuple(layer.values.shape)
                if keys != values:
                    raise Failed(
                        f"{self.name} caches keys of shape {keys} and values of shape {values}, "
                        "expected equal ones"
                    )

    def _as_a_round_does(self) -> None:
        ids, positions, config = self.ids, self.positions, self.decoder.config
        cache = SparseToDenseCache(config, TOKENS, len(ids), ids.device, most_drafts=1)
        engine = Engine(config, self.layers, cache, reselect=True)
        try:
            visual = torch.zeros_like(ids[:, :PROMPT], dtype=torch.bool)
            selection = plan_selection(visual, None, PROMPT, PROMPT)
            engine.start(self._forward, DynamicCache(), None, selection, DecodeStats())
            engine.reselects = True  # although every key is selected already, try the scores
            engine.prefill(input_ids=ids[:, :PROMPT], position_ids=positions[:, :PROMPT])
            pending, ahead = ids[:, PROMPT : PROMPT + 1], positions[:, PROMPT:]
            engine.draft_and_verify(pending, ahead, 1, lambda *_: ids[:, -1], {})
        finally:
            cache.release()

    def _forward(self, **inputs: Any) -> Any:
        first = int(inputs["position_ids"][0, 0])
        self.tokens = range(first, first + inputs["input_ids"].shape[1])
        self.attended.clear()
        states = self.decoder(**inputs).last_hidden_state
        if self.attended != sorted(self.layers):
            raise Failed(
                f"{self.name} attends {len(self.attended)} times in {len(self.layers)} layers, "
                "expected once in each"
            )
        self._follow("the last state", states, states, states)
        return SimpleNamespace(logits=states)

    # --- the attention ---

    def _attend(self, attending: Attending) -> Result:
        index: Any = attending.module.layer_idx
        self.attended.append(index)
        result = attending()
        tokens = [t for t in self.tokens if t >= PROMPT]
        if not tokens:
            return result
        if self.plain:
            newest = slice(-1, None)
            self.seen[index, tokens[0]] = Seen(
                attending.query,
                attending.key[:, :, newest],
                attending.value[:, :, newest],
                attending.key.shape[2],
                result[0],
                attending.mask,
                attending.given,
            )
            return result
        for row, token in enumerate(tokens):
            self._judge(attending, result[0][:, row : row + 1], row, token)
        return torch.cat([self.seen[index, token].out for token in tokens], dim=1), result[1]

    def _judge(self, attending: Attending, out: Tensor, row: int, token: int) -> None:
        """Our result for one token, and the op's in float32, against the model's own function."""
        index: Any = attending.module.layer_idx
        seen, options = self.seen[index, token], attending.options
        query = attending.query[:, :, row : row + 1]
        keys = slice(token + 1 - seen.keys, token + 1)
        key, value = attending.key[:, :, keys], attending.value[:, :, keys]
        rounded = allowed(out.dtype)
        for got, wanted in ((query, seen.query), (key, seen.key), (value, seen.value)):
            self._check(got[:, :, -1:] - wanted, wanted, rounded)
        largest = float(query.float().norm(dim=-1).max() * key.float().norm(dim=-1).max())
        largest *= options["scale"] or query.shape[-1] ** -0.5
        # Large logits, as of massive activations, have a large rounding error of their own.
        noise = 32 * torch.finfo(torch.float32).eps
        wanted = self._own(attending, seen, query, key, value)
        self._check(_by_head(out - wanted, value), value, rounded + noise * largest)
        if not self.in_float32:
            return
        for logit in (largest, LARGEST_LOGIT):
            given = (query.float() * (logit / max(largest, 1e-30)), key.float(), value.float())
            kv_len = torch.full((len(query),), seen.keys, dtype=torch.int32, device=query.device)
            ours, _ = verify_attention(*given, kv_len, window=attending.layer.window, **options)
            wanted = self._own(attending, seen, *given)
            error = _by_head(ours.transpose(1, 2) - wanted, value)
            self._check(error, value, TIGHT + noise * logit)

    def _own(self, attending: Attending, seen: Seen, *tensors: Tensor) -> Tensor:
        """What the model's own function makes of these, called as it was for that token."""
        mask = seen.mask
        if self.in_float32:
            tensors = tuple(x.float() for x in tensors)
            mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        return attending.dense(attending.module, *tensors, mask, **seen.given)[0]

    def _check(self, error: Tensor, scale: Tensor, limit: float) -> None:
        difference = _difference(error, scale)
        if not difference < limit:
            raise Failed(
                f"the attention of {self.name} is not the causal softmax attention that was "
                f"expected (a trial differs by {difference:.1%})"
            )

    # --- everything else ---

    def _hooks(self, name: str) -> tuple[Any, Any]:
        """For a decoder layer: it gets what it got the first time, and has to make the same."""

        def before(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            states = args[0] if args else kwargs.get("hidden_states")
            self.given.pop(name, None)
            if not isinstance(states, Tensor) or states.dim() != 3:
                return None
            tokens = [t for t in self.tokens if (name, t) in self.states]
            if tokens and not self.plain:
                wanted = torch.stack([self.states[name, t][0] for t in tokens], dim=1)
                self._compare(name, states, wanted, wanted)
                states = wanted
            self.given[name] = states.clone()  # the layer may write into it
            if args:
                return (states, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": states}

        def after(block: nn.Module, args: tuple, output: Any) -> None:
            states = output if isinstance(output, Tensor) else output[0]
            if name in self.given:
                given = self.given[name]
                self._follow(name, given, states, states - given)

        return before, after

    def _follow(self, name: str, given: Tensor, states: Tensor, added: Tensor) -> None:
        """Note what a part makes of each token, or compare it with what it made before."""
        tokens = [t for t in self.tokens if t >= PROMPT]
        if not tokens:
            return
        if self.plain:
            self.states[name, tokens[0]] = given[:, 0], states[:, 0].clone()
            return
        wanted = torch.stack([self.states[name, token][1] for token in tokens], dim=1)
        self._compare(name, states, wanted, added)

    def _compare(self, name: str, got: Tensor, wanted: Tensor, scale: Tensor) -> None:
        difference = added_difference(got, wanted, scale)
        if not difference < allowed(wanted.dtype):
            self.differs[name] = max(difference, self.differs.get(name, 0.0))


def added_difference(got: Tensor, wanted: Tensor, added: Tensor) -> float:
    """The largest error of a token's features ``[..., H]``, as a share of the largest added."""
    # Where a part adds little to what is large, rounding the sum is not its doing.
    ulps = 2 * torch.finfo(wanted.dtype).eps * wanted.abs()
    error = ((got - wanted).abs() - ulps).clamp(min=0)
    return _difference(error[..., None, :], added[..., None, :])


def allowed(dtype: torch.dtype) -> float:
    """What rounding may do to a part's result."""
    return EXACT if _is_exact(dtype) else ROUNDED


def _by_head(out: Tensor, value: Tensor) -> Tensor:
    """``[B, 1, Hq, D]`` as ``[B, Hkv, G, D]``, to stand beside the values ``[B, Hkv, N, D]``."""
    return out[:, 0].unflatten(1, (value.shape[1], -1))


def _difference(error: Tensor, scale: Tensor) -> float:
    """The largest error of a head or token, as a share of the largest value there."""
    error, scale = (x.float().abs().amax(dim=(-2, -1)) for x in (error, scale))
    return float((error / scale.clamp(min=1e-30)).max())


def _is_exact(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


def _blocks(decoder: nn.Module, layers: dict[int, nn.Module]) -> dict[str, nn.Module]:
    """The decoder layers: for each attention module the entry of a list that it is in."""
    names = {id(module): name for name, module in decoder.named_modules()}
    blocks: dict[str, nn.Module] = {}
    for attention in layers.values():
        path = names[id(attention)].split(".")
        for end in range(len(path), 0, -1):
            parent = decoder.get_submodule(".".join(path[: end - 1]))
            if isinstance(parent, nn.ModuleList):
                name = ".".join(path[:end])
                blocks[name] = decoder.get_submodule(name)
                break
    return blocks


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the prompt's tokens go."""
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    if device.type == "meta":  # offloaded by accelerate, which brings weights in for each pass
        device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", "cpu")
    return torch.device(device)

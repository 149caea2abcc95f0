"""Linear attention (gated delta layers) in a pass: a state that drafts never touch.

A state cannot forget a token. So a layer keeps the one after the tokens that were accepted when
the newest dense pass began, and the inputs of those since in a ring, by their position. A pass
writes its tokens' inputs behind the accepted ones and goes over the ring from the state on; a
dense pass stores the state that it comes through. Rejecting a draft is nothing but a smaller
length, as for keys and values.

The model's own forward runs, with three names of its file standing for ours: a layer of our cache
comes to them as its state, and anybody else's goes to the functions that the file has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import LinearAttentionLayer

from std_kernels import causal_conv1d, gated_delta_rule

if TYPE_CHECKING:
    from std_decode.model.cache import SparseToDenseCache

MOST_WIDTH = 8  # of a convolution, tokens
CONVOLUTION = "causal_conv1d_fn"
RULES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")


class RecurrentLayer(LinearAttentionLayer):
    """One linear-attention layer's state and the ring of its tokens' inputs.

    Until the prompt is read it is transformers' own layer. A token's inputs are in slot
    `position % slots`.

    Attributes:
        state: float32 ``[B, Hv, Dk, Dv]``, after `owner.settled` tokens of each row.
        rings: of the convolution's inputs ``[B, P, C]``, its results ``[B, P, C]``, the log decay
            ``[B, P, Hv]`` and beta ``[B, P, Hv]``.
        heads: of key and value, and their dims: Hk, Dk, Hv, Dv.
        width: tokens of the convolution, W.
    """

    window = None
    is_sliding = False

    def __init__(self, owner: SparseToDenseCache):
        super().__init__()
        self.owner = owner
        self.state: Any = None
        self.rings: list[Tensor] = []
        self.heads: tuple[int, int, int, int] = (0, 0, 0, 0)
        self.width = 0

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.state, *self.rings) if x is not None)

    # --- until the prompt is read ---

    def begin(self, past: LinearAttentionLayer | None) -> None:
        """Go on from what a layer of the caller's cache holds, which is copied; None: nothing."""
        LinearAttentionLayer.__init__(self)
        if past is None or not past.has_previous_state[0]:
            return
        conv, state = past.conv_states[0], past.recurrent_states[0]
        self.lazy_initialization(conv, state)
        self.conv_states[0].copy_(conv)
        self.recurrent_states[0].copy_(state)
        self.has_previous_state[0] = True

    def finish_prefill(self) -> None:
        """From now on the state and the window are ours."""
        conv, state = self.conv_states[0], self.recurrent_states[0].float()
        if self.state is None:
            self.state, channels = state.clone(), conv.shape[1]
            heads, slots = state.shape[1], self.owner.slots
            shapes = ((channels, conv), (channels, conv), (heads, state), (heads, conv))
            self.rings = [like.new_zeros(len(conv), slots, size) for size, like in shapes]
        else:
            self.state.copy_(state)
        self.width = conv.shape[2]
        self._write(0, conv.mT, self._last(self.width))
        # What asks for them gets the layer itself, which comes back to us with the tokens.
        self.conv_states[0] = self.recurrent_states[0] = self
        self.record_past = True  # else a single token would go to another function

    # --- afterwards ---

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Any:
        if self.owner.prefilling:
            return super().update_conv_state(conv_states, state_idx, **kwargs)
        self._write(0, conv_states.mT)
        return self

    def update_recurrent_state(self, recurrent_states: Any, *args: Any, **kwargs: Any) -> Any:
        if recurrent_states is self:
            return self
        return super().update_recurrent_state(recurrent_states, *args, **kwargs)

    def convolve(self, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        """The convolution of the pass's tokens, ``[B, C, T]``."""
        if activation not in (None, "silu", "swish"):
            raise NotImplementedError(f"a causal convolution with {activation}, expected silu")
        span = self.owner.span
        mixed = causal_conv1d(
            self.rings[0],
            weight,
            span.kv_len.to(weight.device),
            span.slots.shape[1],
            bias=bias,
            silu=activation is not None,
        )
        self._write(1, mixed)
        return mixed.mT

    def attend(self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        """The gated delta rule of the pass's tokens; key and value are in the ring already."""
        self._write(2, g)
        self._write(3, beta)
        span, Dk, (Hv, Dv) = self.owner.span, key.shape[3], value.shape[2:]
        Hk = (self.rings[1].shape[2] - Hv * Dv) // (2 * Dk)
        self.heads = Hk, Dk, Hv, Dv
        # Before 5.24 transformers repeats a query head for each of the value heads that share it.
        query = query[:, :, :: query.shape[2] // Hk].contiguous()
        return self._rule(query, span.kv_len, update=not span.drafted)

    def _rule(self, query: Tensor, kv_len: Tensor, update: bool) -> Tensor:
        Hk, Dk, Hv, Dv = self.heads
        _, key, value = self.rings[1].split((Hk * Dk, Hk * Dk, Hv * Dv), dim=-1)
        return gated_delta_rule(
            query,
            key.unflatten(-1, (Hk, Dk)),
            value.unflatten(-1, (Hv, Dv)),
            self.rings[2],
            self.rings[3],
            self.state,
            self.owner.settled.to(query.device),
            kv_len.to(query.device),
            update=update,
        )

    def _write(self, ring: int, tokens: Tensor, at: Tensor | None = None) -> None:
        """Put ``[B, T, ...]`` of the pass's tokens, or those at positions `at`, in their slots."""
        into, span = self.rings[ring], self.owner.span
        slots: Any = span.ring if at is None else at % into.shape[1]
        into[span.rows.to(into.device), slots.to(into.device)] = tokens

    def widen(self, slots: int) -> None:
        """Have so many slots, more than before; what is in them stays."""
        for i, ring in enumerate(self.rings):
            self.rings[i] = ring.new_zeros(len(ring), slots, ring.shape[2])
            at = self._last(ring.shape[1])
            self._write(i, self._read(ring, at), at)

    def final(self) -> tuple[Tensor, Tensor]:
        """The window ``[B, C, W]`` and the state after all accepted tokens."""
        lengths, like = self.owner.lengths, self.rings[1]
        if bool((self.owner.settled < lengths).any()):
            # Of one more token, whose result nobody asks for, the state before it.
            query = like.new_zeros(len(like), 1, *self.heads[:2])
            self._rule(query, (lengths + 1).int(), update=True)
        at = self._last(self.width)
        before = (at < 0).to(like.device)[..., None]
        return self._read(self.rings[0], at).masked_fill_(before, 0).mT, self.state

    def _last(self, count: int) -> Tensor:
        """Positions of each row's newest accepted tokens, ``[B, count]``."""
        lengths = self.owner.lengths[:, None]
        return lengths + torch.arange(-count, 0, device=lengths.device)

    def _read(self, ring: Tensor, at: Tensor) -> Tensor:
        slots = (at % ring.shape[1]).to(ring.device)
        return ring[self.owner.span.rows.to(ring.device), slots]

    # --- what every layer of the cache has ---

    def grow(self, capacity: int) -> None:
        """A state is as large for any length."""

    def arrange(self, order: Tensor) -> None:
        """A state has its tokens in the order in which they came."""


def hand_over(layer: LinearAttentionLayer, window: Tensor, state: Tensor) -> None:
    """Leave in a layer of the caller's cache what plain decoding does."""
    if not layer.has_previous_state[0]:
        layer.lazy_initialization(window, state)
    layer.conv_states[0].copy_(window)
    layer.recurrent_states[0].copy_(state)
    layer.has_previous_state[0] = True


# --- the modules ---


def recurrent_modules(decoder: nn.Module) -> dict[int, nn.Module]:
    """The gated delta layers of a decoder, by `layer_idx`: those whose forward names our ops."""
    found = {}
    for module in decoder.modules():
        index, code = getattr(module, "layer_idx", None), _written(type(module))
        if isinstance(index, int) and {CONVOLUTION, *RULES} <= set(code.__code__.co_names):
            found[index] = module
    return found


@contextmanager
def standing_in(decoder: nn.Module) -> Iterator[None]:
    """Within, the decoder's gated delta layers take a cache of ours."""
    held = attach(decoder)
    try:
        yield
    finally:
        detach(held)


def attach(decoder: nn.Module) -> list[nn.Module]:
    """Have the decoder's gated delta layers take a cache of ours, until `detach` of them all.

    Others may do so meanwhile: a trial, or another model that shares them.
    """
    modules: list[Any] = list(recurrent_modules(decoder).values())
    for module in modules:
        if not isinstance(module, _Recurrent):
            module.__class__ = _recurrent_class(type(module))
        module._std_decode_holders = vars(module).get("_std_decode_holders", 0) + 1
    return modules


def detach(modules: list[Any]) -> None:
    for module in modules:
        module._std_decode_holders -= 1
        if not module._std_decode_holders:
            module.__class__ = type(module).__bases__[1]
            del module._std_decode_holders


class _Recurrent:
    """Mixed into the class of a gated delta layer, before its own."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle would look for a class of this name, and find the layer's own.
        reduced: Any = super().__reduce_ex__(protocol)
        return _new, (type(self).__bases__[1],), *reduced[2:]


def _new(original: type) -> Any:
    kind: Any = _recurrent_class(original)
    return kind.__new__(kind)


_classes: dict[type, type] = {}


def _recurrent_class(original: type) -> type:
    """`original`, under its name, its forward finding ours where it looks for those functions."""
    if original not in _classes:
        _classes[original] = _make_class(original)
    return _classes[original]


def _make_class(original: Any) -> type:
    written = _written(original)
    own = {name: _dispatching(written.__globals__[name], _rule) for name in RULES}
    own[CONVOLUTION] = _dispatching(written.__globals__[CONVOLUTION], _convolution)
    forward = FunctionType(
        written.__code__,
        {**written.__globals__, **own},
        written.__name__,
        written.__defaults__,
        written.__closure__,
    )
    forward.__kwdefaults__, forward.__qualname__ = written.__kwdefaults__, written.__qualname__
    forward.__module__ = written.__module__
    # transformers and our own trials look at both.
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (_Recurrent, original), {**names, "forward": forward})


def _written(kind: type) -> Any:
    """A module's forward beneath its decorators."""
    return inspect.unwrap(getattr(kind, "forward", _written))


def _dispatching(function: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        layer = kwargs.get("initial_state") if "initial_state" in kwargs else args[0]
        if isinstance(layer, RecurrentLayer):
            return ours(layer, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def _convolution(
    layer: RecurrentLayer,
    hidden_states: Any,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    return layer.convolve(weight, bias, activation)


def _rule(
    layer: RecurrentLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, RecurrentLayer]:
    if not use_qk_l2norm_in_kernel:
        raise NotImplementedError("a gated delta rule of queries and keys of any length")
    return layer.attend(query, key, value, g, beta), layer

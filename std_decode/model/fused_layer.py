"""A decoder layer in few launches: products, attention, and one kernel before each of them.

    add_rms_norm  qkv  rope_write  attention  o  add_rms_norm  gate_up  silu_mul  down

In a pass that says so (`Pass.fused`) a layer runs so; everywhere else it does what it always did.
The addition at a layer's end and the norm of the next one's beginning are one kernel: a layer
hands on its true result, and beside it, on the pass, what the next norm will ask for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

from std_decode.model.attention import attention_function
from std_decode.model.cache import CACHE
from std_decode.model.packed import Joint
from std_decode.model.running_pass import Pass, running_pass
from std_kernels import add_rms_norm, rope_write, silu_mul


class FusedLayer:
    """Mixed into the class of a decoder layer, before its own."""

    _std_decode_fusion: Fusion

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        fusion, running = self._std_decode_fusion, running_pass()
        if args or running is None or not fusion.runs_in(running):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return fusion(running, hidden_states, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        # Pickle would look for a class of this name, and find the layer's own.
        return _new, (own_class(type(self)), FusedLayer), *reduced[2:]


class FusedNorm:
    """Mixed into the class of the norm behind the last layer."""

    def forward(self, hidden_states: Tensor) -> Any:
        running = running_pass()
        normed = None if running is None else handed_on(running, self, hidden_states)
        return super().forward(hidden_states) if normed is None else normed  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return _new, (own_class(type(self)), FusedNorm), *reduced[2:]


@lru_cache(maxsize=256)
def fused_class(own: Any, mixed_in: Any = FusedLayer) -> Any:
    """`own`, under its name, with `mixed_in` before it; always the same class."""
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    return type(own.__name__, (mixed_in, own), names)


def own_class(kind: type) -> type:
    """The class that `fused_class` was given where it made `kind`, else `kind`."""
    return kind.__bases__[1] if kind.__bases__[0] in (FusedLayer, FusedNorm) else kind


def _new(own: type, mixed_in: type) -> Any:
    """What pickle and deepcopy begin a copy of a layer with."""
    kind = fused_class(own, mixed_in)
    return kind.__new__(kind)


def handed_on(running: Pass, norm: object, states: Tensor) -> Tensor | None:
    """What `norm` makes of `states`, where the layer before has worked it out already."""
    known, running.normed = running.normed, None
    if known is None or known[0] is not norm or known[1] is not states:
        return None
    return known[3] if known[2] == _version(states) else None


def _version(states: Tensor) -> int:
    """What changes when a tensor is written to, as far as that can be seen."""
    return 0 if states.is_inference() else states._version


class Fusion:
    """How one decoder layer runs.

    Attributes:
        owner: whose it is, see `Pass.fused`.
        name: of the layer in the decoder.
        active: whether the calls that begin now may run it so.
        norm_after: what the layer's result goes to next, an RMS norm; None where nobody knows.
    """

    def __init__(self, owner: object, name: str, layer: Any):
        self.owner, self.name, self.layer = owner, name, layer
        self.norm_after: Any = None
        self.active = False
        self.qkv = self.gate_up = Joint()
        self.gather()

    def gather(self) -> None:
        """Take the linear layers that there are now."""
        attention, mlp = self.layer.self_attn, self.layer.mlp
        self.qkv.unpack()
        self.gate_up.unpack()
        self.qkv = Joint(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = Joint(mlp.gate_proj, mlp.up_proj)
        self.out, self.down = Joint(attention.o_proj), Joint(mlp.down_proj)

    @property
    def intact(self) -> bool:
        """Whether these still are the layer's, and their weights slices."""
        attention, mlp = self.layer.self_attn, self.layer.mlp
        now = [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]
        now += [attention.o_proj, mlp.down_proj]
        known = [x for joint in (*self.joints, self.out, self.down) for x in joint.layers]
        same = all(one is other for one, other in zip(now, known, strict=True))
        return same and all(joint.intact for joint in self.joints)

    @property
    def joints(self) -> tuple[Joint, Joint]:
        """Those that are packed."""
        return self.qkv, self.gate_up

    def join(self, twins: Any) -> None:
        """Have the twins of layers with the same input be one, before any pass is captured."""
        for joint in (*self.joints, self.out, self.down):
            joint.twin_of(twins)

    def runs_in(self, running: Pass) -> bool:
        return running.fused is self.owner and self.active

    def __call__(
        self,
        running: Pass,
        states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The layer's result ``[B, T, H]``."""
        first, second = self.layer.input_layernorm, self.layer.post_attention_layernorm
        rows = states.flatten(0, 1)
        normed = handed_on(running, first, states)
        if normed is None:
            _, flat = add_rms_norm(rows, None, first.weight, first.variance_epsilon)
            normed = flat.view_as(states)
        query, keys, values = self._projected(running, normed, position_embeddings)
        kwargs.pop(CACHE, None)
        attended = self._attended(running, query, keys, values, attention_mask, kwargs)
        rows, normed = self._added(rows, self.out(attended, running.twins), second)
        gate_up, bias = self.gate_up(normed.view_as(states), running.twins)
        active = silu_mul(gate_up, bias=bias, dtype=states.dtype)
        delta = self.down(active.unflatten(0, states.shape[:2]), running.twins)
        # Where nobody knows what comes next, any norm will do, and is for nothing.
        after = self.norm_after
        rows, normed = self._added(rows, delta, second if after is None else after)
        result = rows.view_as(states)
        if after is not None:
            running.normed = after, result, _version(result), normed.view_as(states)
        return result

    def _added(
        self, rows: Tensor, product: tuple[Tensor, Tensor | None], norm: Any
    ) -> tuple[Tensor, Tensor]:
        delta, bias = product
        return add_rms_norm(rows, delta, norm.weight, norm.variance_epsilon, bias=bias)

    def _projected(
        self, running: Pass, normed: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The queries ``[B, Hq, T, D]``, and the cache with these tokens' keys and values."""
        attention: Any = self.layer.self_attn
        cached = running.cache.layers[attention.layer_idx]
        options: dict[str, Any] = {}
        if self.has_head_norms:
            options = dict(
                q_norm=attention.q_norm.weight,
                k_norm=attention.k_norm.weight,
                eps=attention.q_norm.variance_epsilon,
            )
        qkv, options["bias"] = self.qkv(normed, running.twins)
        slots = running.cache.span.slots.to(cached.device)
        query = rope_write(qkv, *rotation, slots, cached.keys, cached.values, **options)
        return query, cached.keys, cached.values

    @property
    def has_head_norms(self) -> bool:
        return getattr(self.layer.self_attn, "q_norm", None) is not None

    def _attended(
        self,
        running: Pass,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """By the function that the config names, called as the layer's own module calls it."""
        attention: Any = self.layer.self_attn
        attend = attention_function(attention, attention.config._attn_implementation)
        window = running.cache.layers[attention.layer_idx].window
        given = dict(dropout=0.0, scaling=attention.scaling, sliding_window=window, **kwargs)
        return attend(attention, query, keys, values, mask, **given)[0].flatten(2)

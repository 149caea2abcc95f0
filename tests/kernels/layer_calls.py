"""Calls of the ops around a decoder layer's products, and transformers' own code for the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers.models.qwen3 import modeling_qwen3 as qwen3

import std_kernels as sk
from std_kernels import reference

NAMES = ("add_rms_norm", "rope_write", "silu_mul")
OPS = {name: getattr(sk, name) for name in NAMES}
REQUIRED = {"add_rms_norm": 4, "rope_write": 6, "silu_mul": 1}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6


def arguments(op, dtype=torch.float32, B=2, T=3, D=16, H=48, partials=0, seed=0):
    """A valid call of the op with every option set."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, wide=False):
        return torch.randn(shape, generator=generator).to(torch.float32 if wide else dtype)

    def product(rows, features):
        if partials:
            return draw(partials, rows, features, wide=True)
        return draw(rows, features)

    if op == "add_rms_norm":
        call = {"residual": draw(B * T, H), "delta": product(B * T, H), "weight": draw(H)}
        return {**call, "eps": EPS, "bias": draw(H)}
    if op == "silu_mul":
        return {"gate_up": 4 * product(B * T, 2 * H), "bias": draw(2 * H), "dtype": dtype}
    features = (4 + 2 * 2) * D
    angles = 7 * torch.randn(B, T, D, generator=generator)
    slots = torch.stack([torch.randperm(20, generator=generator)[:T] for _ in range(B)])
    call = {"qkv": product(B * T, features), "cos": angles.cos().to(dtype)}
    call |= {"sin": angles.sin().to(dtype), "slots": slots}
    call |= {"keys": draw(B, 2, 20, D), "values": draw(B, 2, 20, D), "bias": draw(features)}
    return {**call, "q_norm": draw(D), "k_norm": draw(D), "eps": EPS}


def call(op, values, function=None):
    names = list(values)[: REQUIRED[op]]
    options = {name: values[name] for name in values if name not in names}
    return (function or OPS[op])(*(values[name] for name in names), **options)


def results(op, values):
    """All that a call makes, in the op's order; the caches that it wrote to come last."""
    made = call(op, values)
    made = made if isinstance(made, tuple) else (made,)
    return (*made, values["keys"], values["values"]) if op == "rope_write" else made


def assert_only_the_slots_are_written(values):
    """Of `rope_write`: and each of them is."""
    before = copied(values)
    call("rope_write", values)
    for name in ("keys", "values"):
        kept = torch.ones(2, 20, dtype=torch.bool).scatter_(1, values["slots"], False)
        same = (values[name] == before[name]).all(-1)
        assert torch.equal(same, kept[:, None].expand_as(same))


def expected(op, values, dtype=torch.float64):
    values = dict(values)
    values.pop("dtype", None)
    function = getattr(reference, op)
    made = call(op, values, lambda *args, **options: function(*args, **options, dtype=dtype))
    return made if isinstance(made, tuple) else (made,)


def as_eager(op, values):
    """By transformers' own modules and functions, on products as a model has them.

    Partials are added up as `add_rms_norm` says.
    """
    dtype = values.get("dtype") or values["weight" if op == "add_rms_norm" else "keys"].dtype

    def product(name):
        total = values[name]
        if total.dim() == 3:
            parts = total.unbind()
            total = parts[0]
            for part in parts[1:]:
                total = total + part
        if values["bias"] is not None:
            total = total.float() + values["bias"].float()
        return total.to(dtype)

    if op == "add_rms_norm":
        total = values["residual"]
        if values["delta"] is not None:
            total = total + product("delta")
        return total, norm(values["weight"], values["eps"])(total)
    if op == "silu_mul":
        gate, up = product("gate_up").chunk(2, dim=-1)
        return (F.silu(gate.contiguous()) * up,)
    B, Hkv, _, D = values["keys"].shape
    T = values["slots"].shape[1]
    heads = product("qkv").view(B, T, -1, D)
    query, key, value = heads.split([heads.shape[2] - 2 * Hkv, Hkv, Hkv], dim=2)
    if values["q_norm"] is not None:
        query = norm(values["q_norm"], values["eps"])(query)
        key = norm(values["k_norm"], values["eps"])(key)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    rotary = values["cos"].shape[-1]
    turned = qwen3.apply_rotary_pos_emb(
        query[..., :rotary], key[..., :rotary], values["cos"], values["sin"]
    )
    query, key = (torch.cat((x, y[..., rotary:]), -1) for x, y in zip(turned, (query, key)))
    keys, cached = values["keys"].clone(), values["values"].clone()
    for b in range(B):
        keys[b, :, values["slots"][b]] = key[b]
        cached[b, :, values["slots"][b]] = value[b]
    return query, keys, cached


def norm(weight, eps):
    """transformers' RMS norm with these weights."""
    module = qwen3.Qwen3RMSNorm(len(weight), eps)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


def copied(values):
    return {name: x.clone() if torch.is_tensor(x) else x for name, x in values.items()}


VARIANTS = {
    "plain": dict(bias=None, q_norm=None, k_norm=None),
    "bias": dict(q_norm=None, k_norm=None),
    "norms": dict(bias=None),
    "all": {},
}


def variant(op, name, **sizes):
    """The call with the options that are left in a variant."""
    values = arguments(op, **sizes)
    return {**values, **{x: y for x, y in VARIANTS[name].items() if x in values}}

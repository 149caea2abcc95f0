"""Random cases of attention that is somebody else's: replaced, registered, renamed."""

from __future__ import annotations

import argparse
import copy
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import std_decode
from tests.decode.conftest import Case
from tests.decode.families import FAMILIES

_HELP = """\
Changes the attention of tiny models before and after patch and between calls: another function,
registered under a name of its own or under transformers', in one file or for all, another mask,
another forward of a module, a layer or a decoder, on the instance or its class, another class;
functions that do the same, that forget keys, that are sharp, that go by how many tokens they are
fed. An unpatched model is changed alike, and every call has to give its tokens, greedy and
sampled.
Exit status: 0, 1 if any token differs."""
TEXTS = ("llama", "qwen3", "mistral", "qwen2_vl", "llava_onevision", "internvl")
Undo = Callable[[], Any]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "replaced",
        help="attention that is replaced before and after patch",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cases", type=int, default=1000, metavar="N", help="(1000)")
    add("--out", type=Path, metavar="DIR", help="write a section of DIR/reliability.md")
    parser.set_defaults(run=run)


# --- attention functions that somebody may register ---


def same(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **more: Any):
    return sdpa_attention_forward(module, q, k, v, attention_mask, **more)


def sharp(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **more: Any):
    more["scaling"] = 1.7 * (more.get("scaling") or q.shape[-1] ** -0.5)
    return sdpa_attention_forward(module, q, k, v, attention_mask, **more)


def window(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **more: Any):
    """Full attention up to 30 tokens."""
    if not getattr(module, "is_causal", False):
        return same(module, q, k, v, attention_mask, **more)
    last, seen = k.shape[2] - q.shape[2], torch.arange(k.shape[2])
    near = seen[None] > torch.arange(last, k.shape[2])[:, None] - 30
    near &= seen[None] <= torch.arange(last, k.shape[2])[:, None]
    if attention_mask is not None:
        # That of eager attention is added.
        near = near & (
            attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        )
    return same(module, q, k, v, near.expand(len(q), 1, -1, -1), **more)


def budget(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **more: Any):
    """Forgets keys in the middle, of long texts and in steps of one token."""
    if q.shape[2] == 1 and k.shape[2] > 40:
        k, v = (torch.cat([x[:, :, :4], x[:, :, -30:]], 2) for x in (k, v))
        attention_mask = None
    return same(module, q, k, v, attention_mask, **more)


FUNCTIONS = (same, sharp, window, budget)


def hidden(*args: Any, **options: Any) -> Any:
    """A mask that hides every seventh key."""
    mask = sdpa_mask(*args, **{**options, "allow_is_causal_skip": False})
    if mask is not None:
        mask = mask.clone()
        mask[..., 3::7] &= torch.eye(mask.shape[-2], mask.shape[-1], dtype=torch.bool)[..., 3::7]
    return mask


def altered(forward: Callable, how: str) -> Callable:
    """A forward that calls another and does something to the first of its results."""

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = forward(self, *args, **kwargs)
        if how == "same":
            return result
        first = result if isinstance(result, Tensor) else result[0]
        if how == "step" and first.dim() == 3 and first.shape[1] == 1:
            first.mul_(0.8)
        elif how == "newest" and first.dim() == 3:
            first[:, -1] *= 0.8
        return result

    return run


# --- ways to bring them in; each returns how it is undone ---


def use(model: Any, name: str) -> Undo:
    nested = hasattr(model.config, "text_config")
    before = model.get_decoder().config._attn_implementation
    model.set_attn_implementation({"text_config": name} if nested else name)
    return lambda: model.set_attn_implementation({"text_config": before} if nested else before)


def put(holder: Any, name: str, value: Any) -> Undo:
    """An attribute, which may have been there."""
    held = vars(holder).get(name)
    setattr(holder, name, value)
    if held is None:
        return lambda: delattr(holder, name)
    return lambda: setattr(holder, name, held)


def register(interface: Any, name: str, value: Any) -> Undo:
    before = interface._global_mapping.get(name)
    interface.register(name, value)
    return lambda: interface._global_mapping.update({name: before})


def by_a_name_of_its_own(model: Any, rng: random.Random) -> list[Undo]:
    function, name = rng.choice(FUNCTIONS), f"own_{rng.randrange(3)}"
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    return [use(model, name)]


def by_transformers_name(model: Any, rng: random.Random) -> list[Undo]:
    return [register(AttentionInterface, "sdpa", rng.choice(FUNCTIONS)), use(model, "sdpa")]


def for_one_mapping(model: Any, rng: random.Random) -> list[Undo]:
    ALL_ATTENTION_FUNCTIONS["sdpa"] = rng.choice(FUNCTIONS)
    return [lambda: ALL_ATTENTION_FUNCTIONS._local_mapping.clear(), use(model, "sdpa")]


def by_a_mask(model: Any, rng: random.Random) -> list[Undo]:
    return [register(AttentionMaskInterface, "sdpa", hidden), use(model, "sdpa")]


def in_the_models_file(model: Any, rng: random.Random) -> list[Undo]:
    file = sys.modules[type(attention_of(model, 0)).__module__]
    own = rng.choice(FUNCTIONS)
    return [put(file, "eager_attention_forward", own), use(model, "eager")]


def attention_of(model: Any, index: int) -> nn.Module:
    return model.get_decoder().layers[index].self_attn


def some_module(model: Any, rng: random.Random) -> nn.Module:
    decoder, index = model.get_decoder(), rng.randrange(3)
    return rng.choice([decoder, decoder.layers[index], attention_of(model, index)])


def on_an_instance(model: Any, rng: random.Random) -> list[Undo]:
    module = some_module(model, rng)
    run = altered(type(module).forward, rng.choice(["same", "step", "newest"]))
    return [put(module, "forward", MethodType(run, module))]


def on_a_class(model: Any, rng: random.Random) -> list[Undo]:
    kind = type(some_module(model, rng))
    return [put(kind, "forward", altered(kind.forward, rng.choice(["same", "step", "newest"])))]


def by_a_class(model: Any, rng: random.Random) -> list[Undo]:
    module = attention_of(model, rng.randrange(3))
    kind = type(module)
    run = altered(kind.forward, rng.choice(["same", "step", "newest"]))
    module.__class__ = type(kind.__name__, (kind,), {"forward": run, "__module__": __name__})
    return [lambda: setattr(module, "__class__", kind)]


def by_what_transformers_has(model: Any, rng: random.Random) -> list[Undo]:
    return [use(model, rng.choice(["eager", "sdpa"]))]


CHANGES = (
    by_a_name_of_its_own, by_transformers_name, for_one_mapping, by_a_mask, in_the_models_file,
    on_an_instance, on_a_class, by_a_class, by_what_transformers_has,
)  # fmt: skip


def case(number: int) -> tuple[list[str], list[str]]:
    """One random case.

    Returns:
        What was changed and when, and what came of patch and of each call: "refused",
        "accelerated", or "unpatched". Raises AssertionError where a token differs.
    """
    rng = random.Random(number)
    torch.manual_seed(rng.randrange(10**6))
    model, inputs = FAMILIES[rng.choice(TEXTS)].build(1)
    model = model.float().eval()
    twin = copy.deepcopy(model)
    told, came, undo = [], [], []

    def change(when: str) -> None:
        seed = rng.randrange(10**6)
        way = rng.choice(CHANGES)
        for one in (twin, model):  # what is for all models is the same the second time
            undo.extend(way(one, random.Random(seed)))
        told.append(f"{way.__name__} {when}")

    try:
        if rng.random() < 0.4:
            change("before patch")
        try:
            std_decode.patch(model, top_k_keys=8, draft_length=rng.choice([0, 4, "auto"]))
        except NotImplementedError as error:
            assert type(model).__name__ in str(error)
            return told, ["refused"]
        for _ in range(rng.randrange(1, 4)):
            what = rng.random()
            if what < 0.6:
                change("after patch")
            elif what < 0.8 and undo:
                for step in reversed(undo):
                    step()
                undo.clear()
                told.append("all undone")
            came.append(_ask(twin, model, inputs, rng.random() < 0.5, rng.randrange(10**6)))
        return told, came
    finally:
        for step in reversed(undo):
            step()


def _ask(twin: Any, model: Any, inputs: Any, sampled: bool, seed: int) -> str:
    options = dict(max_new_tokens=12, do_sample=sampled)
    plain = Case(twin, inputs, options, seed)
    expected, got = plain.generate(), Case(model, inputs, options, seed).generate()
    stats = std_decode.last_stats(model)
    assert stats is not None
    if stats.fallback is not None:
        assert torch.equal(expected, got)
        return "unpatched"
    plain.assert_same_tokens(expected, got)
    return "accelerated"


def run(options: argparse.Namespace) -> int:
    from bench.sections import about
    from tests.reliability import report
    from tests.reliability.lossless import quiet

    quiet()
    came: Counter = Counter()
    failures = []
    for number in range(options.cases):
        try:
            came.update(case(number)[1])
        except AssertionError as error:
            failures.append(f"case {number}: {error}")
        print(f"\r{number + 1} of {options.cases}, {dict(came)}", end="", file=sys.stderr)
    text = (
        f"`python -m tests.reliability replaced --cases {options.cases}` ({about()}): "
        f"{options.cases:,} models whose attention was replaced, registered or renamed before or "
        f"after `patch`, {', '.join(TEXTS)}. {came['refused']} were refused by name; of "
        f"{came['accelerated'] + came['unpatched']:,} calls of the others {came['unpatched']:,} "
        f"ran as unpatched and said why, {came['accelerated']:,} were drafted or decoded densely. "
        f"{len(failures)} gave another token."
    )
    print("", text, *failures, sep="\n")
    report.write(options.out, "Attention of somebody else's", text)
    return int(bool(failures))

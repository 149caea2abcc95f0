"""Attach sparse-to-dense decoding to one model instance, and detach it again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import nn
from transformers import PreTrainedModel

from std_decode import options, patched_class
from std_decode.admission import fusing
from std_decode.admission.bits import Promises, Wanted, kind_of
from std_decode.admission.changes import Tried
from std_decode.costs.workload import Workload
from std_decode.model.cache import sliding_windows
from std_decode.model.recurrent import attach, detach
from std_decode.model.selection_rules import VisualMask
from std_decode.model.switch import forget_passes
from std_decode.passes.pool import Engines
from std_decode.rounds.lookup_length import COMPILED_LOOKUP_LENGTHS, LOOKUP_LENGTHS
from std_decode.rounds.loop import Decoding
from std_decode.rounds.policy import (
    COMPILED_LENGTHS,
    LENGTHS,
    OFFLOADED_LENGTHS,
    FixedLength,
    Policy,
)
from std_decode.rounds.tensor_parallel import own_file
from std_decode.stats import DecodeStats
from std_decode.weights import draft_weights as weights
from std_decode.weights.offloaded import is_offloaded
from std_decode.weights.products import Products
from std_decode.weights.twins import linear_layers

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class _Patch:
    """What patch leaves on a model instance, as its attribute `_std_decode`."""

    original_class: type
    tried: Tried
    top_k_keys: int
    policy: Policy | FixedLength
    reselect: bool
    visual_token_ids: Sequence[int] | None
    visual_mask: VisualMask | None
    engines: Engines
    draft_weights: weights.DraftWeights
    workload: Workload
    promises: Promises
    fused: fusing.Fused
    recurrent: list[nn.Module]  # layers that take our cache
    products: Products
    kv_cache: Literal["offloaded"] | None = None
    stats: DecodeStats | None = None
    decoding: type[Decoding] = Decoding  # a subclass looks on, see app/sparsity/measure.py

    @property
    def layers(self) -> dict[int, nn.Module]:
        """The attention modules of the decoder, by `layer_idx`."""
        return self.tried.layers


def patch(
    model: Model,
    *,
    top_k_keys: int = 1024,
    draft_length: int | Literal["auto"] = "auto",
    prompt_lookup: Literal["auto"] | bool = "auto",
    reselect: bool = True,
    draft_weights: Literal["int4", "auto"] | None = None,
    draft_weights_cache: str | PathLike[str] | None = None,
    kv_cache: Literal["offloaded"] | None = None,
    cuda_graphs: Literal["auto"] | bool = "auto",
    compile: bool = False,
    fused_layers: Literal["auto"] | bool = "auto",
    reproducible: bool | int | Literal["auto", "unpatched"] = "auto",
    visual_token_ids: Sequence[int] | None = None,
    visual_mask: VisualMask | None = None,
) -> Model:
    """Make ``model.generate()`` draft with sparse attention and verify densely.

    The answers stay the same: the tokens of the unpatched model, greedy and sampled with the same
    seed; how exactly, `reproducible` says. Only this instance changes, and `unpatch` undoes it.
    Calls that cannot be accelerated (beam search, a cache of your own, ...) run as unpatched;
    `last_stats` says why.

    Args:
        model: a decoder-only generative transformers model, for instance
            `Qwen2VLForConditionalGeneration`; a `PeftModel` or a compiled model around one is
            looked through.
        top_k_keys: keys of the prompt's video (or of a text-only prompt) that a draft reads per
            layer and KV head, at least 1. The text around the video is read besides.
        draft_length: tokens drafted a round (gamma), 0 to 63; 0 decodes densely. "auto" chooses
            for each round, by what passes have taken and how many drafts were accepted: none where
            drafting does not pay, up to 63 where weights are offloaded, else up to 32. The first
            steps of the first call are dense, to be timed.
        prompt_lookup: whether a round may draft what followed the newest tokens where they stood
            before, in the row's prompt or answer, instead of what sparse attention says. Such
            drafts cost no passes of their own. "auto": where `draft_length` is "auto", whenever
            that promises more; a fixed length drafts with sparse attention alone. True: with a
            fixed length too, whenever every row finds something; with `draft_length=0`, where that
            pays, and nothing else is drafted. False: never. Greedy or sampled, the tokens are the
            same.
        reselect: whether each verification renews the selection, or the prompt's is kept.
        draft_weights: what drafts read of the text decoder's linear layers and the LM head: None,
            the model's own weights; "int4", 4-bit copies in groups of 128 that are made here and
            take 0.53 bytes a weight until `unpatch` (0.56 where sizes ask for groups of 64);
            "auto", copies where the cost model expects a gain, supposing that 80% of the drafts
            agree, and they take at most half of the free memory; how many do agree, `last_stats`
            says. Verification is dense either way.
            Of weights that accelerate offloads (``device_map``) drafts read copies on the device,
            and fetch nothing.
            A layer that cannot have a copy keeps its weights; `last_stats` counts and says why.
        draft_weights_cache: a file to keep the copies in, so that they need not be made again; a
            file of other weights' copies is replaced. Processes that share the model by tensor
            parallelism have a file each: "name-1-of-2.ext" for "name.ext".
        kv_cache: where the prompt's keys and values are: None, on the device, unless a call asks
            otherwise (``cache_implementation="offloaded"``); "offloaded", in the host's memory.
            The device then keeps the selected ones of each layer, those of generated tokens, and
            two layers' in whole: a draft reads what is there, a dense pass copies all to the
            device once, a layer ahead. Such calls decode pass by pass, without fused layers.
        cuda_graphs: whether decoding passes are captured and replayed on a CUDA device. The call's
            buffers are then kept for the next call, until `unpatch`. What cannot be captured runs
            pass by pass, and `last_stats` says why.
        compile: whether passes that are captured are compiled first (``torch.compile``), so that a
            decoder layer is some 12 kernels instead of 30 to 40. The first call then takes long,
            and "auto" chooses among few draft lengths, because each is compiled for itself.
        fused_layers: whether decoding passes run a decoder layer in some ten kernels: products,
            attention, and one kernel before each. For layers like Llama's, among them those of
            Qwen2, Qwen3, their VL models and Mistral; others go on as they are, and `last_stats`
            says why. The weights of q, k and v, and of gate and up, are slices of one tensor then,
            until `unpatch`. "auto": on a CUDA device, where passes are not compiled. Not where the
            promise is "unpatched".
        reproducible: which bits of a logit drafts may change. False: the last few, as rounding
            goes, so that in half precision tokens may differ. True: none; every decoding pass
            feeds 8 tokens (a number: so many, 2 to 64), so that draft lengths below that, keys,
            re-selection, draft weights and the time that passes take all give the same tokens.
            "unpatched": none, and the tokens are the unpatched model's; on the CPU. "auto": in
            half precision on the CPU the strongest of these that the model can have, else False;
            `last_stats` says which promise held.
        visual_token_ids: token ids that stand for video or image, where the processor's
            ``mm_token_type_ids`` and the ids in the model's config do not tell.
        visual_mask: where the prompt holds video or image tokens, for prompts that ids cannot
            tell: bool ``[B, S]``, ``[1, S]`` or ``[S]``, or a function of ``input_ids [B, S]``
            that returns it. Goes before `visual_token_ids`.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is no generative transformers model, or an argument has the wrong type.
        ValueError: an argument is out of range.
        NotImplementedError: the model's attention is of an unsupported kind, or a layer's result
            for a token depends on the others fed with it; the message lists what is supported. Or
            the model cannot have what `reproducible` or `kv_cache` asks for.
        RuntimeError: `model` is patched already.
        MemoryError: the 4-bit copies do not fit; the message has the numbers.
        OSError: `draft_weights_cache` cannot be written.

    Note:
        Runs six forward passes of a few tokens, to see that the model's attention is what its
        configuration says; two more where layers are fused, to see that they compute the
        same; some twenty more where `reproducible` promises bits (as many at the first call of
        each batch size); and one where layers are not of torch's or transformers' own kinds, which
        are then fed a few tokens each. Source: Zhang et al., Sparse-to-Dense, ACL 2025, doi
        10.18653/v1/2025.acl-short.59; re-selection from verification is an addition.
    """
    options.check(
        top_k_keys, draft_length, prompt_lookup, reselect, cuda_graphs, compile, fused_layers
    )
    options.check_visual(visual_token_ids, visual_mask)
    options.check_reproducible(reproducible, draft_length)
    weights.check(draft_weights, draft_weights_cache)
    target = _unwrapped(model)
    if is_patched(target):
        raise RuntimeError(
            f"patch: {type(target).__name__} is patched already, expected an unpatched model; "
            "call unpatch(model) first to change the options"
        )
    own = _own_class(target)
    tried = Tried(target)
    windows = sliding_windows(target.get_decoder().config)
    options.check_offloading(kv_cache, cuda_graphs, compile, fused_layers, windows)
    fused = fusing.Fused(target, tried.layers, fused_layers if not kv_cache else False, compile)
    drafting: weights.DraftWeights | None = None
    recurrent: list[nn.Module] = []
    products = Products(() if compile else (layer for _, layer in linear_layers(target)))
    try:
        fused.attach()  # before the copies are made, which know weights by where they are
        fetching = draft_weights is not None and is_offloaded(target)
        policy = _policy(draft_length, prompt_lookup, compile, fetching)
        promises = _promises(target, tried, reproducible, policy, fused)
        kept_in = draft_weights_cache and own_file(target, Path(draft_weights_cache))
        drafting = weights.prepare(target, draft_weights, kept_in, top_k_keys, compile)
        target._std_decode = _Patch(
            own,
            tried,
            top_k_keys,
            policy,
            reselect,
            visual_token_ids,
            visual_mask,
            Engines(cuda_graphs, compile),
            drafting,
            weights.workload_of(target, top_k_keys, drafting.twins),
            promises,
            fused,
            recurrent,
            products,
            kv_cache=kv_cache,
        )
        drafting.attach()
        products.attach()
        fused.join(drafting.twins)
        recurrent += attach(target.get_decoder())
        tried.take_as_it_is(target)
        target.__class__ = patched_class.patched_class(own)
    except BaseException:
        if drafting is not None:
            drafting.detach()
        products.detach()
        fused.detach()
        detach(recurrent)
        vars(target).pop("_std_decode", None)
        raise
    return model


def unpatch(model: Model) -> Model:
    """Give `model` back as it was before `patch`.

    Raises:
        RuntimeError: `model` is not patched, or a generate call of it is under way.
    """
    target = _unwrapped(model)
    if not is_patched(target):
        raise RuntimeError(
            f"unpatch: {type(target).__name__} is not patched, expected a model that was; "
            "nothing to undo"
        )
    if target._std_decode.engines.calls:
        raise RuntimeError(
            f"unpatch: {type(target).__name__} has {len(target._std_decode.engines.calls)} "
            "generate calls under way, expected none; wait until they have returned"
        )
    target.__class__ = target._std_decode.original_class
    target._std_decode.engines.clear()
    target._std_decode.draft_weights.detach()
    target._std_decode.products.detach()
    target._std_decode.fused.detach()
    detach(target._std_decode.recurrent)
    forget_passes(target.get_decoder().config, target._std_decode.layers)
    del target._std_decode
    return model


@contextmanager
def patched(model: Model, **options: Any) -> Iterator[Model]:
    """Patch `model` for the length of a ``with`` block. Takes the options of `patch`."""
    patch(model, **options)
    try:
        yield model
    finally:
        unpatch(model)


def is_patched(model: nn.Module) -> bool:
    """Whether `patch` was applied to `model` and not undone."""
    return patched_class.is_patched(_unwrapped(model))


def last_stats(model: nn.Module) -> DecodeStats | None:
    """What the newest generate call of a patched model did.

    None before any call, while it runs, and where it raised or did not go through transformers'
    own decoding (``custom_generate``).

    Raises:
        RuntimeError: `model` is not patched.
    """
    target = _unwrapped(model)
    if not is_patched(target):
        raise RuntimeError(
            f"last_stats: {type(target).__name__} is not patched, expected a model that patch "
            "returned; read the stats before unpatch"
        )
    return target._std_decode.stats


def _own_class(model: Any) -> type:
    own = patched_class.own_class(type(model))
    if issubclass(own, patched_class.SparseToDense):
        raise NotImplementedError(
            f"patch: {own.__name__} derives from the class of a patched model, expected a class "
            "that does not; derive it from type(model) before patch or after unpatch"
        )
    return own


def _promises(
    model: Any,
    tried: Tried,
    wanted: Wanted,
    policy: Policy | FixedLength,
    fused: fusing.Fused,
) -> Promises:
    promises = Promises(wanted, policy.most if isinstance(policy, FixedLength) else None)
    promise, because = promises.of_call(model, tried, 1, fused=fused)
    if wanted is not False and wanted != "auto" and promise.kind != kind_of(wanted):
        raise NotImplementedError(
            f"patch: {type(model).__name__} cannot have reproducible={wanted!r} ({because}); "
            'reproducible="auto" gives the strongest promise that it can have'
        )
    return promises


def _policy(
    draft_length: int | Literal["auto"],
    lookup: Literal["auto"] | bool,
    compiles: bool,
    offloaded: bool,
) -> Policy | FixedLength:
    if draft_length != "auto" and not (draft_length == 0 and lookup is True):
        return FixedLength(draft_length, looks_up=lookup is True)
    compiles = compiles and not offloaded  # such passes are not captured, hence not compiled
    usual = OFFLOADED_LENGTHS if offloaded else LENGTHS
    lengths = COMPILED_LENGTHS if compiles else usual
    looked_up = COMPILED_LOOKUP_LENGTHS if compiles else LOOKUP_LENGTHS
    return Policy(lengths if draft_length else (), looked_up if lookup else ())


def _unwrapped(model: Any) -> Any:
    """The transformers model inside a compiled model or a PeftModel, else `model`."""
    while True:
        inner = getattr(model, "_orig_mod", model)
        if not isinstance(inner, PreTrainedModel) and hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        if inner is model:
            return model
        model = inner

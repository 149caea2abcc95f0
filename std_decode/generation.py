"""One generate call of a patched model: as unpatched, in lockstep, or ragged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.stopping_criteria import MaxLengthCriteria, StopStringCriteria

from std_decode.admission.calls import (
    fallback_reason,
    holes_first,
    lockstep_reason,
    masked,
    newest_run,
    prompt_parts,
)
from std_decode.costs.workload import Workload
from std_decode.model.cache import CACHE, MOST_NEW_TOKENS
from std_decode.model.selection_rules import plan_selection, visual_tokens
from std_decode.passes.engine import Engine
from std_decode.passes.pool import OFFLOADED
from std_decode.rounds.lockstep import Lockstep
from std_decode.rounds.lookup import Chances, Lookup
from std_decode.rounds.rows import Ends, Rows
from std_decode.rounds.sampling import Chooser, Drafter
from std_decode.rounds.tensor_parallel import lead, share_random_numbers
from std_decode.stats import DecodeStats, peak_memory_bytes

NOISE_WINDOW = 32  # steps that a row may be ahead of the slowest one when sampling


def sample(
    model: Any,
    plain: Callable[..., Any],
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    synced_gpus: bool,
    streamer: Any,
    kwargs: dict[str, Any],
) -> Any:
    """What `plain`, the model's own ``_sample``, returns for the same arguments, sooner.

    Leaves an account of the call as the patched `model`'s stats.
    """
    options = model._std_decode
    options.stats = None  # until it is through
    if torch.compiler.is_compiling():
        reason: str | None = "generate is being compiled"
    else:
        reason = fallback_reason(model, input_ids, config, synced_gpus, kwargs)
    if reason is not None:
        options.stats = DecodeStats(fallback=reason)
        return plain(input_ids, processors, criteria, config, synced_gpus, streamer, **kwargs)
    with options.engines.call():
        return _sooner(model, plain, input_ids, processors, criteria, config, streamer, kwargs)


def _sooner(
    model: Any,
    plain: Callable[..., Any],
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: Any,
    kwargs: dict[str, Any],
) -> Any:
    """The same, of a call that nothing stands in the way of."""
    options = model._std_decode
    given: DynamicCache = kwargs[CACHE]
    if config.do_sample:
        share_random_numbers(model, input_ids.device)
    engine = _engine(model, input_ids, config, kwargs)
    stats, cache = engine.stats, engine.cache
    kwargs[CACHE] = cache
    try:
        stats.lockstep_because = lockstep_reason(
            input_ids, processors, criteria, config, streamer, engine.promise
        )
        rows_apart = 1 if stats.lockstep_because is not None else len(input_ids)
        workload = _workload(options, input_ids, stats)
        most = engine.promise.rows - 1 if engine.promise.rows else None
        tokens = config.max_length - input_ids.shape[1]
        length = options.policy.begin(workload, rows_apart, lead(model), most, tokens)
        lookup = _lookup(model, input_ids, kwargs, length.chances) if length.looks_up else None
        if stats.lockstep_because is not None:
            stats.mode = "lockstep"
            drafter = Drafter(input_ids, processors, criteria, config)
            rounds = Lockstep(engine, drafter, length, lookup)
            cache.answer = rounds
            output = plain(
                input_ids, processors, drafter.criteria, config, False, streamer, **kwargs
            )
            rounds.finish(output if isinstance(output, Tensor) else output.sequences)
        else:
            stats.mode = "ragged"
            cache.answer = engine.prefill
            rows = Rows(input_ids, _ends(criteria, config, input_ids))
            choose = Chooser(
                processors,
                len(input_ids),
                config.do_sample,
                _noise_window(options, len(input_ids)),
            )
            decoding = options.decoding(engine, choose, rows, length, streamer, lookup)
            output = decoding.run(model, input_ids, config, kwargs)
            if _outlives(given, config):
                decoding.complete_cache(output)
            if config.return_dict_in_generate:
                output = GenerateDecoderOnlyOutput(sequences=output)
        length.end()
        agreed = options.policy.agreed
        options.draft_weights.measured(stats, agreed.right, agreed.tried)
        engine.clock.settle()
        stats.kv_cache_bytes, stats.host_kv_bytes = cache.nbytes, cache.host_nbytes
        stats.workspace_bytes += engine.workspace
        if _outlives(given, config):
            cache.to_dynamic(keep=engine.graphs is not None)
        stats.fetched_kv_bytes, stats.stored_kv_bytes = cache.link.fetched, cache.link.stored
        if config.return_dict_in_generate:
            setattr(output, CACHE, given)
        if engine.graphs is not None:
            stats = replace(stats, **engine.graphs.account())
            stats.eager_because = stats.eager_because or engine.graphs.failure
        stats.peak_memory_bytes = peak_memory_bytes(input_ids.device)
        options.stats = stats
    except BaseException:
        engine.release()  # whatever state it is in
        raise
    options.engines.put_back(engine)
    return output


def _lookup(model: Any, input_ids: Tensor, kwargs: dict[str, Any], chances: Chances) -> Lookup:
    """Where this call's rounds may find drafts: in what it is given of the prompt's text."""
    length, mask = input_ids.shape[1], kwargs.get("attention_mask")
    no_text = kwargs[CACHE].template._std_decode_visual[:, -length:]
    # What stands for a picture need not be a token that can be read without one.
    vocabulary = getattr(model.get_decoder().config, "vocab_size", math.inf)
    no_text = no_text | (input_ids < 0) | (input_ids >= vocabulary)
    if mask is not None:
        no_text |= mask[:, -length:] == 0
    return Lookup(input_ids, no_text, chances)


def _workload(options: Any, input_ids: Tensor, stats: DecodeStats) -> Workload:
    """A decoding step of this call, for the policy that chooses draft lengths."""
    return replace(
        options.workload,
        batch=len(input_ids),
        context=stats.prompt_tokens,
        draft_keys=stats.selected_keys,
        draft_weight_bytes=options.workload.draft_weight_bytes if stats.draft_weights else None,
    )


def _outlives(cache: DynamicCache, config: GenerationConfig) -> bool:
    """Whether someone may look at the cache after the call."""
    return config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)


def _noise_window(options: Any, batch: int) -> int:
    least = options.policy.most + 1
    return least if batch == 1 else max(NOISE_WINDOW, least)


def _ends(criteria: StoppingCriteriaList, config: GenerationConfig, input_ids: Tensor) -> Ends:
    longest = min(c.max_length for c in criteria if isinstance(c, MaxLengthCriteria))
    tokens = [c.eos_token_id.flatten() for c in criteria if hasattr(c, "eos_token_id")]
    return Ends(
        most_steps=max(1, longest - input_ids.shape[1]),  # generate never stops before the first
        tokens=torch.cat(tokens).to(input_ids.device) if tokens else None,
        pad=config._pad_token_tensor.to(input_ids.device) if tokens else None,
        strings=tuple(c for c in criteria if isinstance(c, StopStringCriteria)),
    )


def _engine(
    model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, kwargs: dict[str, Any]
) -> Engine:
    """The passes of this call, and room for its tokens."""
    options = model._std_decode
    given, mask = kwargs[CACHE], kwargs.get("attention_mask")
    past, new = prompt_parts(given, input_ids, mask, config)
    kv_start, order = masked(mask), holes_first(mask)
    promise, because = options.promises.of_call(
        model, options.tried, len(input_ids), holes=order is not None, fused=options.fused
    )
    selection = None
    if options.policy.most > 0:
        visual = _visual(model, input_ids, past, new, kwargs)  # not looked up either
        voters = new
        if order is not None:
            visual, voters = visual.gather(1, order), newest_run(mask).clamp(max=new)
        if options.policy.lengths:
            selection = plan_selection(visual, kv_start, options.top_k_keys, voters)
    offloads = options.kv_cache == "offloaded" or given.offloading
    fused, layers = options.fused.of_call(model, promise)
    if offloads:
        fused, layers = None, dict(fused_layers=0, fused_layers_because=OFFLOADED)
    twins, weights = options.draft_weights.of_call(model, len(input_ids))
    products = options.products.of_call()
    new_tokens = min(config.max_length - input_ids.shape[1], MOST_NEW_TOKENS)
    room = past + new + new_tokens + max(options.policy.most + 1, promise.rows)
    engine, eager_because = options.engines.take(
        model, input_ids.device, len(input_ids), past + new, room, selection, kv_start, offloads
    )
    try:
        if selection is not None and engine.graphs is not None:
            selection = selection.padded(engine.columns, engine.width)
        stats = DecodeStats(
            prompt_tokens=past + new,
            reused_tokens=past,
            selected_keys=selection.width if selection is not None else 0,
            eager_because=eager_because,
            promise=promise.kind,
            promise_because=because,
            tokens_per_pass=promise.rows,
            **weights,
            **layers,
        )
        if input_ids.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(input_ids.device)
        forward = MethodType(options.original_class.__call__, model)
        prompt = past + new if config.prefill_chunk_size is not None else 0
        engine.start(
            forward,
            given,
            kv_start,
            selection,
            stats,
            twins,
            order=order,
            promise=promise,
            fused=fused,
            prompt=prompt,
            products=products,
        )
    except BaseException:
        engine.release()  # an earlier call's buffers may be in it
        raise
    return engine


def _visual(model: Any, input_ids: Tensor, past: int, new: int, kwargs: dict[str, Any]) -> Tensor:
    """Which tokens of the prompt are visual, bool ``[B, past + new]``; noted on the cache."""
    options, given = model._std_decode, kwargs[CACHE]
    visual = visual_tokens(
        input_ids,
        model.config,
        kwargs.get("mm_token_type_ids"),
        visual_token_ids=options.visual_token_ids,
        visual_mask=options.visual_mask,
    )
    if input_ids.shape[1] == new and past:
        visual = torch.cat([_visual_past(given, past, visual), visual], dim=1)
    given._std_decode_visual = visual
    return visual


def _visual_past(cache: DynamicCache, past: int, like: Tensor) -> Tensor:
    """Which tokens of the caller's cache are visual, bool ``[B, past]``.

    An accelerated call leaves a note of it on the cache. Without one all count as visual: then
    the text among them competes with the video, and the new question is what votes.
    """
    noted = getattr(cache, "_std_decode_visual", None)
    if noted is None or len(noted) != len(like):
        return like.new_ones(len(like), past)
    noted = noted[:, :past].to(like.device)
    return torch.nn.functional.pad(noted, (0, past - noted.shape[1]))

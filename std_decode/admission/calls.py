"""Which calls of a patched model have to run as unpatched, and which in lockstep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AsyncTextIteratorStreamer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.cache_utils import LinearAttentionLayer
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StopStringCriteria,
)

from std_decode.admission import rope
from std_decode.admission.changes import training_part
from std_decode.admission.eligibility import CACHE_LAYERS
from std_decode.model.cache import CACHE, sliding_windows
from std_decode.model.recurrent import recurrent_modules
from std_decode.passes.promise import Promise
from std_decode.rounds.sampling import STATELESS, summing

_CRITERIA = {EosTokenCriteria, MaxLengthCriteria, StopStringCriteria}
_STREAMERS = {type(None), TextStreamer, TextIteratorStreamer, AsyncTextIteratorStreamer}


def fallback_reason(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: GenerationConfig,
    synced_gpus: bool,
    kwargs: dict[str, Any],
) -> str | None:
    """Why this generate call has to run as unpatched, or None."""
    training = training_part(model)
    reasons = {
        "the model is in training mode; call model.eval()": model.training,
        f"{training} is in training mode; call model.eval()": training is not None,
        "autocast is on; load the model in the dtype that is wanted": torch.is_autocast_enabled(
            input_ids.device.type
        ),
        "gradients are on; call generate under torch.no_grad(), which is its default": (
            torch.is_grad_enabled()
        ),
        "use_cache is off": not kwargs.get("use_cache"),
        "attentions or hidden states are returned": config.output_attentions
        or config.output_hidden_states,
        "the model is the assistant of another": config.is_assistant,
        "generate is synchronised across GPUs (FSDP or DeepSpeed)": synced_gpus,
        "the prompt is given as inputs_embeds": input_ids.shape[1] == 0
        or kwargs.get("inputs_embeds") is not None,
        "generate made no position_ids": kwargs.get("position_ids") is None,
        # PEFT does it for prefix tuning, prompt tuning and their kin, which put keys of their own
        # before the prompt's.
        "prepare_inputs_for_generation was replaced": "prepare_inputs_for_generation"
        in vars(model),
    }
    for reason, applies in reasons.items():
        if applies:
            return reason
    cache, mask = kwargs.get(CACHE), kwargs.get("attention_mask")
    unsuitable = _cache_reason(model, cache, len(input_ids))
    if unsuitable is not None:
        return unsuitable
    past, new = prompt_parts(cache, input_ids, mask, config)
    if new < 1:
        return "the cache given already holds the whole prompt"
    if mask is not None and mask.shape != (len(input_ids), past + new):
        return "the attention mask does not fit the prompt and the cache given"
    if mask is not None and not _ends_with_ones(mask):
        return "the attention mask is not made of zeros and ones, the last of every row a one"
    if any(sliding_windows(model.get_decoder().config)) and holes_first(mask) is not None:
        return "the attention mask has holes, which count in the model's sliding windows"
    chunk = config.prefill_chunk_size
    if past and chunk is not None and CACHE != "cache":
        return "this transformers reads a prompt in chunks as though the cache given were empty"
    first = new if chunk is None else max(1, min(new, chunk))
    if not _rope_is_constant(model, past, first, new, input_ids, config, kwargs["position_ids"]):
        return "the model's RoPE depends on the sequence length, and changes within this call"
    return model._std_decode.tried.reason(model, len(input_ids))


def _cache_reason(model: PreTrainedModel, cache: Any, batch: int) -> str | None:
    if type(cache) is not DynamicCache:
        return "the cache is not a plain DynamicCache"
    if cache.offloading and any(sliding_windows(model.get_decoder().config)):
        return "the cache is offloaded, and the model has sliding windows"
    kinds = [type(layer) for layer in cache.layers]
    if not set(kinds) <= CACHE_LAYERS:
        return "the cache given has layers of another kind than DynamicCache makes"
    if not cache.get_seq_length():
        return None
    windows = sliding_windows(model.get_decoder().config)
    for layer, window in zip(cache.layers, windows):
        if getattr(layer, "sliding_window", window) != window:
            return "the cache given has other sliding windows than the model"
    states = [layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer)]
    keys = [layer for layer in cache.layers if layer not in states]
    if len(states) != len(recurrent_modules(model.get_decoder())):
        return "the cache given has no state for each of the model's layers that keep one"
    if any(x.record_past or not x.has_previous_state[0] for x in states):
        return "the cache given has states that are to be taken back, or none"
    lengths = {layer.get_seq_length() for layer in keys}
    if len(cache.layers) != len(windows) or len(lengths) != 1:
        return "the layers of the cache given are not equally long, one for each of the model's"
    rows = {x.keys.shape[0] for x in keys} | {x.conv_states[0].shape[0] for x in states}
    if rows != {batch}:
        return "the cache given has another batch size than the prompt"
    return None


def prompt_parts(
    cache: DynamicCache, input_ids: Tensor, mask: Tensor | None, config: GenerationConfig
) -> tuple[int, int]:
    """How many tokens of the prompt the cache holds, and how many are still to be read.

    `input_ids` are all of them or the latter alone, which generate tells by the mask's length.
    """
    past, given = cache.get_seq_length(), input_ids.shape[1]
    masked = mask.shape[1] if mask is not None else getattr(config, "_mask_length", -1)
    return past, given - past if masked == given else given


def lockstep_reason(
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: Any,
    promise: Promise,
) -> str | None:
    """Why the rows of a batch have to advance together, or None.

    Everything that sees the steps one by one, and might make something of their order, has to be
    code that is known not to.
    """
    unknown = [type(p).__name__ for p in processors if type(p) not in STATELESS]
    unknown += [type(c).__name__ for c in criteria if type(c) not in _CRITERIA]
    longest = [c.maximum_token_len for c in criteria if isinstance(c, StopStringCriteria)]
    sampling = config.do_sample
    summed = [] if promise.kind == "rounded" else summing(processors)
    reasons = {
        f"{', '.join(summed)} sum over the vocabulary, and round by the number of rows": summed,
        f"{', '.join(unknown)} may depend on the order of calls": unknown,
        "scores or logits are returned": config.return_dict_in_generate
        and (config.output_scores or config.output_logits),
        "a streamer takes the tokens of a batch": streamer is not None and len(input_ids) > 1,
        "the streamer is not one of transformers' and may use random numbers": sampling
        and type(streamer) not in _STREAMERS,
        "nothing limits the length": not any(isinstance(c, MaxLengthCriteria) for c in criteria),
        "a stop string is longer than the prompt": max(longest, default=0) > input_ids.shape[1],
        f"the random numbers of {input_ids.device.type} cannot be drawn ahead": sampling
        and input_ids.device.type not in ("cpu", "cuda"),
        "input_ids are not int64": input_ids.dtype != torch.int64,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _ends_with_ones(mask: Tensor) -> bool:
    return bool(((mask[:, -1] == 1).all() & ((mask == 0) | (mask == 1)).all()))


def masked(mask: Tensor | None) -> Tensor | None:
    """How many tokens of each row are masked, int32 ``[B]``; None where none is."""
    if mask is None or bool(mask.all()):
        return None
    return (mask == 0).sum(dim=1, dtype=torch.int32)


def holes_first(mask: Tensor | None) -> Tensor | None:
    """The order of each row's tokens that has the masked ones first, ``[B, S]``.

    None where they are first already. The others stay in order, and rotated as they are: where a
    key lies tells attention nothing but who may see it.
    """
    if mask is None or bool((mask[:, 1:] >= mask[:, :-1]).all()):
        return None
    return mask.int().argsort(dim=1, stable=True)


def newest_run(mask: Tensor) -> Tensor:
    """How many tokens at the end of each row no hole comes between, ``[B]``."""
    return mask.flip(1).int().cumprod(dim=1).sum(dim=1)


def _rope_is_constant(
    model: PreTrainedModel,
    past: int,
    first: int,
    new: int,
    input_ids: Tensor,
    config: GenerationConfig,
    position_ids: Tensor,
) -> bool:
    """Whether a token's rotation cannot depend on what it is fed with, or on what was before.

    Args:
        first: of the `new` tokens, those that the first pass reads.
    """
    decoder = model.get_decoder()
    if not rope.follows_length(decoder):
        return True
    # The caller's own positions, or those of a video, may be ahead of the number of tokens. Of the
    # positions on several axes (Qwen-VL's) RoPE may go by any.
    prompt = position_ids[..., -new:]
    prefill, step = (
        torch.atleast_2d(part).flatten(-2).amax(-1)
        for part in (prompt[..., :first], prompt[..., -1:])
    )
    shortest = min(past + first, int(prefill.min()) + 1, int(step.min()) + 2)
    read = max(0, config.max_length - input_ids.shape[1] - 1)  # new ones; the last never is
    longest = max(past + new, int(position_ids.max()) + 1) + read
    return rope.is_constant(decoder, past, shortest, longest)

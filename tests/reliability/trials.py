"""Random generate calls, each made unpatched and patched: a tiny model, a prompt, and options."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import std_decode
from std_decode import generation
from std_decode.model import cache
from std_decode.passes import engine, graphs, pool
from std_decode.rounds import rows as rows_module
from std_decode.rounds.policy import FixedLength
from tests.decode.families import FAMILIES, IMAGE, PAD, TEXT, VIDEO, VISION_END, VISION_START
from tests.decode.margin import behind_best, near_ties
from tests.decode.observers import Streams, Watches
from tests.decode.recorder import Recording

# What a prompt is made of: ("text", tokens), ("video", frames, height, width) or
# ("image", height, width), sizes in pairs of patches.
Segment = tuple

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
VISUAL = (*QWEN, "llava_onevision", "internvl")
# Models of text alone, to which tokens of two ids are said to be visual.
TEXTUAL = ("llama", "mistral", "gemma2", "gemma3", "gpt_oss")
FIXED_LAYERS = ("gemma2", "gemma3", "gpt_oss")  # sliding windows in some of three
PIXELS = 16  # of a token of the families whose pictures have one size


@dataclass(frozen=True)
class Trial:
    """One random case; its repr is all that is needed to run it again.

    Attributes:
        weights: seed of the model's.
        rows: the segments of each row's prompt.
        padding: more of it on the left than the shortest rows need, in every row.
        holes: share of the mask's ones that are zeros instead; never the last of a row, nor what
            Qwen-VL numbers tokens by, nor in families with sliding windows.
        schedule: seed of the draft length of each round; None: always `most_drafts`.
        most_drafts: of a round, or "auto": by the clock.
        selection: "best" keys, "random" ones, "none", or those "beside" the best.
        ends: steps at which rows would end by an EOS id, from the first row on.
        options: of generate.
        watched: what sees each step: "processor", "criterion", "scores", "streamer" or nothing.
        captured: whether passes are captured and replayed (by the stand-in of recorder.py).
        small: whether buffers begin small, so that they have to grow in mid-answer.
        calls: one after the other, the second with another text and no new seed.
        reproducible, prompt_lookup: as `patch` has them.
    """

    family: str
    layers: int
    kv_heads: int
    weights: int
    rows: tuple[tuple[Segment, ...], ...]
    padding: int
    holes: float
    schedule: int | None
    most_drafts: int | str
    top_k_keys: int
    reselect: bool
    selection: str
    draft_weights: str | None
    new_tokens: int
    ends: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]
    watched: str
    captured: bool
    small: bool
    calls: int
    seed: int
    dtype: str = "float32"
    reproducible: Any = "auto"
    prompt_lookup: Any = "auto"


# One to vary by hand.
BASE = Trial(
    family="qwen2_vl",
    layers=2,
    kv_heads=2,
    weights=1,
    rows=((("text", 5), ("video", 4, 3, 3), ("text", 6)),),
    padding=0,
    holes=0.0,
    schedule=None,
    most_drafts=4,
    top_k_keys=4,
    reselect=True,
    selection="best",
    draft_weights=None,
    new_tokens=16,
    ends=(),
    options=(("do_sample", False),),
    watched="",
    captured=False,
    small=False,
    calls=1,
    seed=1,
)


@dataclass(frozen=True)
class Outcome:
    """Of one trial.

    Attributes:
        ties: (call, row, step) where rounding decided otherwise, see margin.py.
        tokens: compared, of all rows.
        as_unpatched: whether bit for bit the unpatched model's were promised.
    """

    ties: tuple[tuple[int, int, int], ...]
    tokens: int
    rounds: int
    drafted: int
    accepted: int
    lockstep: bool
    as_unpatched: bool


# --- how trials are drawn ---

_text = st.tuples(st.just("text"), st.integers(1, 40))
_video = st.tuples(st.just("video"), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
_image = st.tuples(st.just("image"), st.integers(1, 3), st.integers(1, 3))
_row = st.lists(st.one_of(_text, _video, _image), min_size=1, max_size=5).map(tuple)

PROCESSORS = (
    dict(repetition_penalty=1.3),
    dict(no_repeat_ngram_size=2),
    dict(min_new_tokens=5),
    dict(bad_words_ids=[[9], [10, 11], [50, 60]]),
    dict(suppress_tokens=list(range(7, 60))),
    dict(begin_suppress_tokens=[20, 21, 22]),
    dict(sequence_bias=[[[9], 2.0], [[12, 13], -3.0]]),
    dict(renormalize_logits=True),
    dict(remove_invalid_values=True),
)
WARPERS = (
    dict(temperature=0.6),
    dict(temperature=1.7),
    dict(top_k=5),
    dict(top_p=0.8),
    dict(min_p=0.05),
    dict(typical_p=0.9),
    dict(epsilon_cutoff=1e-3),
    dict(eta_cutoff=1e-3),
)


def _options(sampled: bool, processors: list[dict], warpers: list[dict]) -> tuple:
    chosen: dict[str, Any] = {"do_sample": sampled}
    for more in (*processors, *(warpers if sampled else ())):
        chosen |= more
    return tuple(chosen.items())


@st.composite
def trials(draw: Any, dtype: str = "float32") -> Trial:
    """A hypothesis strategy."""
    family = draw(st.sampled_from((*VISUAL, *TEXTUAL)))
    count = draw(st.sampled_from((1, 1, 2, 3, 4)))
    watched = draw(st.sampled_from(("", "", "", "processor", "criterion", "scores", "streamer")))
    if watched == "streamer":
        count = 1  # plain generate takes no streamer for a batch
    schedule = draw(st.one_of(st.none(), st.integers(0, 2**16)))
    most_drafts: Any = draw(st.sampled_from((1, 2, 3, 4, 5, 6, 7, 12, 20)))
    if schedule is None and draw(st.integers(0, 5)) == 0:
        most_drafts = "auto"
    reproducible = "auto"
    if dtype != "float32" and draw(st.integers(0, 2)) == 0:
        reproducible = True if most_drafts == "auto" else draw(st.integers(most_drafts + 1, 24))
    return Trial(
        family=family,
        layers=3 if family in FIXED_LAYERS else draw(st.integers(1, 3)),
        kv_heads=draw(st.sampled_from((1, 2, 4))),
        weights=draw(st.integers(0, 7)),
        rows=tuple(draw(_row) for _ in range(count)),
        padding=draw(st.sampled_from((0, 0, 0, 1, 17))),
        holes=draw(st.sampled_from((0.0, 0.0, 0.0, 0.05, 0.5))),
        schedule=schedule,
        most_drafts=most_drafts,
        top_k_keys=draw(st.sampled_from((1, 2, 4, 8, 20, 50, 10_000))),
        reselect=draw(st.booleans()),
        selection=draw(st.sampled_from(("best", "best", "random", "none", "beside"))),
        draft_weights=draw(st.sampled_from((None, None, None, "int4"))),
        new_tokens=draw(st.sampled_from((1, 2, 5, 16, 24, 32, 40, 48))),
        ends=tuple(draw(st.lists(st.integers(0, 47), max_size=count))),
        options=_options(
            draw(st.booleans()),
            draw(st.lists(st.sampled_from(PROCESSORS), max_size=2)),
            draw(st.lists(st.sampled_from(WARPERS), max_size=2)),
        ),
        watched=watched,
        captured=draw(st.sampled_from((False, False, False, False, False, True))),
        small=draw(st.sampled_from((False, False, True))),
        calls=draw(st.sampled_from((1, 1, 2))),
        seed=draw(st.integers(0, 2**16)),
        dtype=dtype,
        reproducible=reproducible,
        prompt_lookup=draw(st.sampled_from(("auto", True, True))),
    )


# --- models and prompts ---


@lru_cache(maxsize=24)
def model_of(family: str, layers: int, kv_heads: int, weights: int, dtype: str = "float32") -> Any:
    # A vocabulary of whole groups, so that the LM head can have a 4-bit copy.
    sizes = dict(num_hidden_layers=layers, num_key_value_heads=kv_heads, vocab_size=128)
    torch.manual_seed(weights)
    with mock.patch.dict(TEXT, sizes):
        model, _ = FAMILIES[family].build(1)
    return model.to(getattr(torch, dtype)).eval()


def prompt_of(trial: Trial, seed: int) -> dict[str, Tensor]:
    """What a processor would give: token ids, left-padded, and pixels; and holes in the mask."""
    torch.manual_seed(seed)
    make = _qwen if trial.family in QWEN else _one_size
    texts, more = make(trial)
    length = max(map(len, texts)) + trial.padding
    ids = torch.tensor([[PAD] * (length - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (length - len(text)) + [1] * len(text) for text in texts])
    if trial.holes and trial.family not in FIXED_LAYERS:
        holes = torch.rand(mask.shape) < trial.holes
        holes[:, -1] = False
        mask[holes & ((ids < 99) | torch.tensor(trial.family not in QWEN))] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, **more}
    kind = getattr(torch, trial.dtype)
    for name, value in inputs.items():
        inputs[name] = value.to(kind) if value.is_floating_point() else value
    if trial.family in QWEN:
        inputs["mm_token_type_ids"] = (ids == VIDEO).int() * 2 + (ids == IMAGE).int()
    return inputs


def _words(count: int) -> list[int]:
    return torch.randint(7, 99, (count,)).tolist()


def _qwen(trial: Trial) -> tuple[list[list[int]], dict[str, Tensor]]:
    texts, videos, images = [], [], []
    for row in trial.rows:
        text: list[int] = []
        for kind, *size in row:
            if kind == "text":
                text += _words(*size)
                continue
            frames, (height, width) = (size[0] if kind == "video" else 1), size[-2:]
            (videos if kind == "video" else images).append((frames, 2 * height, 2 * width))
            each = [VIDEO if kind == "video" else IMAGE] * (height * width)
            if kind == "video" and trial.family == "qwen3_vl":  # a time stamp before each frame
                for _ in range(frames):
                    text += _words(2) + [VISION_START] + each + [VISION_END]
            else:
                text += [VISION_START] + each * frames + [VISION_END]
        texts.append(text)
    inputs: dict[str, Tensor] = {}
    for name, pixels, grids in (
        ("video_grid_thw", "pixel_values_videos", videos),
        ("image_grid_thw", "pixel_values", images),
    ):
        if grids:
            inputs[name] = torch.tensor(grids)
            inputs[pixels] = torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * 16)
    if videos and trial.family == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.ones(len(videos))
    return texts, inputs


def _one_size(trial: Trial) -> tuple[list[list[int]], dict[str, Tensor]]:
    """LLaVA-OneVision's videos of two frames, InternVL's images, and text as if it were either."""
    texts, shown = [], 0
    for row in trial.rows:
        text: list[int] = []
        for kind, *size in row:
            if kind == "text":
                text += _words(*size)
            elif trial.family == "llava_onevision":
                text += [VIDEO] * (2 * PIXELS + 1)
                shown += 1
            elif trial.family == "internvl":
                text += [IMAGE] * PIXELS
                shown += 1
            else:
                tokens = size[0] * size[1] * (size[2] if kind == "video" else 1)
                text += [VIDEO if kind == "video" else IMAGE] * tokens
        texts.append(text)
    if not shown:
        return texts, {}
    if trial.family == "llava_onevision":
        return texts, {"pixel_values_videos": torch.randn(shown, 2, 3, 32, 32)}
    return texts, {"pixel_values": torch.randn(shown, 3, 32, 32)}


# --- what surrounds a call ---


class Schedule(FixedLength):
    """Another draft length each round."""

    def __init__(self, seed: int, most: int, looks_up: bool):
        super().__init__(most, looks_up)
        self.random = random.Random(seed)

    def choose(self, rows: Any, found: Any = None) -> int:
        gamma = self.random.randint(0, self.most)
        return -gamma if found is not None and self.random.random() < 0.7 else gamma


class Listens(StoppingCriteria):
    """Not one of transformers' own, so the batch goes in lockstep. Remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.calls.append(input_ids.clone())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def watching(watched: str) -> tuple[dict[str, Any], Any]:
    """Options of generate, and who remembers the calls."""
    seen: Any = None
    if watched == "streamer":
        seen = Streams()
        return {"streamer": seen}, seen
    if watched == "scores":
        return {"return_dict_in_generate": True, "output_scores": True}, seen
    if watched == "processor":
        seen = Watches()
        return {"logits_processor": LogitsProcessorList([seen])}, seen
    if watched == "criterion":
        seen = Listens()
        return {"stopping_criteria": StoppingCriteriaList([seen])}, seen
    return {}, seen


def spoiled(select: Any, how: str, seed: int) -> Any:
    """`select_topk` whose indices are others: drafts get worse, and nothing else may."""
    generator = torch.Generator().manual_seed(seed)

    def chosen(scores: Tensor, k: int, **rules: Tensor) -> Tensor:
        best = select(scores, k, **rules)
        if how == "none":
            return torch.full_like(best, -1)
        if how == "random":
            # Any positions that are no padding, as many as there are and never more than k.
            allowed = (rules["candidates"] | rules["always"])[:, None]
            chance = torch.rand(scores.shape, generator=generator)
            return select(chance.masked_fill(chance < 0.3, float("-inf")), k, candidates=(
                allowed[:, 0]))  # fmt: skip
        first = (rules["candidates"] | rules["always"]).int().argmax(-1)[:, None, None]
        return torch.where(best >= 0, torch.maximum(best - 1, first), best)

    return chosen


@contextmanager
def surroundings(trial: Trial) -> Iterator[None]:
    with ExitStack() as stack:
        put = mock.patch.object
        if trial.selection != "best":
            select = spoiled(engine.select_topk, trial.selection, trial.seed)
            stack.enter_context(put(engine, "select_topk", select))
        if trial.captured:
            stack.enter_context(put(graphs, "unavailable", lambda devices: None))
            stack.enter_context(put(graphs, "capture", Recording()))
            stack.enter_context(put(pool, "bucket", lambda tokens: tokens))
        if trial.small:
            stack.enter_context(put(cache, "BUCKET", 16))
            stack.enter_context(put(generation, "MOST_NEW_TOKENS", 4))
            stack.enter_context(put(rows_module, "MOST_NEW_TOKENS", 4))
        yield


# --- the question ---


def options_of(trial: Trial, model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Of generate, with the EOS ids that end rows where the trial says."""
    options = {**dict(trial.options), "max_new_tokens": trial.new_tokens, "pad_token_id": PAD}
    if trial.ends:
        torch.manual_seed(trial.seed)
        told = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        steps = [min(step, told.shape[1] - 1) for step in trial.ends]
        options["eos_token_id"] = [int(told[row, step]) for row, step in enumerate(steps)]
    return options


def run(trial: Trial) -> Outcome:
    """Generate both ways.

    Raises:
        AssertionError: the tokens differ where no near tie excuses it, or what else a caller sees.
    """
    model = model_of(trial.family, trial.layers, trial.kv_heads, trial.weights, trial.dtype)
    prompts = [prompt_of(trial, trial.seed + call) for call in range(trial.calls)]
    options = options_of(trial, model, prompts[0])
    plain, states, after = _unpatched(trial, model, prompts, options)
    ours, stats, state = _patched(trial, model, prompts, options)
    promises = [one.promise for one in stats]
    rows = max(one.tokens_per_pass for one in stats)
    if rows:
        dense = replace(trial, schedule=None, most_drafts=0, reproducible=rows)
        others, _, after = _patched(dense, model, prompts, options)
        plain = [
            text if promise == "unpatched" else other
            for text, other, promise in zip(plain, others, promises)
        ]
    ties: list[tuple[int, int, int]] = []
    for call, ((expected, calls), (got, seen)) in enumerate(zip(plain, ours)):
        torch.set_rng_state(states[call])
        if trial.dtype != "float32":
            assert promises[call] != "rounded", stats[call].promise_because
            assert torch.equal(expected, got), f"call {call}: other tokens, {promises[call]}"
        found = _compare(model, prompts[call], options, expected, got)
        ties += [(call, row, step) for row, step in sorted(found)]
        if found:
            break  # other random numbers from here on, and other calls
        assert len(calls) == len(seen) and all(map(_same, calls, seen)), "other calls were seen"
    else:
        assert torch.equal(after, state), "the generator was left in another state"
    width = sum(expected.numel() - prompt["input_ids"].numel()
                for (expected, _), prompt in zip(plain, prompts))  # fmt: skip
    return Outcome(
        tuple(ties),
        width,
        sum(one.rounds for one in stats),
        sum(one.drafted for one in stats),
        sum(one.accepted for one in stats),
        stats[0].mode == "lockstep",
        set(promises) == {"unpatched"},
    )


def _unpatched(
    trial: Trial, model: Any, prompts: list, options: dict
) -> tuple[list, list[Tensor], Tensor]:
    plain, states = [], []
    torch.manual_seed(trial.seed)
    for inputs in prompts:
        states.append(torch.get_rng_state())
        plain.append(_generate(model, inputs, options, trial.watched))
    return plain, states, torch.get_rng_state()


def _generate(model: Any, inputs: Any, options: Any, watched: str) -> tuple[Tensor, list]:
    more, seen = watching(watched)
    output = model.generate(**inputs, **options, **more)
    calls = getattr(seen, "calls", [])
    if watched == "scores" and model.dtype != torch.float32:
        calls = list(output.scores)  # every bit of them
    return getattr(output, "sequences", output), calls


def _patched(trial: Trial, model: Any, prompts: list, options: dict) -> tuple[list, list, Tensor]:
    patch: dict[str, Any] = dict(
        draft_length=trial.most_drafts,
        top_k_keys=trial.top_k_keys,
        reselect=trial.reselect,
        draft_weights=trial.draft_weights,
        reproducible=trial.reproducible,
        prompt_lookup=trial.prompt_lookup if trial.most_drafts else "auto",
    )
    if trial.family in TEXTUAL:
        patch["visual_token_ids"] = [VIDEO, IMAGE]
    outputs, stats = [], []
    with std_decode.patched(model, **patch), ExitStack() as stack:
        if trial.draft_weights:  # changed layers are tried again, with a selection that is sound
            model.generate(**prompts[0], max_new_tokens=1, pad_token_id=PAD)
        stack.enter_context(surroundings(trial))
        if trial.schedule is not None:
            model._std_decode.policy = Schedule(
                trial.schedule, int(trial.most_drafts), trial.prompt_lookup is True
            )
        torch.manual_seed(trial.seed)
        for inputs in prompts:
            outputs.append(_generate(model, inputs, options, trial.watched))
            stats.append(std_decode.last_stats(model))
            assert stats[-1].fallback is None, stats[-1].fallback
        state = torch.get_rng_state()
    return outputs, stats, state


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def _compare(model: Any, inputs: Any, options: Any, expected: Tensor, got: Tensor) -> set:
    if torch.equal(expected, got):
        return set()
    state = torch.get_rng_state()
    full = model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
    noise: Any = None
    if options["do_sample"]:
        torch.set_rng_state(state)
        noise = [torch.empty_like(scores).exponential_(1) for scores in full.scores]
    return near_ties(
        expected,
        got,
        inputs["input_ids"].shape[1],
        lambda step: behind_best(full.scores[step], noise and noise[step]),
        ends=options.get("eos_token_id", ()),
        pad=PAD,
    )

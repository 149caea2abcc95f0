"""Train the demo model from nothing: ``python -m std_decode.demo.train --help``.

The curriculum goes from short clips to long ones. Two things make the model good at clips far
longer than a batch can hold. The seconds' temporal positions are spread at random over a longer
range of position ids, so that no distance is new to it; and each idle second then counts in every
softmax as often as the range is longer, so that an event stands out among as many idle seconds as
in a real clip of that length. To scale up, add stages; to go on after an interruption, run the
same command again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import repeat

from std_decode.demo import camera
from std_decode.demo.model import (
    FOLDER,
    VIDEO_TOKEN,
    load_model,
    new_model,
    new_tokenizer,
    patchify,
    prompt,
)

if TYPE_CHECKING:
    from transformers import Qwen2VLForConditionalGeneration


@dataclass(frozen=True)
class Stage:
    """`updates` batches of clips of up to `seconds`, their positions spread over up to `reach`."""

    updates: int
    seconds: int
    reach: int


CURRICULUM = (
    Stage(1600, 16, 16),
    Stage(1200, 32, 64),
    Stage(1800, 64, 1024),
    Stage(1200, 256, 4096),
    Stage(600, 512, 8192),
)
SAVE_EVERY = 100  # updates
TOKENS_A_BATCH = 5000
MAX_BATCH, MAX_EVENTS = 16, 16
WARM_UP, DECAY = 100, 0.3  # updates, and the share of the run in which the rate falls


def learning_rate(update: int, updates: int, peak: float) -> float:
    """Warm-up, a plateau, then a linear fall over the last `DECAY` of the run."""
    fall = min(1.0, (updates - update) / (DECAY * updates))
    return peak * min(1.0, (update + 1) / WARM_UP) * max(0.03, fall)


def camera_noise(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sensor noise, and the shift of colours that a video codec leaves behind."""
    shift = rng.normal(0, 0.03, (len(pictures), 3, 1, 1))
    noise = rng.normal(0, 0.05, pictures.shape)
    return np.clip(pictures + shift + noise, 0, 1).astype(np.float32)


def spread_positions(
    input_ids: torch.Tensor, positions: torch.Tensor, seconds: int, span: int, rng
) -> torch.Tensor:
    """Move the seconds of each clip to sorted random places in a range of `span`.

    Args:
        input_ids: ``[B, S]``.
        positions: Qwen2-VL's own position ids, ``[3, B, S]``.
        span: at least `seconds`.

    Returns:
        ``[3, B, S]``: temporal ids of the video spread, the text after it moved behind the range.
    """
    positions = positions.clone()
    is_video = input_ids == VIDEO_TOKEN
    first = int(is_video[0].int().argmax())
    after = first + seconds * camera.TOKENS_PER_SECOND
    for row in range(len(input_ids)):
        base = int(positions[0, row, first])
        places = np.sort(rng.permutation(span)[:seconds])
        spread = torch.from_numpy(places).repeat_interleave(camera.TOKENS_PER_SECOND)
        positions[0, row, first:after] = base + spread
        text = torch.arange(input_ids.shape[1] - after)
        positions[:, row, after:] = base + span + text
    return positions


def weighted_causal_mask(clips: list[camera.Clip], first: int, length: int, span: int):
    """A causal mask in which each idle second counts as often as `span` is longer than the clip.

    Args:
        clips: of one length, one a row.
        first: position of the first video token.
        length: tokens of a row, S.

    Returns:
        float32 ``[B, 1, S, S]``, added to the attention logits: the log of the count, or -inf.
    """
    seconds = clips[0].seconds
    count = torch.ones(len(clips), length)
    for row, clip in enumerate(clips):
        idle = torch.ones(seconds, dtype=torch.bool)
        idle[[event.second for event in clip.events]] = False
        video = slice(first, first + seconds * camera.TOKENS_PER_SECOND)
        count[row, video][idle.repeat_interleave(camera.TOKENS_PER_SECOND)] = span / seconds
    unseen = torch.full((length, length), -torch.inf).triu(1)
    return count.log()[:, None, None, :] + unseen


def training_batch(model, tokenizer, stage: Stage, rng: np.random.Generator) -> dict:
    seconds = int(4 * math.exp(rng.random() * math.log(stage.seconds / 4)))
    most = min(seconds, MAX_EVENTS)
    events = int(max(rng.integers(1, most + 1, 2)))  # the larger of two: more to learn from
    length = seconds * camera.TOKENS_PER_SECOND + 5 * events + 12
    rows = max(1, min(MAX_BATCH, TOKENS_A_BATCH // length))
    clips = [camera.random_clip(seconds, events, rng) for _ in range(rows)]
    pictures = [camera_noise(camera.draw_seconds(clip), rng) for clip in clips]
    texts = [prompt(seconds, clip.first_tag) for clip in clips]
    answers = [camera.narration(clip) + "<eos>" for clip in clips]
    tokens = tokenizer(
        [text + answer for text, answer in zip(texts, answers)], return_tensors="pt"
    )
    input_ids = tokens["input_ids"]
    asked = len(tokenizer(texts[0])["input_ids"])
    labels = input_ids.clone()
    labels[:, :asked] = -100
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        "pixel_values_videos": torch.cat([patchify(torch.from_numpy(p)) for p in pictures]),
        "video_grid_thw": torch.tensor([[seconds, 4, 4]] * rows),
        "mm_token_type_ids": (input_ids == VIDEO_TOKEN).int() * 2,
    }
    positions, _ = model.model.get_rope_index(
        input_ids,
        video_grid_thw=batch["video_grid_thw"],
        mm_token_type_ids=batch["mm_token_type_ids"],
    )
    span = int(seconds * math.exp(rng.random() * math.log(stage.reach / seconds)))
    batch["position_ids"] = spread_positions(input_ids, positions, seconds, span, rng)
    first = int((input_ids[0] == VIDEO_TOKEN).int().argmax())
    batch["attention_mask"] = weighted_causal_mask(clips, first, input_ids.shape[1], span)
    return batch


def widened(model: Qwen2VLForConditionalGeneration) -> Qwen2VLForConditionalGeneration:
    """The same function with the KV heads of `new_model`: copies of `model`'s, until trained."""
    text = model.config.text_config
    wide, state = new_model(), model.state_dict()
    copies = wide.config.text_config.num_key_value_heads // text.num_key_value_heads
    width = text.hidden_size // text.num_attention_heads
    for name, weight in state.items():
        if "language_model" in name and ("k_proj" in name or "v_proj" in name):
            state[name] = repeat(weight, "(h d) ... -> (h g d) ...", g=copies, d=width)
    wide.load_state_dict(state)
    return wide


@torch.no_grad()
def narrated_right(model, tokenizer, seconds: int, clips: int, seed: int, events: int = 8):
    """Share of colours and patterns narrated right, greedily, over `clips` unseen clips."""
    from std_decode.demo.model import generate_inputs

    rng, right = np.random.default_rng(seed), 0.0
    for _ in range(clips):
        clip = camera.random_clip(seconds, min(seconds, events), rng)
        pictures = camera_noise(camera.draw_seconds(clip), rng).repeat(2, axis=0)
        frames = (pictures.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
        inputs = generate_inputs(frames, clip.first_tag, tokenizer)
        told = model.generate(**inputs, max_new_tokens=5 * len(clip.events) + 8, do_sample=False)
        text = tokenizer.decode(told[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += camera.attributes_right(text, clip)
    return right / clips


def save(model, tokenizer, folder: Path) -> None:
    """Write model and tokenizer; the weights in bfloat16, as they were when measured."""
    stored = new_model()
    stored.load_state_dict(model.state_dict())
    stored.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(
    stages: tuple[Stage, ...],
    state_file: Path,
    seed: int,
    threads: int,
    peak: float = 1e-3,
    start: Path | None = None,
) -> None:
    """Train on `stages`, going on from `state_file` where it exists.

    Args:
        peak: learning rate.
        start: folder of a model to begin with; None: random weights.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = new_tokenizer()
    model = (new_model() if start is None else widened(load_model(start))).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    done, total = 0, sum(stage.updates for stage in stages)
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rng.bit_generator.state = json.loads(state["rng"])
        done = state["done"]
    bounds = np.cumsum([stage.updates for stage in stages])
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn())
    right_of_late = 0.5
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("training", total=total, completed=done)
        for update in range(done, total):
            stage = stages[int(np.searchsorted(bounds, update, side="right"))]
            batch = training_batch(model, tokenizer, stage, rng)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(update, total, peak)
            with torch.autocast("cpu", torch.bfloat16):
                output = model(**batch)
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            labels = batch["labels"][:, 1:]
            attribute = labels >= 32
            hits = output.logits[:, :-1].argmax(-1) == labels
            right_of_late += 0.02 * (hits[attribute].float().mean().item() - right_of_late)
            described = f"up to {stage.seconds} s, attributes {right_of_late:.1%}"
            progress.update(task, advance=1, description=described)
            if (update + 1) % SAVE_EVERY == 0 or update + 1 == total:
                progress.console.print(f"{update + 1} {described} loss {output.loss.item():.3f}")
                write_state(state_file, model, optimizer, rng, update + 1)


def write_state(state_file: Path, model, optimizer, rng, done: int) -> None:
    """Replace the state file in one step, so that a kill leaves the old one or the new one."""
    part = state_file.with_suffix(".part")
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": json.dumps(rng.bit_generator.state),
        "done": done,
    }
    torch.save(state, part)
    os.replace(part, state_file)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m std_decode.demo.train", description=__doc__)
    add = parser.add_argument
    add(
        "--state",
        type=Path,
        default=Path("demo-training.pt"),
        help="progress; an existing file is continued (default: %(default)s)",
    )
    add("--out", type=Path, default=FOLDER, help="folder for the model (default: the package's)")
    add("--seed", type=int, default=0, help="of weights and clips (default: %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    add(
        "--seconds",
        type=int,
        default=512,
        help="train on the stages up to clips of this length (default: %(default)s)",
    )
    add("--rate", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    add(
        "--start",
        type=Path,
        metavar="FOLDER",
        help="begin with the model in this folder, its KV heads copied where there are fewer, and "
        "train on the last of the stages alone",
    )
    add("--export", action="store_true", help="write the state's model, train nothing")
    options = parser.parse_args(argv)
    stages = tuple(stage for stage in CURRICULUM if stage.seconds <= options.seconds)
    if options.start is not None:
        stages = stages[-1:]
    if not options.export:
        train(stages, options.state, options.seed, options.threads, options.rate, options.start)
    model, tokenizer = new_model(), new_tokenizer()
    model.load_state_dict(torch.load(options.state, weights_only=True)["model"])
    model.to(torch.bfloat16).float().eval()
    for seconds, clips in ((32, 25), (256, 25), (1024, 10), (4096, 10)):
        right = narrated_right(model, tokenizer, seconds, clips, seed=10_000 + seconds)
        print(f"{seconds * camera.TOKENS_PER_SECOND} video tokens: {right:.1%} attributes right")
    save(model, tokenizer, options.out)


if __name__ == "__main__":
    main()

"""Clips for `bench selection`: read once, narrated again and again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

import std_decode
from bench.selection.rules import RULES
from bench.selection.trials import following
from std_decode.demo import camera
from std_decode.demo.model import VIDEO_TOKEN, generate_inputs, load_model, load_tokenizer
from std_decode.demo.train import camera_noise
from std_decode.model.cache import CACHE


class Narrator:
    """The demo model before one clip after the other.

    Attributes:
        at: video tokens and number of the clip that was read.
    """

    def __init__(self, folder: Path, events: int, draft_length: int):
        self.model, self.tokenizer = load_model(folder), load_tokenizer(folder)
        self.events, self.draft_length = events, draft_length
        self.at: tuple[int, int] | None = None

    def read(self, video_tokens: int, number: int) -> None:
        """Read the clip's prompt, and have the unpatched model narrate it."""
        rng = np.random.default_rng(number)
        seconds = video_tokens // camera.TOKENS_PER_SECOND
        clip = camera.random_clip(seconds, self.events, rng)
        pictures = camera_noise(camera.draw_seconds(clip), rng).repeat(2, axis=0)
        frames = (pictures.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
        inputs: dict[str, Any] = generate_inputs(frames, clip.first_tag, self.tokenizer)
        self.sampling = dict(do_sample=False, max_new_tokens=5 * self.events + 8)
        told = self.model.generate(**inputs, **self.sampling, return_dict_in_generate=True)
        ids = inputs["input_ids"]
        video_end = int((ids[0] == VIDEO_TOKEN).nonzero()[-1]) + 1
        layers = getattr(told, CACHE).layers
        self.video = [[x[:, :, :video_end].clone() for x in (y.keys, y.values)] for y in layers]
        del inputs["pixel_values_videos"]
        # Going on from a cache, Qwen2-VL would place the text elsewhere.
        positions, _ = self.model.model.get_rope_index(
            ids,
            video_grid_thw=inputs.pop("video_grid_thw"),
            mm_token_type_ids=inputs["mm_token_type_ids"],
        )
        text = torch.arange(ids.shape[1])[None, None]
        self.inputs = {**inputs, "position_ids": torch.cat([text, positions])}
        self.told = told.sequences
        answer = self.tokenizer.decode(self.told[0, ids.shape[1] :], skip_special_tokens=True)
        self.right = camera.attributes_right(answer, clip)
        self.at = (video_tokens, number)

    def narrate(self, name: str, top_k_keys: int) -> dict[str, Any]:
        """Figures of one run by the rule `name`."""
        rule = RULES[name]
        seen = DynamicCache()
        for index, (keys, values) in enumerate(self.video):
            seen.update(keys, values, index)
        options = dict(draft_length=self.draft_length, top_k_keys=top_k_keys)
        reselect = rule is None or rule.when != "never"
        with std_decode.patched(self.model, **options, reselect=reselect), following(rule):
            told = self.model.generate(**self.inputs, **self.sampling, **{CACHE: seen})
            stats = std_decode.last_stats(self.model)
        assert stats is not None and stats.fallback is None and stats.reused_tokens, stats
        stages = ("draft", "verify", "select")
        return {
            "tokens_per_pass": stats.mean_accepted_length,
            "acceptance": stats.acceptance_rate,
            "identical": torch.equal(told, self.told),
            "tokens": stats.emitted,
            "attributes_right": self.right,
            "draft_length": self.draft_length,
            "rounds": stats.rounds,
            "selections": stats.calls["select"],
            **{f"{s}_ms": 1e3 * stats.seconds[s] / max(1, stats.calls[s]) for s in stages},
        }

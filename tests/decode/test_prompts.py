"""Prompts of every layout, with real pixels: the same tokens, and what the drafts may read."""

import pytest
import torch

import std_decode
from std_decode.model import attention
from std_decode.passes.engine import Engine
from tests.decode.rules import rules

VIDEO, IMAGE, VISION_START, VISION_END, PAD = 101, 102, 103, 104, 0  # as in the models' configs
EVERY_KEY = 10_000

# What a row holds, in order: so many text tokens, a video of so many frames, an image.
V, F, P = "video 3", "video 1", "image"
LAYOUTS = {
    "two videos": [[6, V, 5, V, 7]],
    "two videos, nothing between": [[6, V, V, 7]],
    "video, image": [[6, V, 3, P, 7]],
    "image, video": [[6, P, 3, V, 7]],
    "frames as images": [[5, P, 2, P, 3, P, 8]],
    "frames as videos": [[5, F, 2, F, 3, F, 1, F, 8]],
    "long text before and after": [[30, V, 25]],
    "more text after than may vote": [[6, V, 80]],
    "no text after": [[6, V]],
    "no text before": [[V, 6]],
    "nothing but a video": [[V]],
    "text": [[100]],
    "text, all of it kept": [[50]],
    "fewer tokens than sinks": [[3]],
    "one token": [[1]],
    "text beside a video": [[75], [5, V, 6]],
    "all of it in one batch": [[5, V, 3, P, 7], [90], [4, V], [2], [12, P, 2, P, 4]],
}


def qwen2_vl(rows):
    """Token ids of each row and the pixels, as Qwen2-VL's processor gives them."""
    texts, pixels = [], {"image": [], "video": []}
    for row in rows:
        text = []
        for piece in row:
            if isinstance(piece, int):
                text += words(piece)
                continue
            kind, _, frames = piece.partition(" ")
            t, h, w = int(frames or 1), 4, 4 + 4 * (len(pixels[kind]) % 2)  # of various sizes
            pixels[kind].append((t, h, w))
            token = IMAGE if kind == "image" else VIDEO
            text += [VISION_START] + [token] * (t * h * w // 4) + [VISION_END]
        if text[-1] == VISION_END:
            text.pop()  # for a prompt that ends with a visual token
        texts.append(text)
    inputs = padded(texts)
    ids = inputs["input_ids"]
    inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels[kind]:
            inputs[f"{kind}_grid_thw"] = torch.tensor(pixels[kind])
            inputs[name] = torch.randn(sum(t * h * w for t, h, w in pixels[kind]), 3 * 2 * 16)
    return inputs


def llava_onevision(rows):
    """The same for LLaVA-OneVision: no token types, and an image alone is cut into patches."""
    texts, images, frames = [], [], []
    for row in rows:
        text, count = [], row.count(P)
        images.append(count)
        for piece in row:
            if isinstance(piece, int):
                text += words(piece)
            elif piece == P:
                # 8 x 8 patches and, alone, as many again in rows that end with a newline.
                text += [IMAGE] * (64 + 8 * 9 if count == 1 else 64 + 1)
            else:
                frames.append(int(piece.split()[1]))
                text += [VIDEO] * (frames[-1] * 16 + 1)
        texts.append(text)
    inputs = padded(texts)
    if any(images):
        inputs["pixel_values"] = torch.randn(sum(images), 2, 3, 32, 32)
        inputs["image_sizes"] = torch.tensor([[32, 32]] * sum(images))
        inputs["batch_num_images"] = torch.tensor(images)
    if frames:
        inputs["pixel_values_videos"] = torch.randn(len(frames), frames[0], 3, 32, 32)
    return inputs


BUILD = {"qwen2_vl": qwen2_vl, "llava_onevision": llava_onevision}


def words(count):
    return torch.randint(7, 99, (count,)).tolist()


def padded(texts):
    length = max(map(len, texts))
    ids = torch.tensor([[PAD] * (length - len(text)) + text for text in texts])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


@pytest.fixture
def layout_case(make_case):
    def make(family, layout):
        # The first token and two whole rounds, so that every draft can be kept.
        case = make_case(family, max_new_tokens=11)
        case.inputs = BUILD[family](LAYOUTS[layout])
        return case

    return make


class Watch:
    """What every draft of a call could read of the prompt, and who had voted for it."""

    def __init__(self, monkeypatch):
        self.indices, self.votes = [], []
        select, score = Engine.select, attention.score_keys

        def watched_select(engine, selection):
            select(engine, selection)
            layers = engine.cache.selecting_layers
            self.indices.append(torch.stack([layer.indices for layer in layers]).clone())

        def watched_score(query, *args, num_queries, **options):
            assert query.shape[2] >= num_queries.max()
            self.votes.append(num_queries.tolist())
            return score(query, *args, num_queries=num_queries, **options)

        monkeypatch.setattr(Engine, "select", watched_select)
        monkeypatch.setattr(attention, "score_keys", watched_score)

    def check(self, inputs, top_k_keys, **caps):
        """Fail unless it was what `rules` say, in every layer, KV head and round."""
        visual = (inputs["input_ids"] == VIDEO) | (inputs["input_ids"] == IMAGE)
        starts = (inputs["attention_mask"] == 0).sum(1).tolist()
        plans = [rules(v, s, **caps) for v, s in zip(visual.tolist(), starts)]
        assert self.votes == [[observers for _, _, observers in plans]] * 3  # once a layer
        length = visual.shape[1]
        # One width for all rows: those with less to keep in any case get more to choose.
        width = min(length, top_k_keys + max(len(always) for always, _, _ in plans))
        assert self.indices and all(i.shape == (3, len(plans), 2, width) for i in self.indices)
        for row, (always, candidates, _) in enumerate(plans):
            most = min(width - len(always), len(candidates))
            assert most >= min(top_k_keys, len(candidates))
            for chosen in torch.stack(self.indices)[:, :, row].flatten(0, 2).tolist():
                listed = chosen[: len(always) + most]
                assert listed == sorted(set(listed)) and set(listed) >= always
                assert set(listed) - always <= candidates
                assert chosen[len(listed) :] == [-1] * (width - len(listed))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", BUILD)
def test_layout(layout_case, monkeypatch, family, layout):
    case = layout_case(family, layout)
    caps = {}
    if layout.startswith("long"):  # in place of thousands of tokens
        monkeypatch.setattr("std_decode.model.selection_rules.MOST_KEPT_TEXT", 8)
        caps = dict(most_text=8)
    for do_sample in (False, True):
        expected = case.generate(do_sample=do_sample)
        for top_k_keys in (4, EVERY_KEY):
            options = dict(draft_length=4, top_k_keys=top_k_keys)
            with std_decode.patched(case.model, **options), monkeypatch.context() as patches:
                watch = Watch(patches)
                got = case.generate(do_sample=do_sample)
                stats = std_decode.last_stats(case.model)
            assert stats.fallback is None and stats.rounds > 0
            assert case.assert_same_tokens(expected, got, do_sample=do_sample) == set()
            watch.check(case.inputs, top_k_keys, **caps)
            if top_k_keys == EVERY_KEY:
                assert stats.accepted == stats.drafted > 0


@pytest.mark.parametrize("family", BUILD)
def test_pixels_count(layout_case, family):
    """Every piece of a layout reaches the text: the tests above are about the real thing."""
    case = layout_case(family, "video, image")
    plain = case.generate(output_logits=True, return_dict_in_generate=True).logits[0]
    for name in ("pixel_values", "pixel_values_videos"):
        pixels = case.inputs[name]
        case.inputs[name] = pixels + 1.0
        other = case.generate(output_logits=True, return_dict_in_generate=True).logits[0]
        case.inputs[name] = pixels
        assert (plain - other).abs().max() > 1e-3

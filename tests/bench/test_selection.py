"""`bench selection`: hooks that follow the library where they are to, and runs that go on."""

import json
from types import SimpleNamespace

import pytest
import torch

from bench.__main__ import main
from bench.selection.clips import Narrator
from bench.selection.rules import RULES
from bench.selection.trials import _Layer, _verify_with_rows, following
from std_decode.demo.model import FOLDER
from std_decode.model import attention, cache
from std_decode.model.cache import BufferLayer
from std_decode.passes import pool
from std_decode.passes.engine import Engine
from std_kernels import verify_attention, verify_attention_with_scores

LIBRARY = (attention.verify_attention_with_scores, cache.BufferLayer, pool.Engine)


@pytest.fixture(scope="module")
def narrator():
    narrator = Narrator(FOLDER, events=6, draft_length=4)
    narrator.read(128, 3)
    return narrator


def counts(figures):
    return {name: value for name, value in figures.items() if not name.endswith("_ms")}


def test_every_round_is_the_library_s_rule(narrator, monkeypatch):
    selected, select = [], Engine.select

    def note(self, selection):
        select(self, selection)
        selected.append(self.groups[0].indices.clone())

    monkeypatch.setattr(Engine, "select", note)
    ours = narrator.narrate("library", 16)
    theirs = narrator.narrate("every round", 16)
    assert counts(ours) == counts(theirs)
    half = len(selected) // 2  # patch selects too, to see that the model can be patched
    assert half >= ours["selections"] > 2
    for one, other in zip(selected[:half], selected[half:], strict=True):
        assert torch.equal(one, other)
    assert ours["selections"] == ours["rounds"] + 1
    assert LIBRARY == (attention.verify_attention_with_scores, cache.BufferLayer, pool.Engine)


def test_a_run_from_the_cache_is_the_whole_call(narrator):
    """The video is read once for all runs, which must not show in what is selected."""
    import numpy as np

    import std_decode
    from std_decode.demo import camera
    from std_decode.demo.model import generate_inputs
    from std_decode.demo.train import camera_noise

    rng = np.random.default_rng(3)
    clip = camera.random_clip(32, 6, rng)
    pictures = camera_noise(camera.draw_seconds(clip), rng).repeat(2, axis=0)
    frames = (pictures.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
    inputs = generate_inputs(frames, clip.first_tag, narrator.tokenizer)
    with std_decode.patched(narrator.model, draft_length=4, top_k_keys=16):
        told = narrator.model.generate(**inputs, **narrator.sampling)
        stats = std_decode.last_stats(narrator.model)
    figures = narrator.narrate("library", 16)
    assert figures["identical"] and torch.equal(told, narrator.told)
    assert figures["tokens_per_pass"] == stats.mean_accepted_length
    assert figures["acceptance"] == stats.acceptance_rate


@pytest.mark.parametrize("name", list(RULES))
def test_no_rule_changes_the_tokens(narrator, name):
    figures = narrator.narrate(name, 8)
    assert figures["identical"]
    rounds, selections = figures["rounds"], figures["selections"] - 1
    rare = {"static": 0, "alternate": rounds // 2}
    if name in rare or RULES[name] is None or RULES[name].when == "always":
        assert selections == rare.get(name, rounds)
    else:
        assert 0 < selections < rounds


@pytest.mark.parametrize("estimate", ["draft", "exact"])
def test_scores_of_rows_add_up_to_the_op_s(estimate):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, n, 32) for heads, n in ((4, 3), (2, 40), (2, 40)))
    kv_len = torch.tensor([37], dtype=torch.int32)
    layer = _Layer(None, None)
    layer.rule, layer.importance = (
        RULES[{"draft": "every round"}.get(estimate, estimate)],
        key[..., 0][..., :30],
    )
    layer.group = SimpleNamespace(estimate=torch.randn(1, 1, 4, 3))
    out, lse, rows = _verify_with_rows(query, key, value, kv_len, layer, scale=0.2)
    assert torch.equal(out, verify_attention(query, key, value, kv_len, scale=0.2)[0])
    if estimate == "draft":
        score_lse = BufferLayer.lse_estimate(layer)
        whole = verify_attention_with_scores(query, key, value, kv_len, score_lse, scale=0.2)
        torch.testing.assert_close(rows.sum(2), whole[2][..., :30])
    else:
        keys = key[:, :, :30].repeat_interleave(2, 1)
        expected = (0.2 * query @ keys.transpose(-1, -2) - lse[..., None]).exp()
        torch.testing.assert_close(rows, expected.unflatten(1, (2, 2)).sum(2))


@pytest.mark.parametrize(
    "rows, weighed",
    [("all", [0, 1, 2]), ("bonus", [2]), ("ends", [0, 2]), ("accepted", [0, 1]),
     ("accepted+bonus", [0, 1, 2]), ("newest", [1])],
)  # fmt: skip
def test_rows_that_count(rows, weighed):
    """Row t attends to key t alone; one of two drafts was accepted."""
    layer = _Layer(None, None)
    layer.rule = RULES["every round" if rows == "all" else rows]
    layer.importance, layer.row_scores = torch.zeros(1, 1, 5), torch.eye(3, 5)[None, None]
    layer.fold(1)
    assert layer.importance[0, 0].nonzero().flatten().tolist() == weighed


def test_smoothing():
    layer = _Layer(None, None)
    for name, expected in (("none", 0.0), ("0.8", 0.4), ("mean 0.8", 0.4)):
        layer.rule, layer.importance = RULES[name], torch.tensor([[[0.5, 0.0]]])
        layer.row_scores = torch.tensor([[[[0.0, 3.0]]]])
        layer.fold(0)
        new = 0.2 if name == "mean 0.8" else 1.0
        torch.testing.assert_close(layer.importance, torch.tensor([[[expected, new]]]))


def test_the_command_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    words = ["selection", "--video-tokens", "64", "--clips", "1", "--events", "2",
             "--top-k-keys", "8", "16", "--rules", "static", "library", "newest",
             "--rules-at", "16", "--out", str(tmp_path)]  # fmt: skip
    assert main(words) == 0
    lines = (tmp_path / "selection.jsonl").read_text().splitlines()
    assert [(r["rule"], r["top_k_keys"]) for r in map(json.loads, lines[1:])] == [
        ("static", 8), ("static", 16), ("library", 8), ("library", 16), ("newest", 16),
    ]  # fmt: skip
    first = (tmp_path / "selection.md").read_text()
    assert "5 of 5 runs gave the unpatched model's tokens" in first
    assert (tmp_path / "selection.png").read_bytes().startswith(b"\x89PNG")
    # Interrupted while writing the last line.
    (tmp_path / "selection.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    again, narrate = [], Narrator.narrate

    def note(self, *cell):
        again.append(cell)
        return narrate(self, *cell)

    monkeypatch.setattr(Narrator, "narrate", note)
    assert main(words) == 0
    assert again == [("newest", 16)]
    assert main([*words, "--draft-length", "2"]) == 0  # another setting begins anew
    assert len(again) == 1 + 5
    wrong = {**json.loads(lines[1]), "identical": False}
    monkeypatch.setattr(Narrator, "narrate", lambda *_: wrong)
    capsys.readouterr()
    assert main(words) == 1
    assert "not identical: 64 video tokens, clip 0, static, 8 keys" in capsys.readouterr().out


def test_what_cannot_run_says_so(tmp_path, capsys):
    assert main(["selection", "--checkpoint", str(tmp_path)]) == 2
    assert "holds no model.safetensors" in capsys.readouterr().err
    assert main(["selection", "--video-tokens", "64", "--events", "17"]) == 2
    assert "at most one a second of the shortest clip, 16" in capsys.readouterr().err


def test_following_leaves_static_and_library_alone():
    for name in ("static", "library"):
        with following(RULES[name]):
            assert LIBRARY == (
                attention.verify_attention_with_scores,
                cache.BufferLayer,
                pool.Engine,
            )

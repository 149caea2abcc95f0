"""Real processors, of real video files: the same tokens, with and without the patch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import std_decode
from std_decode.frames import read_video
from std_decode.inputs import InputError, check_packages, make_inputs, to_model
from tests.app.processors import PROCESSORS
from tests.decode.families import FAMILIES, IMAGE, VIDEO
from tests.video.test_frames import film, turned

pytestmark = pytest.mark.torchvision
# Frames, at which tenths of a second, and how many are asked for.
FILMS = {
    "even": (range(16), 8),
    "an odd number of frames": (range(7), 7),
    "one frame": (range(1), 4),
    "turned": (range(9), 5),
    "uneven": ([0, 1, 2, 5, 9, 10, 20, 21, 22, 40], 6),
}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    made = {}
    for name, (times, most) in FILMS.items():
        path = film(folder / f"{name}.mp4", times)
        made[name] = read_video(turned(path) if name == "turned" else path, most)
    return made


@pytest.fixture(scope="module")
def asked():
    """``asked(family)``: the tiny model and its processor, made once."""
    made = {}

    def ask(family):
        if family not in made:
            torch.manual_seed(0)
            model, _ = FAMILIES[family].build(1)
            made[family] = model.float().eval(), PROCESSORS[family]()
        return made[family]

    return ask


def test_the_films_are_what_they_are_called(films):
    assert {name: len(clip.frames) for name, clip in films.items()} == {
        "even": 8, "an odd number of frames": 7, "one frame": 1, "turned": 5, "uneven": 5
    }  # fmt: skip
    assert films["turned"].frames.shape[1:3] == (64, 48)
    assert films["even"].frames.shape[1:3] == (48, 64)
    steps = np.diff(films["uneven"].indices)
    assert len(set(steps.tolist())) > 1


@pytest.mark.parametrize("name", FILMS)
@pytest.mark.parametrize("family", PROCESSORS)
def test_the_same_answer_about_a_film(films, asked, family, name):
    model, processor = asked(family)
    if (family, name) == ("qwen3_vl", "one frame"):
        with pytest.raises(InputError, match="Qwen3VLProcessor cannot take this: t:1 must be"):
            make_inputs(processor, films[name], "Why?")
        return
    given = to_model(make_inputs(processor, films[name], "Why?"), model)
    ids = given["input_ids"]
    assert ((ids == VIDEO) | (ids == IMAGE)).sum() >= 16
    assert any(key.startswith("pixel_values") for key in given)
    for do_sample in (False, True) if name == "turned" else (False,):
        options = dict(max_new_tokens=16, do_sample=do_sample)
        torch.manual_seed(1)
        expected = model.generate(**given, **options)
        with std_decode.patched(model, draft_length=3, top_k_keys=8):
            torch.manual_seed(1)
            got = model.generate(**given, **options)
            stats = std_decode.last_stats(model)
        assert torch.equal(expected, got)
        assert stats.fallback is None and stats.rounds > 0 and stats.drafted > 0


@pytest.mark.parametrize("family", PROCESSORS)
def test_what_is_shown_reaches_the_answer(films, asked, family):
    """Otherwise equal tokens would say nothing of the pixels."""
    model, processor = asked(family)
    given = to_model(make_inputs(processor, films["even"], "Why?"), model)
    options = dict(max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    plain = model.generate(**given, **options).logits[0]
    (name,) = (name for name in given if name.startswith("pixel_values"))
    other = {**given, name: torch.randn_like(given[name])}
    assert (model.generate(**other, **options).logits[0] - plain).abs().max() > 1e-3


def test_the_packages_of_processors_are_there():
    check_packages()

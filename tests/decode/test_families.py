"""Every family of families/, with real pixels: the same tokens, by drafts that read its video."""

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

import std_decode
from std_decode import generation
from std_decode.rounds.loop import Decoding
from tests.decode.families import FAMILIES, IMAGE, VIDEO
from tests.decode.families.table import in_text, table
from tests.decode.seeds import seeds

EVERY_KEY = 10_000
SEEING = [name for name, family in FAMILIES.items() if family.sees != "text"]
PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.fixture
def make(make_case):
    def checked(family, *args, **options):
        since = FAMILIES[family].since
        if Version(transformers.__version__) < Version(since):
            pytest.skip(f"transformers has it since {since}")
        return make_case(family, *args, **options)

    return checked


@pytest.fixture
def visual(monkeypatch):
    """Where each call's prompt was taken to be visual, bool ``[B, S]``."""
    seen, plain = [], generation.plan_selection
    monkeypatch.setattr(
        generation, "plan_selection", lambda visual, *a: seen.append(visual) or plain(visual, *a)
    )
    return seen


def tokens(result):
    return result if isinstance(result, torch.Tensor) else result.sequences


@pytest.mark.parametrize("seed", seeds(10, ordinary=1))
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_as_unpatched(make, visual, family, rows, seed):
    """One prompt, sampled in lockstep, and a left-padded batch whose rows go on by themselves."""
    case = make(family, seed, rows)
    ids = case.inputs["input_ids"]
    pixels = (ids == VIDEO) | (ids == IMAGE)
    assert pixels.any(1).all() == (family in SEEING)
    if family == "phi4_multimodal":  # fails unpatched where it says the token of an image
        case.options["suppress_tokens"] = [IMAGE]
    ties, drafted, accepted = set(), 0, 0
    for do_sample in (False, True):
        mode = "lockstep" if do_sample and rows == 1 else "ragged"
        scores = dict(return_dict_in_generate=True, output_scores=True)
        options = dict(do_sample=do_sample, **(scores if mode == "lockstep" else {}))
        expected = tokens(case.generate(**options))
        for top_k_keys in (4,) if do_sample else (4, EVERY_KEY):
            with std_decode.patched(case.model, draft_length=4, top_k_keys=top_k_keys):
                got = tokens(case.generate(**options))
                stats = std_decode.last_stats(case.model)
            assert stats.fallback is None and stats.mode == mode and stats.rounds > 0
            ties |= case.assert_same_tokens(expected, got, do_sample=do_sample)
            if top_k_keys == EVERY_KEY:  # then the sparse path is the dense one
                assert stats.accepted == stats.drafted > 0
            else:
                drafted, accepted = drafted + stats.drafted, accepted + stats.accepted
    # The tokens are not those of the drafts; in one of 920 cases all of these agree.
    assert accepted < drafted or seed
    assert len(visual) == 3 and all(torch.equal(found, pixels) for found in visual)
    assert len(ties) <= 1  # one token in 1e5 is such a tie: two would be no coincidence


QUICK = ("phi4_multimodal", "qwen2_vl", "gemma3_vl")


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in SEEING]
)
@pytest.mark.parametrize("token", [IMAGE, VIDEO])
def test_a_draft_may_be_the_token_of_an_image(make, monkeypatch, family, token):
    """No forward looks for the image or the video that it would stand for."""
    case = make(family, 0, rows=2, suppress_tokens=[IMAGE, VIDEO])
    expected = case.generate()

    def draft(self, logits, step):
        drafted = torch.full_like(logits[:, 0], token, dtype=torch.int64)
        self.rows.write(drafted[:, None], step)
        return drafted

    monkeypatch.setattr(Decoding, "draft", draft)
    with std_decode.patched(case.model, draft_length=3, top_k_keys=8):
        got = case.generate()
        stats = std_decode.last_stats(case.model)
    assert stats.fallback is None and stats.rounds > 0 and stats.accepted == 0 < stats.drafted
    case.assert_same_tokens(expected, got)


@pytest.mark.parametrize("family", SEEING)
def test_pixels_count(make, family):
    """What the models above are shown reaches their text."""
    case = make(family)
    options = dict(output_logits=True, return_dict_in_generate=True, max_new_tokens=1)
    plain = case.generate(**options).logits[0]
    names = [name for name in case.inputs if "pixel_values" in name]
    assert names
    for name in names:
        case.inputs[name] = torch.randn_like(case.inputs[name])
        assert (case.generate(**options).logits[0] - plain).abs().max() > 1e-3


def test_the_table_in_the_documentation_is_the_list_of_families():
    assert in_text(PAGE.read_text()) == table(), (
        "the table in docs/models.md is not that of tests/decode/families; write it again: "
        "python -m tests.decode.families --write"
    )

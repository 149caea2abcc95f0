"""The list of causal language models: that it is one, and that some of it still holds."""

from collections import Counter

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM

import std_decode
from std_decode.admission.eligibility import SUPPORTED
from tests.decode.survey.__main__ import main, names, outcome_of
from tests.decode.survey.ask import FAULT, IDENTICAL, NOT_BUILT, REFUSED, UNPATCHED, Outcome, ask
from tests.decode.survey.build import built
from tests.decode.survey.page import PAGE, line, listed, version_of, written

# Of each outcome, and quick.
ASKED = [
    "LlamaForCausalLM", "GPT2LMHeadModel", "MistralForCausalLM", "GptOssForCausalLM",
    "BloomForCausalLM", "DeepseekV3ForCausalLM", "Llama4ForCausalLM", "MambaForCausalLM",
    "ModernBertDecoderForCausalLM", "MossTranscribeDiarizeForConditionalGeneration",
]  # fmt: skip
same_version = pytest.mark.skipif(
    version_of(PAGE.read_text()) != transformers.__version__,
    reason="docs/causal-lms.md was written with another version of transformers",
)


def test_the_page_is_well_formed():
    page = PAGE.read_text()
    rows, kinds = listed(page), (IDENTICAL, UNPATCHED, REFUSED, NOT_BUILT)
    found = Counter(row.partition(":")[0].partition(",")[0] for row in rows.values())
    assert set(found) <= set(kinds) and found[IDENTICAL] > 100
    for kind in kinds:
        assert f"| {kind} | {found[kind]} | " in page
    assert f" {len(rows)} in all" in page
    assert list(rows) == sorted(rows, key=str.lower)
    assert all(row == IDENTICAL or row[-1] not in ":, " for row in rows.values())
    # Nothing stands in it beside what is written again from its rows.
    outcomes = {}
    for name, row in rows.items():
        kind = next(kind for kind in kinds if row.startswith(kind))
        outcomes[name] = Outcome(kind, row[len(kind) + 2 :].replace("\\|", "|"))
    assert written(outcomes, version_of(page)) == page
    assert "(causal-lms.md)" in PAGE.with_name("models.md").read_text()


@same_version
def test_the_page_lists_every_class():
    assert list(listed(PAGE.read_text())) == names()


@same_version
@pytest.mark.parametrize("name", ASKED)
def test_a_model_still_comes_out_as_listed(name):
    assert line(outcome_of(name)) == listed(PAGE.read_text())[name]


def tiny_llama():
    model, no_weights = built(LlamaForCausalLM)
    assert no_weights is None
    return model


def test_other_tokens_are_a_fault(monkeypatch):
    """A key that verification scales by a twentieth too much is seen."""
    from std_decode.model import attention

    model, patch = tiny_llama(), std_decode.patch
    ops = ("verify_attention", "verify_attention_with_scores")
    plain = {name: getattr(attention, name) for name in ops}

    def wrong(model, **options):  # after the trial, which would refuse it
        patch(model, **options)
        for name, op in plain.items():
            monkeypatch.setattr(attention, name, lambda q, *a, op=op, **o: op(1.05 * q, *a, **o))

    assert ask(model) == Outcome(IDENTICAL)
    monkeypatch.setattr(std_decode, "patch", wrong)
    outcome = ask(model)
    assert outcome.kind == FAULT and "other tokens" in outcome.why


def refusing(message, leave=lambda model: None):
    def patch(model, **options):
        leave(model)
        raise NotImplementedError(message)

    return patch


def raising(error):
    def patch(model, **options):
        raise error

    return patch


def put_a_hook(model):
    model.model.layers[1].register_forward_hook(lambda *_: None)


def change_a_weight(model):
    model.lm_head.weight.data.neg_()


def change_the_config(model):
    model.config.use_cache = False


NAMED = f"patch: LlamaForCausalLM is one; {SUPPORTED}"


@pytest.mark.parametrize(
    "patch, words",
    [
        (raising(KeyError("of its own")), "patch raised KeyError"),
        (refusing(f"patch: this model is one; {SUPPORTED}"), "names no LlamaForCausalLM"),
        (refusing(NAMED, put_a_hook), "refused, and its hooks changed"),
        (refusing(NAMED, change_the_config), "refused, and its config changed"),
        (refusing(NAMED, change_a_weight), "now it says something else"),
    ],
)
def test_what_a_refusal_must_not_do(monkeypatch, patch, words):
    monkeypatch.setattr(std_decode, "patch", patch)
    outcome = ask(tiny_llama())
    assert outcome.kind == FAULT and words in outcome.why


def test_a_refusal_that_leaves_nothing_is_one(monkeypatch):
    monkeypatch.setattr(std_decode, "patch", refusing(NAMED))
    assert ask(tiny_llama()) == Outcome(REFUSED, "is one")


def test_a_model_that_hangs_or_dies_stops_nothing(monkeypatch):
    import os
    import time

    from tests.decode.survey import __main__ as command

    monkeypatch.setattr(command, "ask", lambda *_: time.sleep(60))
    assert outcome_of("LlamaForCausalLM", seconds=0.5).why == "took more than 0.5 seconds"
    monkeypatch.setattr(command, "ask", lambda *_: os._exit(9))
    assert outcome_of("LlamaForCausalLM").why == "ended its process with 9"


def test_the_command_says_what_it_expects(capsys):
    for arguments in (["LamaForCausalLM"], ["--write", "LlamaForCausalLM"]):
        with pytest.raises(SystemExit):
            main(arguments)
    told = capsys.readouterr().err
    assert "LamaForCausalLM is unknown, expected one that" in told and "LlamaForCausalLM" in told
    assert "expected no NAME" in told


def test_a_tiny_model_has_each_kind_of_layer():
    model, _ = built(transformers.Gemma3ForCausalLM)
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
    assert model.config.sliding_window == 24 and model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000

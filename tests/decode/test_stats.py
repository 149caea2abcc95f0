"""last_stats tells of the newest call, or nothing."""

import inspect
from pathlib import Path

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import std_decode
from tests.decode.observers import Streams

PATCH = dict(draft_length=4, top_k_keys=8)


@pytest.fixture
def case(make_case):
    """Patched, with a call behind it that was accelerated."""
    case = make_case("llama", seed=1)
    case.plain = case.generate()
    std_decode.patch(case.model, **PATCH)
    assert torch.equal(case.generate(), case.plain)
    assert std_decode.last_stats(case.model).rounds > 0
    return case


def own_loop(model, input_ids, generation_config, **kwargs):
    logits = model(input_ids).logits[:, -1:]
    return torch.cat([input_ids, logits.argmax(-1)], dim=1)


def test_a_decoding_function_of_the_callers(case):
    told = case.generate(custom_generate=own_loop)
    assert torch.equal(told, case.plain[:, : told.shape[1]])
    assert std_decode.last_stats(case.model) is None


def test_a_decoding_function_that_samples_by_generates_own(case):
    def passed_on(model, *args, **kwargs):
        return type(model)._sample(model, *args, **kwargs)

    assert torch.equal(case.generate(custom_generate=passed_on), case.plain)
    assert std_decode.last_stats(case.model).rounds > 0


def test_a_decoding_function_of_a_folder(case, tmp_path):
    folder = tmp_path / "custom_generate"
    folder.mkdir()
    (folder / "generate.py").write_text(
        "def generate(model, input_ids, **kwargs):\n    return input_ids\n"
    )
    (tmp_path / "config.json").write_text("{}")
    told = case.generate(custom_generate=str(tmp_path), trust_remote_code=True)
    assert torch.equal(told, case.inputs["input_ids"])
    assert std_decode.last_stats(case.model) is None


@pytest.mark.filterwarnings("ignore")
def test_continuous_batching(case):
    prompt = case.inputs["input_ids"]
    greedy = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1)
    little = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # of all memory, else
    told = case.model.generate_batch(
        prompt.tolist(), generation_config=greedy, continuous_batching_config=little
    )
    answer = case.plain[0, prompt.shape[1] :][:4].tolist()
    assert [one.generated_tokens for one in told.values()] == [answer]
    assert std_decode.last_stats(case.model).fallback == "continuous batching"
    assert torch.equal(case.generate(), case.plain)
    assert std_decode.last_stats(case.model).rounds > 0


class Interrupted(Streams):
    def put(self, value):
        super().put(value)
        if len(self.calls) > 5:
            raise ZeroDivisionError


RAISE = {
    "an unknown argument": (ValueError, dict(nonsense=1)),
    "a bad option": (ValueError, dict(max_new_tokens=-1)),
    "a mode that has moved to the Hub": (ValueError, dict(penalty_alpha=0.6, top_k=4)),
    "a folder without a function": (
        OSError,
        dict(custom_generate=str(Path(__file__).parent), trust_remote_code=True),
    ),
    "a streamer of two beams": (ValueError, dict(num_beams=2, streamer=Streams())),
    "in mid-call": (ZeroDivisionError, dict(streamer=Interrupted())),
    "in mid-call, as unpatched": (
        ZeroDivisionError,
        dict(streamer=Interrupted(), cache_implementation="static"),
    ),
}


@pytest.mark.parametrize("name", RAISE)
def test_a_call_that_raises(case, name):
    error, options = RAISE[name]
    with pytest.raises(error):
        case.generate(**options)
    stats = std_decode.last_stats(case.model)
    assert stats is None or (name.endswith("unpatched") and "DynamicCache" in stats.fallback)


@pytest.mark.parametrize("levels", [1, None], ids=["one", "all"])
def test_a_call_without_generates_decorators(case, levels):
    """People take ``torch.no_grad`` off."""
    generate = type(case.model).generate
    bare = generate.__wrapped__ if levels else inspect.unwrap(generate)
    with torch.no_grad():
        told = bare(case.model, **case.inputs, **case.options)
    assert torch.equal(told, case.plain)
    assert std_decode.last_stats(case.model).rounds > 0
    with pytest.raises(ValueError, match="nonsense"):
        bare(case.model, **case.inputs, nonsense=1)
    assert std_decode.last_stats(case.model) is None


def test_while_a_call_runs(case):
    seen = []

    class Asks(Streams):
        def put(self, value):
            seen.append(std_decode.last_stats(case.model))

    case.generate(streamer=Asks())
    assert len(seen) > 5 and set(seen) == {None}
    assert std_decode.last_stats(case.model).rounds > 0


def test_a_method_that_was_bound_before_patch(make_case):
    case = make_case("llama", seed=2)
    bound, expected = case.model.generate, case.generate()
    with std_decode.patched(case.model, **PATCH):
        case.generate()
        with pytest.raises(ZeroDivisionError):
            bound(**case.inputs, **case.options, streamer=Interrupted())
        assert std_decode.last_stats(case.model) is None
        assert torch.equal(bound(**case.inputs, **case.options), expected)
        assert std_decode.last_stats(case.model).rounds > 0

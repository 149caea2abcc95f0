"""Everything that plain generate offers around the loop behaves as without the patch."""

import threading

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import std_decode
from tests.decode.observers import Streams, interposed

PATCH = dict(draft_length=4, top_k_keys=8)
FAMILIES = ("qwen2_vl", "llava_onevision", "llama")


def both(case, **options):
    """The unpatched result and the patched one, and the stats of the latter."""
    expected = case.generate(**options)
    with std_decode.patched(case.model, **PATCH):
        got = case.generate(**options)
        stats = std_decode.last_stats(case.model)
    return expected, got, stats


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamer_sees_the_same_calls(make_case, family, do_sample):
    case = make_case(family, seed=1)
    plain, patched = Streams(), Streams()
    case.generate(streamer=plain, do_sample=do_sample)
    with std_decode.patched(case.model, **PATCH):
        case.generate(streamer=patched, do_sample=do_sample)
        assert std_decode.last_stats(case.model).rounds > 0
    assert len(plain.calls) == len(patched.calls)
    assert plain.calls[-1] == patched.calls[-1] == "end"
    assert all(torch.equal(a, b) for a, b in zip(plain.calls[:-1], patched.calls[:-1]))


@pytest.mark.parametrize(
    "options",
    [
        dict(repetition_penalty=1.3),
        dict(no_repeat_ngram_size=2),
        dict(min_new_tokens=10, bad_words_ids=[[9], [10, 11]]),
        dict(do_sample=True, temperature=0.7, top_k=20, top_p=0.9),
        dict(do_sample=True, min_p=0.05, repetition_penalty=1.1),
        dict(do_sample=True, typical_p=0.9, num_return_sequences=3),
        dict(do_sample=True, epsilon_cutoff=1e-3, renormalize_logits=True),
    ],
    ids=lambda options: "+".join(options),
)
def test_built_in_processors(make_case, options):
    for seed in range(3):
        case = make_case("qwen2_vl", seed)
        expected, got, stats = both(case, **options)
        assert stats.rounds > 0 and torch.equal(expected, got)


def test_drafts_go_through_the_stateless_processors(make_case):
    """Without them, hardly a draft would survive a processor that rules out half the tokens."""
    case = make_case("llama", 0, max_new_tokens=26)  # one and five whole rounds
    with std_decode.patched(case.model, draft_length=4, top_k_keys=10_000):
        case.generate(suppress_tokens=list(range(7, 60)), repetition_penalty=1.5)
        stats = std_decode.last_stats(case.model)
    assert stats.accepted == stats.drafted > 0


class Stateful(LogitsProcessor):
    """Depends on how often it was called, and on the global random numbers."""

    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        noise = torch.rand(scores.shape[-1])
        return scores + 0.5 * noise * (len(self.lengths) % 3)


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_stateful_processor_is_called_as_without_the_patch(make_case, do_sample):
    for seed in range(3):
        case = make_case("qwen2_vl", seed)
        plain, patched = Stateful(), Stateful()
        expected = case.generate(
            logits_processor=LogitsProcessorList([plain]), do_sample=do_sample
        )
        with std_decode.patched(case.model, **PATCH):
            got = case.generate(
                logits_processor=LogitsProcessorList([patched]), do_sample=do_sample
            )
            assert std_decode.last_stats(case.model).rounds > 0
        assert torch.equal(expected, got)
        assert plain.lengths == patched.lengths


class EndsRows(StoppingCriteria):
    """Ends row r at its own length, and remembers what it was shown."""

    def __init__(self, prompt):
        self.prompt, self.shown = prompt, []

    def __call__(self, input_ids, scores, **kwargs):
        self.shown.append(input_ids.clone())
        limits = torch.arange(len(input_ids)) * 4 + 3 + self.prompt
        return limits <= input_ids.shape[1]


@pytest.mark.parametrize("eos", [False, True])
def test_a_criterion_that_ends_rows_one_by_one(make_case, eos):
    case = make_case("llava_onevision", seed=2, rows=3, eos=eos)
    prompt = case.inputs["input_ids"].shape[1]
    plain, patched = EndsRows(prompt), EndsRows(prompt)
    expected = case.generate(stopping_criteria=StoppingCriteriaList([plain]))
    with std_decode.patched(case.model, **PATCH):
        got = case.generate(stopping_criteria=StoppingCriteriaList([patched]))
    assert torch.equal(expected, got)
    assert len(plain.shown) == len(patched.shown)
    assert all(torch.equal(a, b) for a, b in zip(plain.shown, patched.shown))


def test_stop_strings(make_case, letters):
    case = make_case("qwen2_vl", seed=4)
    told = case.generate()[0, case.inputs["input_ids"].shape[1] :].tolist()
    stop = chr(97 + told[6]) + chr(97 + told[7])
    expected, got, stats = both(case, stop_strings=[stop], tokenizer=letters)
    assert expected.shape[1] == case.inputs["input_ids"].shape[1] + 8
    assert torch.equal(expected, got) and stats.rounds > 0


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", (*FAMILIES, "gemma3"))
def test_returned_scores_logits_and_cache(make_case, family, rows, do_sample):
    """Also of rows that have ended and are fed padding while the others go on."""
    case = make_case(family, seed=5, rows=rows, eos=rows > 1)
    options = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
    expected, got, _ = both(case, do_sample=do_sample, **options)
    assert torch.equal(expected.sequences, got.sequences)
    assert len(expected.scores) == len(got.scores) and len(expected.logits) == len(got.logits)
    for plain, ours in zip(expected.scores + expected.logits, got.scores + got.logits):
        torch.testing.assert_close(plain, ours, atol=1e-4, rtol=1e-4)
    assert type(got.past_key_values) is DynamicCache
    assert got.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    valid = case.inputs["attention_mask"].bool()
    for plain, ours in zip(expected.past_key_values.layers, got.past_key_values.layers):
        assert plain.keys.shape == ours.keys.shape
        if plain.keys.shape[2] >= valid.shape[1]:  # a sliding window has dropped the padding
            generated = torch.ones(rows, plain.keys.shape[2] - valid.shape[1], dtype=torch.bool)
            seen = torch.cat([valid, generated], 1)
            for name in ("keys", "values"):
                a, b = getattr(plain, name), getattr(ours, name)
                seen_a, seen_b = a.transpose(1, 2)[seen], b.transpose(1, 2)[seen]
                torch.testing.assert_close(seen_a, seen_b, atol=1e-4, rtol=1e-4)


def test_the_returned_cache_goes_on_unpatched(make_case):
    case = make_case("llama", seed=6)
    expected, got, _ = both(case, return_dict_in_generate=True)
    inputs = dict(input_ids=expected.sequences, max_new_tokens=8)
    follow = [
        case.model.generate(**inputs, past_key_values=r.past_key_values) for r in (expected, got)
    ]
    assert torch.equal(*follow)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_generator_is_left_as_without_the_patch(make_case, rows):
    case = make_case("qwen2_vl", seed=7, rows=rows, eos=rows > 1)

    def twice():
        first = case.generate(do_sample=True)
        second = case.model.generate(**case.inputs, **case.options, do_sample=True)
        return first, second, torch.get_rng_state()

    expected = twice()
    with std_decode.patched(case.model, **PATCH):
        got = twice()
    assert all(torch.equal(a, b) for a, b in zip(expected, got))


def test_a_cache_of_the_callers_own_is_used_as_such(make_case):
    case = make_case("llama", seed=9)
    expected = case.generate()
    cache = DynamicCache(config=case.model.config)
    with std_decode.patched(case.model, **PATCH):
        got = case.generate(past_key_values=cache)
        assert std_decode.last_stats(case.model).rounds > 0
    assert torch.equal(expected, got)
    assert cache.get_seq_length() == got.shape[1] - 1


class Boom(Exception):
    pass


class Explodes(LogitsProcessor, StoppingCriteria, BaseStreamer):
    """Raises at its third call, whatever it is used as."""

    calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 3:
            raise Boom
        if len(args) == 2 and args[1] is not None and args[1].dtype.is_floating_point:
            return args[1]
        return torch.zeros(len(args[0]), dtype=torch.bool)

    put = __call__

    def end(self):
        pass


@pytest.mark.parametrize("where", ["logits_processor", "stopping_criteria", "streamer", "forward"])
def test_an_exception_leaves_the_model_usable_and_unpatchable(make_case, monkeypatch, where):
    case = make_case("qwen2_vl", seed=11)
    model, config = case.model, case.model.get_decoder().config
    expected, kind, name = case.generate(), type(model), config._attn_implementation
    std_decode.patch(model, **PATCH)
    if where == "forward":
        layer, calls = model.get_decoder().layers[1], Explodes()

        def explode(*_, **__):
            calls(torch.zeros(1), None)

        with interposed(layer, explode), pytest.raises(Boom):
            case.generate()
    else:
        lists = {
            "logits_processor": LogitsProcessorList,
            "stopping_criteria": StoppingCriteriaList,
        }
        value = lists[where]([Explodes()]) if where in lists else Explodes()
        with pytest.raises(Boom):
            case.generate(**{where: value})
    assert config._attn_implementation == name
    assert torch.equal(case.generate(), expected)
    assert std_decode.unpatch(model) is model
    assert type(model) is kind
    assert torch.equal(case.generate(), expected)


def test_generate_inside_generate(make_case):
    """A criterion that asks the same model something else in mid-round."""
    case = make_case("llama", seed=12)
    other = torch.randint(7, 99, (1, 20))
    expected = case.generate()
    aside = case.model.generate(input_ids=other, max_new_tokens=6)

    class Asks(StoppingCriteria):
        answers = []

        def __call__(self, input_ids, scores, **kwargs):
            self.answers.append(case.model.generate(input_ids=other, max_new_tokens=6))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with std_decode.patched(case.model, **PATCH):
        got = case.generate(stopping_criteria=StoppingCriteriaList([Asks()]))
    assert torch.equal(expected, got)
    assert all(torch.equal(answer, aside) for answer in Asks.answers)


def test_a_model_that_shares_the_config_object_is_not_touched(make_case):
    """Its forward runs while the patched model's attention is switched, in the same thread."""
    from transformers import LlamaForCausalLM

    case = make_case("llama", seed=13)
    bystander = LlamaForCausalLM(case.model.config).eval()
    assert bystander.config is case.model.config
    ids = torch.randint(7, 99, (2, 30))
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    with torch.no_grad():
        expected = bystander(ids, attention_mask=mask).logits
    seen = []

    def interrupt(*_):
        seen.append(bystander(ids, attention_mask=mask).logits)

    plain = case.generate()
    hook = case.model.model.layers[1].self_attn.register_forward_hook(interrupt)
    with std_decode.patched(case.model, **PATCH):
        seen.clear()  # of the trial that patch runs
        got = case.generate()
    hook.remove()
    assert torch.equal(plain, got) and len(seen) > 10
    assert all(torch.equal(logits, expected) for logits in seen)


def test_two_threads(make_case):
    """Two patched models, and one patched model, used from two threads at once."""
    first, second = make_case("llama", seed=14), make_case("qwen2_vl", seed=15)
    expected = {id(c): c.generate(max_new_tokens=40) for c in (first, second)}
    for pair in ((first, second), (first, first)):
        for model in {id(c.model): c.model for c in pair}.values():
            std_decode.patch(model, **PATCH)
        got = [None, None]

        def work(index):
            case = pair[index]
            got[index] = case.model.generate(**case.inputs, max_new_tokens=40)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for case, tokens in zip(pair, got):
            assert torch.equal(tokens, expected[id(case)])
        for model in {id(c.model): c.model for c in pair}.values():
            std_decode.unpatch(model)


def test_a_model_that_updates_its_inputs_as_mllama_does(make_case):
    """What transformers says by name at each step has to be said."""

    class Asking(LlamaForCausalLM):
        def _update_model_kwargs_for_generation(
            self, outputs, model_kwargs, is_encoder_decoder, **kwargs
        ):
            assert is_encoder_decoder is False
            return super()._update_model_kwargs_for_generation(
                outputs, model_kwargs, is_encoder_decoder, **kwargs
            )

    case = make_case("llama", rows=2)
    case.model.__class__ = Asking
    expected, got, stats = both(case)
    assert stats.fallback is None and stats.rounds > 0 and stats.mode == "ragged"
    case.assert_same_tokens(expected, got)

"""Keys and values in the host's memory: the same tokens, and how many bytes pass the link."""

import pytest
import torch
from transformers import DynamicCache

import std_decode
from std_decode.model.link import Link
from std_decode.passes.engine import Engine
from tests.decode.families import base
from tests.decode.model.test_holes import riddled
from tests.decode.test_second_question import ask_twice, conversation, same_cache

pytestmark = pytest.mark.eager  # what is offloaded is never captured
PATCH = dict(draft_length=4, top_k_keys=6)
SLOW = pytest.mark.slow
OFFLOADED = dict(PATCH, kv_cache="offloaded")
EVERY_KEY = 10_000
FAMILIES = ("llama", "qwen2_vl", "llava_onevision", "qwen3", "qwen3_5")


def generated(case, patch, **options):
    with std_decode.patched(case.model, **patch):
        told = case.generate(**options)
        stats = std_decode.last_stats(case.model)
    assert stats.fallback is None
    return told, stats


@pytest.mark.parametrize(("rows", "do_sample"), [
    (3, True), *(pytest.param(*x, marks=SLOW) for x in ((1, False), (1, True), (3, False))),
])  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_as_unpatched(make_case, family, rows, do_sample):
    """And the drafts are those that are made where everything is on the device."""
    case = make_case(family, 1, rows, eos=rows > 1, do_sample=do_sample)
    expected = case.generate()
    got, stats = generated(case, OFFLOADED)
    case.assert_same_tokens(expected, got)
    _, there = generated(case, PATCH)
    assert (stats.rounds, stats.accepted) == (there.rounds, there.accepted)
    assert stats.rounds > 0 and stats.host_kv_bytes > 0 == there.host_kv_bytes
    assert stats.eager_because == "keys and values are offloaded"


@pytest.mark.parametrize(("family", "promise"), [
    ("llama", True), ("qwen2_vl", "unpatched"),
    pytest.param("qwen2_vl", True, marks=SLOW), pytest.param("llama", "unpatched", marks=SLOW),
])  # fmt: skip
def test_the_bits_of_every_logit(make_case, family, promise):
    """Of the unpatched model, or of the passes that a reproducible call is made of."""
    case = make_case(family, 2, return_dict_in_generate=True, output_logits=True)
    expected = case.generate()
    if promise is True:
        expected, _ = generated(case, dict(PATCH, reproducible=True))
    got, stats = generated(case, dict(OFFLOADED, reproducible=promise))
    assert stats.rounds > 0 and stats.promise != "rounded"
    assert torch.equal(expected.sequences, got.sequences)
    assert all(map(torch.equal, expected.logits, got.logits))


def test_every_draft_is_accepted_when_every_key_is_selected(make_case):
    for rows in (1, 3):
        case = make_case("llama", 3, rows)
        _, stats = generated(case, dict(OFFLOADED, top_k_keys=EVERY_KEY))
        assert stats.accepted == stats.drafted == 12 * rows


@pytest.mark.parametrize("options", [
    dict(prefill_chunk_size=7),
    dict(prefill_chunk_size=89, do_sample=True),
    dict(output_scores=True, return_dict_in_generate=True),
    dict(max_new_tokens=1),
    dict(patch=dict(draft_length="auto", draft_weights="int4"), max_new_tokens=40),
    dict(patch=dict(draft_length=0)),
    dict(patch=dict(prompt_lookup=True, reselect=False)),
], ids=lambda options: next(iter(options)))  # fmt: skip
def test_other_calls(make_case, options):
    options = dict(options)
    case, patch = make_case("llama", 4, rows=2), options.pop("patch", {})
    expected = case.generate(**options)
    got, stats = generated(case, {**OFFLOADED, **patch}, **options)
    told, also = ((x if torch.is_tensor(x) else x.sequences) for x in (expected, got))
    case.assert_same_tokens(told, also, **options)
    assert stats.rounds > 0 or patch or options.get("max_new_tokens") == 1


@pytest.mark.parametrize("chunk", [None, 20])
def test_masks_with_holes(make_case, chunk):
    case = make_case("llama", 5, rows=2, prefill_chunk_size=chunk)
    case.options["return_dict_in_generate"] = True
    case.inputs["attention_mask"] = riddled(case.inputs["attention_mask"], 0.2)
    expected = case.generate()
    _, stats = generated(case, PATCH)
    got, other = generated(case, OFFLOADED)
    assert torch.equal(expected.sequences, got.sequences)
    assert (stats.rounds, stats.accepted) == (other.rounds, other.accepted)
    same_cache(expected.past_key_values, got.past_key_values, case.inputs["attention_mask"])


def test_buffers_grow(make_case, monkeypatch):
    monkeypatch.setattr("std_decode.model.cache.BUCKET", 16)
    monkeypatch.setattr("std_decode.generation.MOST_NEW_TOKENS", 4)
    monkeypatch.setattr("std_decode.rounds.rows.MOST_NEW_TOKENS", 4)
    case = make_case("llama", 1, rows=2, max_new_tokens=40)
    expected = case.generate()
    got, stats = generated(case, OFFLOADED)
    case.assert_same_tokens(expected, got)
    assert stats.kv_cache_bytes > 0


@pytest.mark.parametrize(("family", "rows", "given"), [
    ("qwen2_vl", 3, "new tokens"), pytest.param("llama", 1, "everything", marks=SLOW),
    pytest.param("qwen3_5", 1, "new tokens", marks=SLOW),
])  # fmt: skip
def test_a_second_question(make_case, family, rows, given):
    case = make_case(family, 3, rows, eos=rows > 1)
    *expected, plain = ask_twice(case, given)
    with std_decode.patched(case.model, **OFFLOADED):
        *got, ours = ask_twice(case, given)
        stats = std_decode.last_stats(case.model)
    assert all(map(torch.equal, expected, got))
    assert stats.fallback is None and stats.rounds > 0 and stats.reused_tokens > 0
    if family != "qwen3_5":  # whose states are another matter
        same_cache(plain, ours, case.inputs["attention_mask"])


def offloading(**options):
    try:
        return DynamicCache(offloading=True, **options)
    except RuntimeError:  # it makes a stream, for which a CUDA build of torch asks for a GPU
        pytest.skip("no GPU, and torch is built for one")


def test_an_offloaded_cache_of_the_callers(make_case):
    """Two questions; it needs no `kv_cache`, and holds what plain decoding leaves in a cache."""
    case = make_case("llama", 6, rows=2)
    *expected, plain = ask_twice(case, "new tokens")
    for given in (offloading(config=case.model.config), offloading()):
        with std_decode.patched(case.model, **PATCH):
            first = case.generate(past_key_values=given)
            assert torch.equal(first, expected[0])
            torch.manual_seed(99)
            inputs = conversation(case, torch.randint(7, 99, (2, 6)), first, "new tokens")
            second = case.model.generate(**inputs, past_key_values=given, **case.options)
            stats = std_decode.last_stats(case.model)
        assert torch.equal(second, expected[1])
        assert stats.fallback is None and stats.host_kv_bytes and stats.reused_tokens
        same_cache(plain, given, case.inputs["attention_mask"])
        assert all(layer.keys.device.type == "cpu" for layer in given.layers)


@pytest.mark.parametrize("draft_length", [4, pytest.param("auto", marks=SLOW)])
def test_with_weights_on_a_disk_too(make_case, monkeypatch, tmp_path, draft_length):
    """Drafts by 4-bit copies and selected keys; only dense passes fetch anything."""
    accelerate = pytest.importorskip("accelerate")
    for name in ("hidden_size", "intermediate_size", "vocab_size"):  # as 4-bit weights take them
        monkeypatch.setitem(base.TEXT, name, 128)
    case = make_case("mistral", 14, rows=2, do_sample=draft_length == "auto")
    expected = case.generate()
    accelerate.disk_offload(case.model, tmp_path, execution_device="cpu")
    patch = dict(OFFLOADED, draft_weights="int4", draft_length=draft_length)
    got, stats = generated(case, patch)
    case.assert_same_tokens(expected, got)
    assert stats.draft_weights == "int4" and stats.host_kv_bytes > 0
    assert stats.rounds > 0 or draft_length == "auto"


def deep(monkeypatch, layers):
    monkeypatch.setitem(base.TEXT, "num_hidden_layers", layers)


def test_what_passes_the_link(make_case, monkeypatch):
    """A draft fetches nothing; a dense pass each prompt key once, selection or not; nothing but
    the prompt is stored before the call ends."""
    deep(monkeypatch, 5)
    case = make_case("llama", 7, rows=2, max_new_tokens=24)
    draft, verify, counts = Engine.draft, Engine.verify, {"draft": [], "verify": []}

    def counted(name, run):
        def call(engine, *args):
            if not engine.cache.offloads:  # of a trial
                return run(engine, *args)
            link = engine.cache.link
            before = link.fetched, link.stored
            result = run(engine, *args)
            counts[name].append((link.fetched - before[0], link.stored - before[1]))
            return result

        return call

    monkeypatch.setattr(Engine, "draft", counted("draft", draft))
    monkeypatch.setattr(Engine, "verify", counted("verify", verify))
    _, stats = generated(case, OFFLOADED)
    prompt = case.inputs["input_ids"].shape[1]
    heads, dim = base.TEXT["num_key_value_heads"], 16
    whole = 5 * 2 * 2 * heads * prompt * dim * 4
    assert stats.host_kv_bytes == stats.stored_kv_bytes == whole
    assert stats.calls["select"] > 3 < len(counts["draft"]) == len(counts["verify"])
    assert set(counts["draft"]) == {(0, 0)}
    # The first pass also begins with what later ones find ahead of them: one layer.
    assert counts["verify"][0] == (whole + whole // 5, 0)
    assert set(counts["verify"][1:]) == {(whole, 0)}


def resident(case, prompt):
    """Bytes on the device after a call, without two layers in whole, and the latter."""
    ids = torch.randint(7, 99, (1, prompt))
    case.inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    own = []
    with pytest.MonkeyPatch.context() as patches:
        release = Engine.release

        def looked(engine):
            staging = engine.cache.staging.nbytes
            own.append((engine.cache.nbytes - staging, staging))
            release(engine)

        patches.setattr(Engine, "release", looked)
        generated(case, OFFLOADED)
    return own[-1]


def test_what_the_device_keeps_does_not_grow_with_the_prompt(make_case, monkeypatch):
    case = make_case("llama", 8)
    monkeypatch.setattr("std_decode.model.selection_rules.MOST_OBSERVERS", 8)
    monkeypatch.setattr("std_decode.model.cache.BUCKET", 1)
    few, many = resident(case, 100), resident(case, 400)
    assert few[0] == many[0] > 0
    assert many[1] > 3 * few[1]


def test_a_dense_pass_reads_no_key_before_it_has_come(make_case, monkeypatch):
    """With the copies ahead put off until they are waited for, as late as a device may be."""
    fetch, await_ = Link.fetch, Link.await_

    def later(link, sources, targets):
        for target in targets:
            target.fill_(float("nan"))
        return sources, targets

    def now(link, fetched, device):
        if fetched is not None:
            fetch(link, *fetched)
            await_(link, None, device)

    case = make_case("llama", 9, rows=2)
    expected = case.generate()
    monkeypatch.setattr(Link, "fetch", later)
    monkeypatch.setattr(Link, "await_", now)
    got, stats = generated(case, OFFLOADED)
    case.assert_same_tokens(expected, got)
    assert stats.rounds > 0


@pytest.mark.parametrize("options, error, words", [
    (dict(kv_cache="host"), ValueError, "kv_cache is 'host', expected None or \"offloaded\""),
    (dict(cuda_graphs=True), ValueError, "cuda_graphs is True with kv_cache"),
    (dict(compile=True), ValueError, "compile is True with kv_cache"),
    (dict(fused_layers=True), ValueError, "fused_layers is True with kv_cache"),
])  # fmt: skip
def test_what_it_does_not_go_with(make_case, state_of, options, error, words):
    case = make_case("llama", 11)
    before = state_of(case.model)
    with pytest.raises(error, match=words):
        std_decode.patch(case.model, **{**OFFLOADED, **options})
    assert state_of(case.model) == before


def test_sliding_windows(make_case, state_of):
    """Refused; a call that asks for it runs as unpatched, see admission/test_eligibility.py."""
    case = make_case("gemma3", 12)
    before = state_of(case.model)
    with pytest.raises(NotImplementedError, match="sliding windows .of 24 tokens"):
        std_decode.patch(case.model, **OFFLOADED)
    assert state_of(case.model) == before


def test_the_buffers_of_an_earlier_call_make_way(make_case, recording):
    case = make_case("llama", 13)
    offloading()  # as the second call makes one
    expected = case.generate()
    with std_decode.patched(case.model, **PATCH):
        engines = case.model._std_decode.engines
        for options in ({}, dict(cache_implementation="offloaded")):
            assert torch.equal(case.generate(**options), expected)
            assert (engines.idle is None) == bool(options)
        stats = std_decode.last_stats(case.model)
    assert stats.host_kv_bytes > 0 and stats.graph_replays == 0

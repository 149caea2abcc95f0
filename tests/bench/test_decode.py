"""`bench decode` on the tiny shape and the CPU: what it compares, forces, skips and refuses."""

import argparse
import itertools
import signal
import time
from types import SimpleNamespace

import pytest
import torch

import std_decode
from bench import environment, probes, records
from bench.__main__ import main
from bench.decode import cell, tables
from bench.decode import command as decode
from bench.models import build, prompts
from bench.models.dimensions import SHAPES, Shape
from std_decode.model.cache import SparseToDenseCache
from std_decode.passes import graphs
from std_decode.rounds.loop import Decoding

CPU = torch.device("cpu")
WAYS = {
    "transformers generate",
    "ours, dense",
    "ours, forced acceptance 0.2",
    "transformers generate, static cache",
}
QUICK = ["--quick", "--shape", "tiny", "--batch", "1", "--context", "150", "--new-tokens", "20",
         "--runs", "1", "--top-k-keys", "32", "--acceptance", "0.2"]  # fmt: skip


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """``bench(*arguments)``: the exit status and the records."""
    monkeypatch.setattr(decode, "copy_bandwidth", lambda device: 10.0)  # takes a second

    def call(*arguments, clock=None):
        command = ["decode", *QUICK, "--device", "cpu", "--out", str(tmp_path), *arguments]
        if clock is None:
            status = main(command)
        else:
            parser = argparse.ArgumentParser()
            decode.add_parser(parser.add_subparsers())
            status = decode.run(parser.parse_args(command), clock)
        files = list(tmp_path.glob("decode-*.jsonl"))
        return status, records.read(files[0]) if files else []

    return call


@pytest.fixture(scope="module")
def model():
    return build.random_model(SHAPES["tiny"], torch.float32, CPU, seed=0)


@pytest.fixture
def prompt(model):
    return prompts.Prompt(model, 150, seed=0)


def of(records, kind, batch=1):
    return [r for r in records if r["kind"] == kind and r.get("batch") == batch]


def test_a_grid_from_end_to_end(bench, tmp_path, capsys):
    status, records = bench("--batch", "3", "1")
    assert status == 0
    for batch in (1, 3):
        decoded = of(records, "decode", batch)
        assert {record["what"] for record in decoded} == WAYS
        for record in decoded:
            assert record["status"] == "ok" and record["runs"] == 1 and record["ms"] > 0
            assert record["same_as_transformers"] == f"{20 * batch} of {20 * batch}"
        passes = {record["pass"]: record for record in of(records, "pass", batch)}
        assert set(passes) == {"step", "dense", "draft", "verify"}
        assert all(record["kernels"] > 20 for record in passes.values())
        assert passes["draft"]["bytes"] < passes["verify"]["bytes"] == passes["dense"]["bytes"]
    # What is the question comes first, of both batches, in the order given.
    static = ("static cache" in record["what"] for record in of(records, "decode", 3))
    assert [*static] == [False, False, False, True]
    batches = [r["batch"] for r in records if r["kind"] == "decode"]
    assert batches == [3] * 3 + [1] * 3 + [3, 1]
    (path,) = tmp_path.glob("decode-*.md")
    text = path.read_text()
    assert text.count("ours, forced acceptance 0.2") == 8  # in both batches' rows of each table
    assert "forced acceptance" in capsys.readouterr().out


def test_drafts_with_4_bit_weights(bench, monkeypatch):
    """Beside those with the model's own: the same tokens, and fewer bytes counted for a draft."""
    asked = ("--draft-weights", "own", "int4", "--ways", "dense", "drafts", "--top-k-keys", "32")
    status, records = bench(*asked)
    assert status == 0
    decoded = {record["what"]: record for record in of(records, "decode")}
    own, int4 = "ours, forced acceptance 0.2", "ours, forced acceptance 0.2, int4 drafts"
    assert set(decoded) == {"transformers generate", "ours, dense", own, int4}
    assert decoded[int4]["status"] == "ok" and "GB of int4 copies" in decoded[int4]["note"]
    assert decoded[int4]["same_as_transformers"] == "20 of 20"
    bytes_of = {(r["what"], r["pass"]): r["bytes"] for r in of(records, "pass")}
    shape = SHAPES["tiny"]
    twins = decoded[int4]["draft_weight_bytes"]
    assert 0.5 * shape.counts.matrices < twins < 0.63 * shape.counts.matrices
    assert bytes_of[int4, "verify"] == bytes_of[own, "verify"]
    # In float32 a weight is 4 bytes, in the copies it is twins / matrices.
    saved = 4 * shape.counts.matrices - twins
    assert bytes_of[own, "draft"] - bytes_of[int4, "draft"] == saved
    monkeypatch.setattr(build, "free_memory", lambda device: 1000)
    assert "of 4-bit copies" not in str(build.needs(shape, torch.float32, CPU, 1, 10))
    assert "of 4-bit copies" in str(build.needs(shape, torch.float32, CPU, 1, 10, twins=True))


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.9, 1.0])
def test_drafts_agree_as_often_as_asked(prompt, acceptance):
    prompt.repeat(2)
    text = prompt.tokens(141)
    planned = probes.plan(text, acceptance, prompt.vocabulary, seed=1)
    with std_decode.patched(prompt.model, draft_length=4, top_k_keys=32):
        with probes.forced_drafts(planned):
            assert torch.equal(prompt.tokens(141), text)
        stats = std_decode.last_stats(prompt.model)
    asked = sum(acceptance**i for i in range(5))
    assert stats.mean_accepted_length == pytest.approx(asked, rel=0.15)
    if acceptance in (0.0, 1.0):
        assert stats.accepted == acceptance * stats.drafted


def test_wrong_drafts_depend_on_the_seed_alone():
    text = torch.randint(0, 50, (3, 40))
    plans = [probes.plan(text, 0.75, 50, seed) for seed in (0, 0, 1)]
    assert torch.equal(plans[0], plans[1]) and not torch.equal(plans[0], plans[2])
    assert all(int((planned != text).sum()) == 30 for planned in plans)
    assert all(0 <= int(planned.min()) and int(planned.max()) < 50 for planned in plans)


def make_cell(prompt, **changes):
    given = dict(new_tokens=80, runs=1, seed=0, acceptance=[0.9], draft_length=[4])
    options = argparse.Namespace(
        **{**given, "top_k_keys": [32], "ways": decode.WAYS, "draft_weights": ["own"], **changes}
    )
    results = tables.Results(None, {})
    return cell.Cell(
        prompt, "tiny", options, results, CPU, 1.0, time.monotonic, time.monotonic() + 99
    )


def test_drafts_follow_what_verification_chooses(prompt):
    """Where that is not what was expected (as rounding has it in bfloat16)."""
    one = make_cell(prompt)
    text = prompt.tokens(80)
    one.dense = (text + (torch.arange(80) >= 20)) % prompt.vocabulary
    with std_decode.patched(prompt.model, draft_length=4, top_k_keys=32):
        planned, tokens = one.calibrate(0.9)
        assert torch.equal(tokens, text)
        assert int((planned != text).sum()) == 8
        assert std_decode.last_stats(prompt.model).mean_accepted_length > 3


def test_how_far_behind_a_wrong_token_is(prompt):
    prompt.repeat(2)
    one = make_cell(prompt)
    one.transformers("")
    got = one.expected.clone()
    assert one.behind(got) == 0 and one.same(one.expected, got) == "160 of 160"
    scores = prompt.generate(9, return_dict_in_generate=True, output_scores=True).scores
    second = scores[7].topk(2, dim=-1)
    got[1, 7] = second.indices[1, 1]
    got[1, 8:] = 0  # what comes after does not count
    distance = float(second.values[1, 0] - second.values[1, 1])
    assert one.behind(got) == pytest.approx(distance, rel=1e-3)
    assert one.same(one.expected, got) == "87 of 160"


def test_a_wrong_model_is_reported_and_not_timed(bench, monkeypatch):
    right = Decoding.accept
    monkeypatch.setattr(
        Decoding, "accept", lambda self, drafts, logits: right(self, drafts, logits.roll(1, -1))
    )
    status, records = bench()
    assert status == 1
    decoded = {record["what"]: record for record in of(records, "decode")}
    assert set(decoded) == WAYS
    for what, record in decoded.items():
        wrong = what.startswith("ours")
        assert record["status"].startswith("wrong: 0 of 20 tokens") == wrong
        assert ("ms" in record) != wrong
    assert {record["pass"] for record in of(records, "pass")} == {"step"}


def test_running_as_unpatched_is_reported_and_not_timed(bench, monkeypatch):
    monkeypatch.setattr("std_decode.generation.fallback_reason", lambda *_: "of this test")
    status, records = bench()
    ours = [record for record in of(records, "decode") if record["what"].startswith("ours")]
    assert status == 1 and len(ours) == 2
    assert all(record["status"] == "ran as unpatched: of this test" for record in ours)


def test_only_the_ways_asked_for(bench):
    _, records = bench("--ways", "drafts", "no-graphs")
    whats = {record["what"] for record in of(records, "decode")}
    assert whats == {"transformers generate", "ours, forced acceptance 0.2"}


def test_copy_bandwidth_is_measured():
    assert 0.01 < decode.copy_bandwidth(CPU) < 10000


def test_a_failure_costs_nothing_else(bench, monkeypatch):
    monkeypatch.setattr(prompts.Prompt, "static", lambda *_: 1 / 0)
    status, records = bench("--ways", "static", "drafts")
    states = {record["what"]: record["status"] for record in of(records, "decode")}
    assert len(states) == 3
    assert states.pop("transformers generate, static cache").startswith("failed: ZeroDivisionErr")
    assert status == 0 and set(states.values()) == {"ok"}  # a rival may fail
    monkeypatch.setattr(cell.Cell, "calibrate", lambda *_: 1 / 0)
    assert bench("--ways", "drafts")[0] == 1


def test_a_gpu_that_is_not_current_is_the_one_that_is_looked_at(monkeypatch):
    device, recorded = torch.device("cuda", 1), []
    event = SimpleNamespace(record=recorded.append)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", device))
    assert probes._now(device) is event and recorded == [("stream of", device)]
    properties = {
        device: SimpleNamespace(name="this", total_memory=1e9, multi_processor_count=2)
    }  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    assert environment.environment(device)["device"] == "this"


def test_what_comes_after_a_capture_that_could_not_be_undone_says_so(bench, monkeypatch):
    why = "an earlier capture failed and could not be undone (some error)"
    monkeypatch.setattr(graphs, "spoiled", why)
    monkeypatch.setattr(prompts.Prompt, "static", lambda *_: 1 / 0)
    status, records = bench("--ways", "static", "dense")
    found = of(records, "decode")
    assert status == 0 and [r["status"] == "ok" for r in found].count(False) == 1
    for record in found:
        assert record["note"].count(why) == 1
        assert why in tables._decode_cells(record, {})[-1]


def test_more_ways_on_a_gpu(prompt, monkeypatch):
    """What is tried there, and with which patch."""
    one = make_cell(prompt, acceptance=[0.5, 0.9])
    one.device, tried = SimpleNamespace(type="cuda"), []
    monkeypatch.setattr(one, "transformers", lambda name: setattr(one, "expected", 1))
    monkeypatch.setattr(one, "static", lambda name: tried.append((name, {}, ())))
    monkeypatch.setattr(one, "ours", lambda name, patch, **how: tried.append((name, patch, how)))
    for stage in cell.STAGES:
        one.run(stage)
    drafts = {"gamma": 4, "keys": 32}
    expected = [("transformers generate, static cache", {}, ())]
    for suffix, patch in (
        ("", {}),
        (", compiled", {"compile": True}),
        (", no graphs", {"cuda_graphs": False}),
    ):
        expected.append((f"ours, dense{suffix}", patch, {}))
        for asked in (0.5, 0.9):
            name = f"ours, forced acceptance {asked}{suffix}"
            expected.append((name, patch, {"acceptance": asked, **drafts}))
    assert sorted(tried, key=str) == sorted(expected, key=str)


def test_what_does_not_fit_the_time_box_is_listed(bench):
    status, records = bench("--seconds", "0")
    (only,) = of(records, "decode")
    assert status == 0 and only["status"] == "skipped: out of time"
    ticks = itertools.count()
    status, records = bench("--seconds", "5", clock=lambda: next(ticks))
    states = [(record["what"], record["status"]) for record in of(records, "decode")]
    done = [what for what, state in states if state == "ok"]
    assert status == 0 and done == ["transformers generate"]
    assert {what for what, state in states if state == "skipped: out of time"} == WAYS - {*done}


def test_what_compiles_has_time_for_its_layers(prompt, monkeypatch):
    """And never more than is left."""
    one, given = make_cell(prompt), []
    monkeypatch.setattr(probes, "at_most", given.append)
    monkeypatch.setattr(one.model.get_decoder().config, "num_hidden_layers", 28)
    one.deadline = time.monotonic() + 1000
    one.bounded()
    assert 1.5 * 55 < given[0] < 3 * 55 and one.late == "its first use took more than 128 s"
    one.deadline = time.monotonic() + 100
    one.bounded()
    assert 99 < given[1] <= 100 and one.late.startswith("out of time")


def test_a_first_use_is_interrupted():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(probes.OutOfTime):
        with probes.at_most(0.05):
            try:
                time.sleep(20)
            except Exception:  # as a compiler would
                pytest.fail("taken for an error")
    with probes.at_most(0.05):
        pass
    time.sleep(0.1)
    assert signal.getsignal(signal.SIGALRM) == before


def test_what_does_not_fit_in_memory_is_refused(bench, capsys, monkeypatch):
    monkeypatch.setattr(build, "free_memory", lambda device: 1000)
    assert bench() == (2, [])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "GB of weights" in error and "0.00 GB are free" in error
    small = build.needs(SHAPES["tiny"], torch.float32, CPU, 1, 170).total
    monkeypatch.setattr(build, "free_memory", lambda device: small + 1000)
    status, records = bench("--batch", "1", "64", "--seconds", "0")
    (large,) = of(records, "decode", 64)
    assert status == 0 and large["status"].startswith("skipped: does not fit: about 0.")
    assert of(records, "decode", 1)[0]["status"] == "skipped: out of time"


@pytest.mark.parametrize(
    "rows, kv, activations, counted",
    [
        (1, 100e6, 10e6, 210e6),  # a row is read beside what is kept of it
        (4, 400e6, 10e6, 500e6),  # decoding: a run's own, and the row that was read
        (4, 400e6, 800e6, 1000e6),  # reading takes more
    ],
)
def test_what_decoding_and_reading_need(rows, kv, activations, counted):
    needed = build.Needs(50_000_000, int(kv), int(activations), 0, rows=rows)
    assert needed.total == pytest.approx(1.1 * (50e6 + counted) + 2**26)


@pytest.mark.parametrize(
    "name, billions, kv",
    [("qwen2-vl-7b", 7.62, 57344), ("llava-onevision-7b", 7.62, 57344),
     ("llama-3-8b", 8.03, 131072)],
)  # fmt: skip
def test_shapes_are_those_of_real_models(name, billions, kv):
    shape = SHAPES[name]
    assert build.parameter_bytes(shape, torch.bfloat16) / 2e9 == pytest.approx(billions, abs=0.01)
    assert build.kv_bytes(shape, torch.bfloat16) == kv


@pytest.mark.parametrize("family", ["llava_onevision", "llama", "qwen3_vl", "qwen3_vl_moe"])
def test_families_decode(family):
    more = {"head_dim": 32} if family.startswith("qwen3") else {}
    more |= {"experts": 4, "experts_per_token": 2} if family.endswith("moe") else {}
    shape = Shape(family, 64, 2, 4, 2, 96, 128, 1e4, 0.2, **more)
    prompt = prompts.Prompt(build.random_model(shape, torch.float32, CPU, 0), 40, seed=0)
    one = make_cell(prompt, new_tokens=12)
    for stage in cell.STAGES:
        one.run(stage)
    states = {record["what"]: record["status"] for record in one.results.of("decode")}
    assert len(states) == 4 and set(states.values()) == {"ok"}
    weights = sum(parameter.nbytes for parameter in prompt.model.get_decoder().parameters())
    # Of the two tables of the vocabulary, which are as large, a step reads the second.
    assert one.weights == weights and one.weights > 2 * 4 * 64 * 96 * 3


def test_a_prompt_goes_on_as_if_it_had_been_read_at_once(prompt):
    prompt.repeat(3)
    whole = prompt.model.generate(prompt.ids, max_new_tokens=12, do_sample=False)[:, 151:]
    kept = [layer.keys.clone() for layer in prompt.cache.layers]
    static = prompt.static(12)
    for _ in range(2):
        assert torch.equal(prompt.tokens(12), whole)
        assert torch.equal(prompt.tokens(12, prompt.rewind(static)), whole)
    assert all(map(torch.equal, kept, (layer.keys for layer in prompt.cache.layers)))


def test_rows_of_a_prompt_share_memory_and_a_run_has_its_own(prompt, monkeypatch):
    """Else a batch would be in memory three times, and what fits into it would not fit."""
    one, three = prompt.nbytes, (prompt.repeat(3), prompt.ids, prompt.nbytes)
    assert three[2] == one and prompt.cache.layers[0].keys.shape[0] == 3
    prompt.repeat(1), prompt.repeat(3)
    assert torch.equal(prompt.ids, three[1])  # whatever was asked for before
    copied, plain = [], SparseToDenseCache.to_dynamic
    monkeypatch.setattr(
        SparseToDenseCache, "to_dynamic", lambda *a, **b: copied.append(1) or plain(*a, **b)
    )
    with std_decode.patched(prompt.model, draft_length=2, top_k_keys=32):
        told = prompt.tokens(8)
        assert copied == [1]
        with probes.unseen_cache():
            assert torch.equal(prompt.tokens(8), told)
    assert copied == [1]


def test_kernels_are_counted_and_added_up():
    def event(name, microseconds, device="CUDA", note=False):
        span = SimpleNamespace(elapsed_us=lambda: microseconds)
        kind = getattr(torch.autograd.DeviceType, device)
        return SimpleNamespace(
            name=name, device_type=kind, time_range=span, is_user_annotation=note
        )

    events = [
        event("gemm", 1500), event("softmax", 300), event("Memcpy DtoD", 150),
        event("Memset (Device)", 50), event("cudaLaunchKernel", 9000, "CPU"),
        event("a range of the user's", 7000, note=True),
    ]  # fmt: skip
    assert probes.tally(events, "cuda") == probes.Profile(count=2, busy_ms=2.0)
    assert probes.tally(events[4:], "cuda") is None  # it saw nothing: not even a kernel


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch", "0"], "--batch: is 0, expected at least 1"),
        (["--acceptance", "1.5"], "--acceptance: is 1.5, expected 0 to 1"),
        (["--draft-length", "x"], "--draft-length: is x, expected 1 to 63"),
    ],
)
def test_wrong_arguments(bench, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        bench(*arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shape", "gpt"], "--shape is gpt, expected one of demo, qwen2-vl-7b"),
        (["--device", "tpu"], "--device is tpu, expected cuda or cpu"),
    ],
)
def test_settings_that_are_not_there(bench, capsys, arguments, message):
    assert bench(*arguments) == (2, [])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


# The demo model

DEMO = ["--shape", "demo", "--context", "256", "--new-tokens", "21", "--top-k-keys", "8"]


def test_the_demo_model_from_end_to_end(bench, tmp_path, monkeypatch):
    """Acceptance is its own: nothing is forced, and the clips are narrated."""
    monkeypatch.setattr(probes, "forced_drafts", None)
    ways = ("--ways", "dense", "drafts", "lookup", "--batch", "1", "2")
    status, found = bench(*DEMO, *ways)
    assert status == 0
    for batch in (1, 2):
        decoded = {record["what"]: record for record in of(found, "decode", batch)}
        expected = {"transformers generate", "ours, dense", "ours, measured acceptance"}
        assert set(decoded) == expected | ({cell.LOOKUP} if batch == 1 else set())
        for record in decoded.values():
            assert record["status"] == "ok" and record["shape"] == "demo"
            assert record["same_as_transformers"] == f"{21 * batch} of {21 * batch}"
            assert record["attributes_right"] > 0.5
        drafting = decoded["ours, measured acceptance"]
        assert drafting["acceptance_is"] == "measured" and "acceptance" not in drafting
        assert 0 < drafting["accepted_of_drafted"] <= 1 < drafting["tokens_per_pass"] <= 5
        stages = drafting["stage_ms"]
        assert all(stages[name] > 0 for name in ("draft", "verify", "select"))
    first = {record["what"]: record["first_token_s"] for record in of(found, "first")}
    assert set(first) == {"transformers generate", "ours, dense", "ours, drafting"}
    (path,) = tmp_path.glob("decode-*.md")
    assert "acceptance is measured" in path.read_text() and "is forced" not in path.read_text()
    (picture,) = tmp_path.glob("decode-*.png")
    assert picture.stat().st_size > 10_000


@pytest.fixture(scope="module")
def narrations():
    model = build.demo_model(torch.float32, CPU)
    return prompts.DemoPrompt(model, 256, seed=3, events=4)


def test_a_narration_goes_on_as_if_the_clip_had_been_read_at_once(narrations):
    narrations.repeat(2)
    whole = narrations.from_nothing(21)
    assert torch.equal(narrations.tokens(21)[:1], whole)
    assert torch.equal(narrations.tokens(21, narrations.static(21))[:1], whole)
    right = narrations.right(narrations.tokens(21))
    assert right > 0.5 > narrations.right(narrations.tokens(21).flip(0))  # each row its own clip
    with std_decode.patched(narrations.model, draft_length=4, top_k_keys=16):
        assert torch.equal(narrations.tokens(21)[:1], whole)
        assert std_decode.last_stats(narrations.model).reused_tokens == narrations.cached


def test_what_prompt_lookup_did_is_counted(narrations):
    lengths = []
    hook = narrations.model.register_forward_pre_hook(
        lambda model, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    look = probes.Lookup(CPU)
    with look.watch():
        tokens = narrations.from_nothing(21, prompt_lookup_num_tokens=4)
    hook.remove()
    total = narrations.whole["input_ids"].shape[1] + tokens.shape[1]
    look.settle(total)
    # Each pass but the first reads the pending token and what was looked up.
    assert look.passes == len(lengths) - 1 and look.drafted == sum(lengths[1:]) - look.passes
    assert look.passes <= look.tokens <= 20 and 0 < look.seconds < 60
    # What the first pass drafts and emits does not count: it reads the prompt.
    look._begun, look._ended = [(0.0, 10, 4), (1.0, 12, 3), (2.0, 14, 2)], 3.0
    look.settle(15)
    assert (look.seconds, look.tokens, look.passes, look.drafted) == (2.0, 3, 2, 5)
    with pytest.raises(RuntimeError, match="one pass for all"):
        once = probes.Lookup(CPU)
        with once.watch():
            narrations.from_nothing(1, prompt_lookup_num_tokens=4)
        once.settle(total)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--context", "82"], "--context is 82, expected a multiple of 4"),
        (["--context", "12"], "--context is 12, expected 16 to 16384"),
        (["--context", "20000"], "--context is 20000, expected 16 to 16384"),
        (["--new-tokens", "400", "--context", "4000"], "--new-tokens is 400, expected at most"),
    ],
)
def test_clips_that_the_camera_cannot_film(bench, capsys, arguments, message):
    changed = ["--context", "80", *arguments]
    if "12" in arguments:
        with pytest.raises(SystemExit):  # too short for any prompt
            bench(*DEMO, *changed)
        return
    assert bench(*DEMO, *changed) == (2, [])
    assert message in capsys.readouterr().err


# Going on


def test_it_goes_on_where_it_was_cut_off(bench, tmp_path, monkeypatch):
    ways = ("--ways", "dense", "drafts", "--context", "150", "--new-tokens", "12")
    _, whole = bench(*ways)
    (path,) = tmp_path.glob("decode-*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    tried, plain = [], cell.Cell.guard
    monkeypatch.setattr(
        cell.Cell,
        "guard",
        lambda self, name, *more: tried.append(name) or plain(self, name, *more),
    )
    # Nothing is left to do: nothing is done.
    assert bench(*ways, "--resume")[1] == whole and tried == []
    # The passes of the last way were not all written.
    cut = max(n for n, line in enumerate(lines) if '"kind": "pass"' in line)
    path.write_text("".join(lines[:cut]) + lines[cut][:30])
    status, found = bench(*ways, "--resume")
    assert status == 0 and found[:cut] == whole[:cut] and len(found) == len(whole)
    assert tried == ["transformers generate", "ours, forced acceptance 0.2"]
    last = ("what", "pass", "context")
    assert [found[cut][x] for x in last] == [whole[cut][x] for x in last]
    assert found[cut] != whole[cut]
    # Another seed is another run.
    assert bench(*ways, "--resume", "--seed", "5")[1][1] != whole[1]


def test_a_machine_too_busy_to_time_is_told(prompt, monkeypatch):
    one = make_cell(prompt, new_tokens=12, ways=["dense"])
    spans = iter([0.01] * 4 + [1.0] * 90)
    monkeypatch.setattr(probes, "seconds", lambda call, device: call() is None or next(spans))
    monkeypatch.setattr(one, "first_use", lambda call: (0.0, call()))
    one.run(0)
    states = [record["status"] for record in one.results.of("decode")]
    assert states[-1] == "skipped: the machine is too busy to time it" and not one.results.bad


def test_what_came_of_other_cells_stays_when_a_run_goes_on(tmp_path):
    """`bench gpu` times one row first, and many later, into one file."""
    about = environment.environment(torch.device("cpu"))
    one, many = (dict(kind="decode", shape="x", dtype="y", context=9, batch=b) for b in (1, 8))
    found = [{**where, "what": "dense", "status": "ok"} for where in (one, many)]
    found += [{**where, "what": "drafts", "status": "wrong: 3 of 9"} for where in (one, many)]
    path = records.file_of(tmp_path, "decode", about["device"])
    path.write_text("".join(map(records.line_of, (about, *found))))
    again = tables.Results(tmp_path, about, True, {("x", 9, 8)})
    kept = [(r["batch"], r["what"]) for r in again.records[1:]]
    assert kept == [(1, "dense"), (8, "dense"), (1, "drafts")]

"""What goes wrong in mid-call leaves the model as it was: each row of docs/faults.md."""

import copy
import os
import re
import signal
import sys
import threading
from linecache import getline
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

import std_decode
from std_decode.model import attention, cache, offloaded, one_read, running_pass, switch
from std_decode.model.layer_group import LayerGroup
from std_decode.model.link import Link
from std_decode.passes import engine
from std_decode.passes.engine import Engine
from std_decode.weights import quantize, twin_cache
from std_decode.weights.rows import Rows
from tests.decode.observers import Streams, Watches, interposed
from tests.decode.weights.links import offload, traces
from tests.reliability.trials import Listens

PATCH = dict(draft_length=4, top_k_keys=8)
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def state(model):
    """All that a broken-off call could leave behind."""
    config = model.get_decoder().config
    kept = {name: value for name, value in vars(model).items() if not name.startswith("_modules")}
    kinds = [type(module) for module in model.modules()]
    return type(model), kept, config._attn_implementation, kinds, running_pass._stance


class Survives:
    """A case whose model has to generate as ever, patched and unpatched, after what happens."""

    def __init__(self, case, **options):
        self.case, self.model = case, case.model
        self.unpatched, self.expected = state(case.model), case.generate()
        std_decode.patch(self.model, **{**PATCH, **options})
        assert torch.equal(case.generate(), self.expected)

    def check(self):
        assert self.model.get_decoder().config._attn_implementation == self.unpatched[2]
        assert not switch._switched and running_pass.running_pass() is None
        assert torch.equal(self.case.generate(), self.expected)
        stats = std_decode.last_stats(self.model)
        assert stats.fallback is None and stats.rounds > 0
        std_decode.unpatch(self.model)
        assert state(self.model) == self.unpatched
        assert torch.equal(self.case.generate(), self.expected)


@pytest.fixture
def survives(make_case):
    return lambda family="qwen2_vl", rows=2, **options: Survives(
        make_case(family, seed=3, rows=rows, eos=rows > 1), **options
    )


def fails_at(call, error, function):
    """`function` that raises `error` at its `call`-th call."""
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return function(*args, **kwargs)

    return failing


# --- out of memory ---


def test_out_of_memory_while_capturing(survives, recording, monkeypatch):
    from std_decode.passes import graphs

    monkeypatch.setattr(graphs, "capture", fails_at(2, NO_MEMORY, graphs.capture))
    with pytest.warns(UserWarning, match="could not be captured .CUDA out of memory"):
        kept = survives()
        kept.case.generate()
    assert "out of memory" in std_decode.last_stats(kept.model).eager_because
    kept.check()


@pytest.mark.parametrize("where", ["patch", "attach"])
def test_out_of_memory_while_quantising(make_case, monkeypatch, where):
    monkeypatch.setitem(make_case.text, "vocab_size", 128)
    case = make_case("llama", seed=3)
    before, expected = state(case.model), case.generate()
    with monkeypatch.context() as patches:
        if where == "patch":
            patches.setattr(quantize, "quantize", fails_at(3, NO_MEMORY, quantize.quantize))
        else:
            from std_decode.weights.draft_weights import DraftWeights

            patches.setattr(DraftWeights, "attach", fails_at(1, NO_MEMORY, DraftWeights.attach))
        with pytest.raises(torch.OutOfMemoryError):
            std_decode.patch(case.model, draft_weights="int4", **PATCH)
    assert state(case.model) == before and torch.equal(case.generate(), expected)
    Survives(case, draft_weights="int4").check()


def test_out_of_memory_while_weights_are_quantised_again(make_case, monkeypatch):
    """They changed after patch: drafts read the model's own weights then."""
    monkeypatch.setitem(make_case.text, "vocab_size", 128)
    kept = Survives(make_case("llama", seed=3), draft_weights="int4")
    with torch.no_grad():
        kept.model.lm_head.weight.mul_(1.0)
    with monkeypatch.context() as patches:
        patches.setattr(quantize, "quantize", fails_at(1, NO_MEMORY, quantize.quantize))
        assert torch.equal(kept.case.generate(), kept.expected)
    assert "out of memory" in std_decode.last_stats(kept.model).draft_weights_because
    assert std_decode.last_stats(kept.model).draft_weights is None
    kept.check()


@pytest.fixture
def on_disk(make_case, monkeypatch, tmp_path):
    """An unpatched case whose weights are on a disk, its link, and its tokens."""
    monkeypatch.setitem(make_case.text, "vocab_size", 128)
    case = make_case("llama", seed=3)
    expected = case.generate()
    return case, offload(case.model, "disk", tmp_path / "weights"), expected


def test_out_of_memory_while_offloaded_weights_are_copied(on_disk, monkeypatch):
    case, _, expected = on_disk
    before = traces(case.model)
    with monkeypatch.context() as patches:
        patches.setattr(Rows, "__init__", fails_at(2, NO_MEMORY, Rows.__init__))
        with pytest.raises(torch.OutOfMemoryError):
            std_decode.patch(case.model, draft_weights="int4", **PATCH)
    assert traces(case.model) == before
    with std_decode.patched(case.model, draft_weights="int4", **PATCH):
        twins = case.model._std_decode.draft_weights.twins
        twins.offload.drop()  # as in a copy of the model
        with monkeypatch.context() as patches:
            patches.setattr(Rows, "__init__", fails_at(2, NO_MEMORY, Rows.__init__))
            assert torch.equal(case.generate(), expected)
        stats = std_decode.last_stats(case.model)
        assert stats.draft_weights is None and "out of memory" in stats.draft_weights_because
        assert twins.nbytes == 0
        assert torch.equal(case.generate(), expected)
        assert std_decode.last_stats(case.model).draft_weights == "int4"
    assert traces(case.model) == before and torch.equal(case.generate(), expected)


@pytest.mark.parametrize("by", ["a thread", "the pass itself"])
def test_offloaded_weights_that_cannot_be_read(on_disk, by):
    case, link, expected = on_disk
    broken = "model.layers.1.mlp.up_proj.weight"
    before, plain = traces(case.model), link.weights
    std_decode.patch(case.model, draft_weights="int4", **PATCH)
    if by == "a thread":
        case.generate()  # from then on it is known what comes next

    class Broken(dict):
        def __getitem__(self, name):
            if name == broken:
                assert (threading.current_thread() is threading.main_thread()) == (
                    by != "a thread"
                )
                raise OSError("input/output error")
            return plain[name]

    link.weights = Broken()
    if by != "a thread":
        case.model._std_decode.draft_weights.twins.offload.ahead.clear()
    with pytest.raises(OSError, match="input/output error"):
        case.generate()
    link.weights = plain
    assert torch.equal(case.generate(), expected)
    std_decode.unpatch(case.model)
    assert traces(case.model) == before and not link.live


@pytest.mark.parametrize(
    "where", ["embed_tokens", "layers.1.input_layernorm", "layers.1.mlp.up_proj"]
)
def test_an_interrupt_while_weights_are_lent(on_disk, monkeypatch, where):
    case, _, expected = on_disk
    before = traces(case.model)
    for goes_on in (True, False):
        std_decode.patch(case.model, draft_weights="int4", **PATCH)
        module = case.model.model.get_submodule(where)
        with monkeypatch.context() as patches:
            # Of the prompt's pass, of the first draft, and of the second.
            failing = fails_at(3, KeyboardInterrupt, module._old_forward)
            patches.setattr(module, "_old_forward", failing)
            with pytest.raises(KeyboardInterrupt):
                case.generate()
        if goes_on:
            assert torch.equal(case.generate(), expected)
        std_decode.unpatch(case.model)
        assert traces(case.model) == before and torch.equal(case.generate(), expected)


def test_a_disk_too_full_for_4_bit_weights(on_disk, monkeypatch, tmp_path):
    case, link, expected = on_disk
    before, file = traces(case.model), tmp_path / "copies"
    given = dict(draft_weights="int4", draft_weights_cache=file, **PATCH)
    usage = SimpleNamespace(free=1000)
    with monkeypatch.context() as patches:
        patches.setattr(twin_cache.shutil, "disk_usage", lambda path: usage)
        patches.setattr(quantize, "quantize", None)  # it is said before copies are made
        with pytest.raises(OSError, match="0.00 GB, expected at most the 0.00 GB free on its"):
            std_decode.patch(case.model, **given)
    full = SafetensorError("I/O error: No space left on device (os error 28)")
    with monkeypatch.context() as patches:
        patches.setattr(twin_cache, "save_file", fails_at(1, full, twin_cache.save_file))
        with pytest.raises(OSError, match="copies', which could not be written .*No space"):
            std_decode.patch(case.model, **given)
    assert traces(case.model) == before
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    with std_decode.patched(case.model, **given):
        assert torch.equal(case.generate(), expected)
    assert file.exists()


def test_killed_while_4_bit_weights_are_written(on_disk, monkeypatch, tmp_path):
    case, link, expected = on_disk
    file = tmp_path / "copies"
    given = dict(draft_weights="int4", draft_weights_cache=file, **PATCH)
    with std_decode.patched(case.model, **given):
        pass
    made = file.read_bytes()
    link.weights = {**link.weights, "lm_head.weight": 2 * link.weights["lm_head.weight"]}
    child = os.fork()
    if child == 0:
        twin_cache.os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        std_decode.patch(case.model, **given)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert file.read_bytes() == made
    assert [path.name[:12] for path in tmp_path.glob(".*")] == [".std_decode-"]
    with std_decode.patched(case.model, **given):
        case.generate()
        assert std_decode.last_stats(case.model).draft_weights == "int4"
    assert file.read_bytes() != made


@pytest.mark.parametrize(
    "where",
    [
        (cache.BufferLayer, "lazy_initialization", 2),  # the buffers of the second layer
        (cache.BufferLayer, "grow", 2),  # a larger one of it, in mid-answer
        (engine, "group_layers", 1),  # index lists
        (LayerGroup, "make_room", 2),  # larger scores, in mid-answer
        (Engine, "start", 1),
        (engine, "select_topk", 2),
        (attention, "sparse_attention", 5),  # a draft's workspace
        (one_read, "attend", 5),
    ],
    ids=lambda where: where[1],
)
def test_out_of_memory_while_allocating(survives, monkeypatch, where):
    owner, name, call = where
    monkeypatch.setattr(cache, "BUCKET", 16)
    monkeypatch.setattr("std_decode.generation.MOST_NEW_TOKENS", 2)
    kept = survives(rows=1)
    with monkeypatch.context() as patches:
        patches.setattr(owner, name, fails_at(call, NO_MEMORY, getattr(owner, name)))
        with pytest.raises(torch.OutOfMemoryError):
            kept.case.generate(max_new_tokens=40)
    kept.check()


@pytest.mark.parametrize("half", ["before", "keys"])
@pytest.mark.parametrize("given", ["new", "old"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_out_of_memory_while_the_callers_cache_is_written(
    make_case, monkeypatch, family, given, half
):
    """Its layers are all as long as they were, and it can be gone on from."""
    case = make_case(family, seed=4)
    second = torch.randint(7, 99, (1, 9))

    def begin(model):
        past = DynamicCache(config=model.get_decoder().config)
        told = case.inputs["input_ids"]
        if given == "old":
            told = model.generate(**case.inputs, max_new_tokens=4, past_key_values=past)
        return torch.cat([told, second], 1), past

    def ask(ids, past):
        # A mask, because a generated token may be that of padding.
        inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        return case.model.generate(**inputs, past_key_values=past, max_new_tokens=6)

    expected = ask(*begin(case.model))
    with std_decode.patched(case.model, **PATCH):
        ids, past = begin(case.model)
        before = [(layer.get_seq_length(), *shapes(layer)) for layer in past.layers]
        with monkeypatch.context() as patches:
            kind = type(past.layers[1])
            patches.setattr(kind, "update", broken_update(kind.update, past.layers[1], half))
            with pytest.raises(torch.OutOfMemoryError):
                ask(ids, past)
        assert [(layer.get_seq_length(), *shapes(layer)) for layer in past.layers] == before
        got = ask(ids, past)
        assert std_decode.last_stats(case.model).fallback is None
    assert torch.equal(got, expected)


@pytest.mark.parametrize("at", [1, 2, 12])
def test_out_of_memory_while_offloaded_keys_come(make_case, monkeypatch, at):
    """The first two are those that the caller's cache held."""
    kept, past = Survives(make_case("llama", seed=10), kv_cache="offloaded"), DynamicCache()
    with torch.no_grad():
        kept.model(kept.case.inputs["input_ids"][:, :40], past_key_values=past)
    before = copy.deepcopy(past)
    with monkeypatch.context() as patches:
        patches.setattr(Link, "fetch", fails_at(at, NO_MEMORY, Link.fetch))
        with pytest.raises(torch.OutOfMemoryError):
            kept.case.generate(past_key_values=past)
    for old, new in zip(before.layers, past.layers, strict=True):
        assert torch.equal(old.keys, new.keys) and torch.equal(old.values, new.values)
    assert torch.equal(kept.case.generate(past_key_values=past), kept.expected)
    kept.check()


def test_too_little_memory_for_offloaded_keys(make_case, monkeypatch):
    """On the host for all layers' of the prompt, and on the device (the same here) for two."""
    kept, past = Survives(make_case("llama", seed=10), kv_cache="offloaded"), DynamicCache()
    token = 2 * 4 * make_case.text["num_key_value_heads"] * 16  # of a layer, head dim 16
    need = 3 * 90 * token + 2 * cache.bucket(90) * token
    with monkeypatch.context() as patches:
        patches.setattr(offloaded, "free_memory", lambda device: need - 1)
        with pytest.raises(
            MemoryError, match="1 x 90 tokens in 3 layers take .* memory of cpu, exp"
        ):
            kept.case.generate(past_key_values=past)
        assert past.layers == []
        patches.setattr(offloaded, "free_memory", lambda device: need)
        assert torch.equal(kept.case.generate(), kept.expected)
    kept.check()


def test_out_of_memory_while_a_cache_of_no_layers_is_written(make_case, monkeypatch):
    case = make_case("llama", seed=4)
    expected, past = case.generate(), DynamicCache()
    update = DynamicLayer.update
    with std_decode.patched(case.model, **PATCH):
        with monkeypatch.context() as patches:
            patches.setattr(DynamicLayer, "update", fails_at(2, NO_MEMORY, update))
            with pytest.raises(torch.OutOfMemoryError):
                case.generate(past_key_values=past)
        assert past.layers == []
        assert torch.equal(case.generate(past_key_values=past), expected)
        assert std_decode.last_stats(case.model).fallback is None


def shapes(layer):
    return [tuple(x.shape) if isinstance(x, torch.Tensor) else None
            for x in (getattr(layer, "keys", None), getattr(layer, "values", None))]  # fmt: skip


def broken_update(update, layer, half):
    """Memory ends before the second layer's keys, or between them and the values."""

    def broken(self, keys, values, *args, **kwargs):
        if self is not layer:
            return update(self, keys, values, *args, **kwargs)
        if half == "keys":
            old = self.values if self.is_initialized else None
            update(self, keys, values, *args, **kwargs)
            self.values = old
        raise NO_MEMORY

    return broken


# --- code of the caller's ---


class Boom(Exception):
    pass


class ExplodingProcessor(Watches):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def __call__(self, input_ids, scores):
        scores = super().__call__(input_ids, scores)
        if len(self.calls) == self.call:
            raise Boom
        return scores


class ExplodingCriterion(Listens):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def __call__(self, input_ids, scores, **more):
        ended = super().__call__(input_ids, scores, **more)
        if len(self.calls) == self.call:
            raise Boom
        return ended


class ExplodingStream(Streams):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def put(self, value):
        super().put(value)
        if len(self.calls) == self.call:
            raise Boom


@pytest.mark.parametrize("call", [1, 4, 9])
@pytest.mark.parametrize("where", ["streamer", "processor", "criterion"])
def test_an_exception_of_the_callers(survives, where, call):
    kept = survives(rows=1 if where == "streamer" else 3)
    if where == "streamer":
        options = dict(streamer=ExplodingStream(call))
    elif where == "processor":
        options = dict(logits_processor=LogitsProcessorList([ExplodingProcessor(call)]))
    else:
        options = dict(stopping_criteria=StoppingCriteriaList([ExplodingCriterion(call)]))
    with pytest.raises(Boom):
        kept.case.generate(**options)
    kept.check()


# --- Ctrl-C ---

ROOT = str(Path(std_decode.__file__).parent)


def interrupted_at(line, call):
    """Run `call`, with Ctrl-C at the `line`-th line of ours that it comes to.

    Returns:
        Whether it came so far.
    """
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if not frame.f_code.co_filename.startswith(ROOT):
            return None
        # `try:` is no instruction: no signal is handled there, though the line is traced.
        if event == "line" and getline(frame.f_code.co_filename, frame.f_lineno).strip() != "try:":
            seen += 1
            if seen == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def interrupt_everywhere(case, lines, every=False, **options):
    expected, before = case.generate(), state(case.model)
    std_decode.patch(case.model, **PATCH)
    for line in lines:
        reached = interrupted_at(line, lambda: case.generate(**options))
        assert torch.equal(case.generate(), expected), line
        if not every:  # the very line that tidies up may be broken off: then unpatch does
            assert case.model.get_decoder().config._attn_implementation == before[2], line
            assert running_pass.running_pass() is None, line
        if not reached:
            break
    std_decode.unpatch(case.model)
    assert state(case.model) == before
    assert torch.equal(case.generate(), expected)


# Lines are traced where a `with` ends, too, before its lock is released, where no signal is ever
# handled (after calls and jumps back it is). The lock may stay held then: one of the test's own.
# Multiples of a prime, so as to come to all parts of a round.
@pytest.mark.parametrize("mode", ["ragged", "lockstep"])
def test_an_interrupt_at_any_line(make_case, mode, monkeypatch):
    monkeypatch.setattr(switch, "_switch_lock", threading.RLock())
    monkeypatch.setattr(running_pass, "_stance_lock", threading.RLock())
    case = make_case("llama", seed=5, rows=2, eos=True, max_new_tokens=12)
    options = dict(do_sample=True) if mode == "ragged" else dict(
        logits_processor=LogitsProcessorList([Watches()])
    )  # fmt: skip
    interrupt_everywhere(case, range(1, 100_000, 397), **options)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("mode", ["ragged", "lockstep"])
def test_an_interrupt_at_every_line(make_case, mode, monkeypatch):
    monkeypatch.setattr(switch, "_switch_lock", threading.RLock())
    monkeypatch.setattr(running_pass, "_stance_lock", threading.RLock())
    case = make_case("llama", seed=5, max_new_tokens=6)
    options = dict(do_sample=True) if mode == "ragged" else dict(
        logits_processor=LogitsProcessorList([Watches()])
    )  # fmt: skip
    interrupt_everywhere(case, range(1, 100_000, 3), every=True, **options)


def test_a_real_interrupt_in_mid_round(survives, monkeypatch):
    kept = survives()
    plain = attention.sparse_attention

    def pressed(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return plain(*args, **kwargs)

    with monkeypatch.context() as patches:
        patches.setattr(attention, "sparse_attention", pressed)
        # A shell that starts a job in the background has it ignore the signal.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                kept.case.generate()
        finally:
            signal.signal(signal.SIGINT, before)
    kept.check()


# --- threads and processes ---


@pytest.mark.parametrize("captures", [False, True])
def test_two_threads_on_one_model(request, make_case, captures):
    if captures:
        request.getfixturevalue("recording")
    case = make_case("qwen2_vl", seed=6, rows=2, eos=True, max_new_tokens=24)
    expected = case.generate()
    std_decode.patch(case.model, **PATCH)
    got, start = [], threading.Barrier(3)

    def work():
        start.wait()
        got.extend(case.model.generate(**case.inputs, **case.options) for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 9 and all(torch.equal(tokens, expected) for tokens in got)
    assert (case.model._std_decode.engines.idle is not None) == captures
    std_decode.unpatch(case.model)
    assert not switch._switched and torch.equal(case.generate(), expected)


def test_an_engine_too_many_is_released(survives, recording, monkeypatch):
    """Two calls that ended side by side: one engine waits for the next, the other is let go."""
    kept = survives()
    engines = kept.model._std_decode.engines
    first, released = engines.idle, []
    monkeypatch.setattr(Engine, "release", lambda self: released.append(self))
    engines.idle = None  # as if a second call had it
    kept.case.generate()
    engines.idle, second = first, engines.idle
    second.finish = lambda: None
    engines.put_back(second)
    assert engines.idle is second and released == [first]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("moment", ["between calls", "while another thread is in a pass"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork(survives, moment):
    kept = survives()
    if moment == "between calls":
        assert in_a_child(kept) == 0
        kept.check()
        return
    inside, go_on = threading.Event(), threading.Event()

    def stop(*_, **__):
        inside.set()
        go_on.wait(60)

    with interposed(kept.model.model.language_model.layers[1], stop):
        other = threading.Thread(target=kept.case.generate)
        other.start()
        inside.wait(60)
    held = threading.Event()

    def hold():  # as a thread may at any time, though never for long
        with switch._switch_lock, running_pass._stance_lock:
            held.set()
            go_on.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    status = in_a_child(kept)
    go_on.set()
    other.join()
    holder.join()
    assert status == 0
    kept.check()


def in_a_child(kept):
    """Exit status of a child process that generates, patched and unpatched."""
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout has its own
            signal.alarm(30)  # ends a child that hangs
            right = torch.equal(kept.case.generate(), kept.expected)
            kept.model._std_decode.engines.calls.clear()  # the parent's other thread's
            std_decode.unpatch(kept.model)
            right &= torch.equal(kept.case.generate(), kept.expected)
            right &= running_pass._stance is None
            os._exit(0 if right else 1)
        except BaseException:
            os._exit(2)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("who", ["streamer", "thread"])
def test_unpatch_during_generate(survives, who):
    kept, errors = survives(rows=1), []

    class Unpatches(Streams):
        def put(self, value):
            super().put(value)
            if len(self.calls) != 4:
                return
            if who == "streamer":
                refused()
            else:
                thread = threading.Thread(target=refused)
                thread.start()
                thread.join()

    def refused():
        with pytest.raises(RuntimeError, match="has 1 generate calls under way.*wait") as error:
            std_decode.unpatch(kept.model)
        errors.append(error)

    got = kept.case.generate(streamer=Unpatches())
    assert torch.equal(got, kept.expected) and len(errors) == 1
    kept.check()


def test_patch_during_generate(make_case):
    """The call under way goes on as it began."""
    case = make_case("qwen2_vl", seed=7)
    expected = case.generate()

    class Patches(Streams):
        def put(self, value):
            super().put(value)
            if len(self.calls) == 4:
                std_decode.patch(case.model, **PATCH)

    assert torch.equal(case.generate(streamer=Patches()), expected)
    assert torch.equal(case.generate(), expected)
    std_decode.unpatch(case.model)
    assert torch.equal(case.generate(), expected)


# --- the table ---


def test_each_row_of_the_table_is_a_test():
    table = (Path(__file__).parents[2] / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    named = [re.findall(r"`(test_\w+)`", row.rpartition(" | ")[2]) for row in rows]
    assert all(named), "a row without a test"
    tests = {name for name in globals() if name.startswith("test_")}
    others = Path(__file__).parent.glob("test_*.py")
    known = {name for file in others for name in re.findall(r"^def (test_\w+)", file.read_text(
        encoding="utf-8"), re.M)}  # fmt: skip
    told = {name for names in named for name in names}
    assert told <= known, told - known
    assert tests - {"test_each_row_of_the_table_is_a_test"} <= told, tests - told

"""Right kernels are timed, wrong ones refused; rivals compute what they are said to."""

import inspect
import json
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import std_kernels as sk
from bench.__main__ import main
from bench.kernels import (
    checks,
    libraries,
    ops,
    points,
    recurrent,
    rivals,
    runner,
    tables,
    timing,
)
from bench.kernels.points import OPS, Point
from bench.models.dimensions import Recurrent
from std_kernels import reference

CPU = torch.device("cpu")
SIZES = ["--shape", "tiny", "--batch", "3", "--context", "256", "--tokens", "1", "4",
         "--top-k-keys", "16"]  # fmt: skip


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(timing, "CPU_ROUNDS", (1, 1))
    few = replace(points.SHAPES["tiny"], recurrent=Recurrent(2, 4))
    monkeypatch.setitem(points.KNOWN_SHAPES, "tiny-hybrid", few)
    monkeypatch.setattr(points, "HYBRIDS", ("tiny-hybrid",))
    monkeypatch.setattr(timing, "CPU_CACHE_BYTES", 1 << 12)
    copy = ops.copy_case
    monkeypatch.setattr(runner, "copy_case", lambda device, _: copy(device, 1 << 16))


@pytest.fixture(autouse=True)
def flex_uncompiled(monkeypatch):
    """Compiling takes seconds a size; test_quick does."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(rivals, "_compiled_flex", lambda device: flex_attention)


def bench(*options):
    return main(["kernels", *SIZES, *map(str, options)])


def records(folder, name="kernels"):
    lines = (folder / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_what_it_writes(tmp_path, capsys):
    assert bench("--out", tmp_path, "--name", "cpu") == 0
    about, copy, *found = records(tmp_path, "cpu")
    assert about["kind"] == "environment" and about["threads"] == torch.get_num_threads()
    assert about["absent"] == list(libraries.LIBRARIES) and about["dtype"] == "float32"
    assert copy["op"] == "copy" and copy["of_copy"] == 1
    assert {record["op"] for record in found} == set(OPS)
    assert {record["status"] for record in found} == {"ok"}
    for record in found:
        assert 0 < record["cold_p20_ms"] <= record["cold_ms"] <= record["cold_p80_ms"]
        assert record["of_copy"] == pytest.approx(record["gb_per_s"] / copy["gb_per_s"])
        assert record["gb_per_s"] == pytest.approx(record["bytes"] / record["cold_ms"] / 1e6)
        assert ("ours_takes" in record) == (record["what"] != "ours")
    named = {record["what"] for record in found} - {"ours"}
    on_a_gpu = {"sdpa-efficient", "sdpa-cudnn", "int4pack_mm", *libraries.LIBRARIES}
    on_a_gpu |= {"varlen", "varlen-paged", "flashinfer+ties"}
    assert named == set(rivals.NAMES) - on_a_gpu
    text = (tmp_path / "cpu.md").read_text()
    assert all(word in text for word in (*OPS, *named, "not installed: flash-attn"))
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "written to" in capsys.readouterr().out


def shift(monkeypatch, name, change):
    """Replace an op of the library by itself with changed arguments or a changed result."""
    right = getattr(sk, name)
    monkeypatch.setattr(sk, name, lambda *given, **options: change(right, *given, **options))


def one_key_less(right, query, key, value, kv_len, *rest):
    return right(query, key, value, kv_len - 1, *rest)


def middle_row(right, query, key, value, kv_len, *rest):
    results = right(query, key, value, kv_len, *rest)
    results[0][1] *= 1.01
    return results


def no_first_key(right, query, key, value, kv_len, *rest):
    return right(query, key, value, kv_len, *rest, kv_start=torch.ones_like(kv_len))


def wrong_lse(right, *given):
    out, lse = right(*given)
    return out, lse + 1e-3


def lost_scores(right, *given):
    *rest, scores = right(*given)
    return *rest, torch.cat((scores[..., :-1], scores[..., :1] * 0), -1)


def lost_index(right, query, key, value, indices, *rest):
    return right(query, key, value, indices[..., 1:], *rest)


def shorter_tail(right, query, key, value, indices, tail_start, kv_len):
    return right(query, key, value, indices, tail_start + 1, kv_len)


def no_last_query(right, query, key, kv_len):
    return right(query[:, :, :-1], key, kv_len - 1)


def last_of_equals(right, scores, k):
    """Takes the last positions among equal scores; and one row is not sorted."""
    return scores.shape[-1] - 1 - right(scores.flip(-1), k).flip(-1)


def other_columns(right, given, packed, scales):
    return right(given.roll(1, -1), packed, scales)


def no_last_accepted(right, query, key, value, g, beta, state, *lengths):
    before = query.shape[1] - 1
    beta = torch.cat((beta[:, :before], 0 * beta[:, :1], beta[:, before + 1 :]), 1)
    return right(query, key, value, g, beta, state, *lengths)


def newest_states(right, *given):
    out = right(*given)
    right(*given[:6], given[7] - given[0].shape[1], given[7] + 1)  # of one token more
    return out


def shifted_tokens(right, inputs, *given, **options):
    return right(inputs.roll(1, 1), *given, **options)


def unsorted(right, scores, k):
    found = right(scores, k)
    found[0, 0, 0, :2] = found[0, 0, 0, :2].flip(-1)
    return found


@pytest.mark.parametrize(
    "op, change",
    [
        ("verify_attention", one_key_less),
        ("verify_attention", middle_row),
        ("verify_attention", no_first_key),
        ("verify_attention", wrong_lse),
        ("verify_attention_with_scores", one_key_less),
        ("verify_attention_with_scores", lost_scores),
        ("sparse_attention", lost_index),
        ("sparse_attention", shorter_tail),
        ("score_keys", no_last_query),
        ("select_topk", unsorted),
        ("int4_linear", other_columns),
        ("gated_delta_rule", no_last_accepted),
        ("gated_delta_rule", newest_states),
        ("causal_conv1d", shifted_tokens),
    ],
)
def test_a_wrong_kernel_is_refused_and_not_timed(op, change, tmp_path, monkeypatch, capsys):
    timed = []
    measure_all = runner.measure_all
    monkeypatch.setattr(
        runner, "measure_all", lambda calls, device: timed.append(calls) or measure_all(
            calls, device
        )
    )  # fmt: skip
    names = ("sdpa", "torch.topk", "eager", "conv1d")
    options = ("--op", op, "--rival", *names, "--out", tmp_path)
    assert bench(*options) == 0 and timed
    timed.clear()
    shift(monkeypatch, op, change)
    assert bench(*options) == 1 and not timed
    found = records(tmp_path)[2:]
    assert found and all(record["status"].startswith("wrong: error") for record in found)
    assert all("cold_ms" not in record and record["what"] == "ours" for record in found)
    assert "wrong" in capsys.readouterr().out


def test_equal_scores_are_compared_by_position(monkeypatch):
    scores = torch.zeros(2, 1, 2, 100)
    assert checks.select_topk(scores, 7, sk.select_topk(scores, 7)) == 0
    assert checks.select_topk(scores, 7, last_of_equals(sk.select_topk, scores, 7)) > 1
    # All rows are looked at, some at a time.
    monkeypatch.setattr(checks, "SORTED_AT_ONCE", 100)
    found = sk.select_topk(scores, 7)
    found[1, 0, 0] += 1
    assert checks.select_topk(scores, 7, found) > 1


def test_one_that_fails_costs_no_other(tmp_path, monkeypatch):
    def broken(*given):
        raise RuntimeError("no such kernel\nat all")

    monkeypatch.setattr(sk, "score_keys", broken)
    assert bench("--op", "score_keys", "select_topk", "--rival", "none", "--out", tmp_path) == 1
    status = {record["op"]: record["status"] for record in records(tmp_path)[2:]}
    wanted = {"score_keys": "failed: RuntimeError: no such kernel", "select_topk": "ok"}
    assert status == wanted


def test_a_rival_that_differs_is_named_and_not_timed(tmp_path, monkeypatch):
    right = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **o: 1.1 * right(*a, **o))
    options = ("--op", "sparse_attention", "--rival", "gather+sdpa", "--out", tmp_path)
    assert bench(*options) == 0
    found = [r for r in records(tmp_path)[2:] if r["what"] == "gather+sdpa"]
    assert found and all(r["status"].startswith("differs") and "cold_ms" not in r for r in found)


def test_time_box_and_memory(tmp_path):
    assert bench("--seconds", 0, "--out", tmp_path) == 0
    (rest,) = records(tmp_path)[2:]
    assert rest["op"] == "the rest" and rest["status"] == "skipped: out of time"
    # No size of a 7B model's round fits into 20 MB but a few: they say so.
    assert main(["kernels", "--preset", "round", "--memory", "0.02", "--device", "cpu",
                 "--out", str(tmp_path)]) == 0  # fmt: skip
    found = records(tmp_path)[2:]
    assert len(found) == len(list(points.round_preset()))
    assert all(r["status"].startswith("skipped: does not fit: needs about") for r in found)
    assert "does not fit" in (tmp_path / "kernels.md").read_text()
    assert bench("--top-k-keys", 300, "--op", "select_topk", "--out", tmp_path) == 0
    assert records(tmp_path)[2]["status"] == "skipped: K 300 is more than N"


def test_resume(tmp_path, monkeypatch, capsys):
    options = ("--op", "select_topk", "score_keys", "--out", tmp_path)
    assert bench(*options, "--rival", "none") == 0
    path = tmp_path / "kernels.jsonl"
    before = path.read_text()
    path.write_text(before + '{"kind": "kernel", "op": "sel')  # cut off
    assert bench(*options, "--resume") == 0
    after = records(tmp_path)
    done = [record for record in after[1:] if record["what"] == "ours"]
    assert len(done) == 2 and path.read_text().startswith(before)
    assert {"torch.topk", "eager"} <= {record["what"] for record in after[1:]}

    def no_more(calls, device):
        raise AssertionError("timed again")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "measure_all", no_more)
        assert bench(*options, "--resume") == 0
        # Another setting's records are not gone on from.
        changed = path.read_text().replace('"dtype": "float32"', '"dtype": "float16"', 1)
        path.write_text(changed)
        with pytest.raises(AssertionError, match="timed again"):
            bench(*options, "--resume")
        assert "was made with dtype float16; beginning anew" in capsys.readouterr().err


@pytest.mark.parametrize("given, words", [
    (["--device", "tpu"], "--device is tpu, expected cuda or cpu"),
    (["--shape", "gpt-2"], "--shape is gpt-2, expected of"),
    (["--rival", "sdpb"], "--rival is sdpb, expected none or of"),
    (["--resume"], "--resume goes on from files, expected --out DIR"),
])  # fmt: skip
def test_refused_in_one_line(given, words, capsys):
    assert main(["kernels", *given]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


def test_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["kernels", "--device", "cuda"]) == 2
    assert "finds no GPU" in capsys.readouterr().err


def test_the_grid():
    every = [job.point for job in points.grid(points.GPU_GRID)]
    assert len(set(every)) == len(every)
    count = {op: sum(point.op == op for point in every) for op in OPS}
    caches = 4 * 3 * 4  # models, batches, contexts
    assert count == {
        "verify_attention": 3 * caches,
        "verify_attention_with_scores": 3 * caches,
        "sparse_attention": 9 * caches,
        "select_topk": 3 * caches,
        "score_keys": caches,
        "int4_linear": 4 * 3 * 5,
        "gated_delta_rule": 3 * 3,
        "causal_conv1d": 3 * 3,
    }
    # A KV cache is made once: points that share it stand together.
    with_cache = [(p.shape, p.batch, p.context) for p in every if p.context]
    assert len([1 for a, b in zip(with_cache, with_cache[1:]) if a != b]) == caches - 1


# What the ops compute, by parts.


def attention(T, B=2, N=192, shape="tiny", dtype=torch.float32):
    inputs = ops.Inputs(CPU, dtype)
    return inputs.attention(Point("verify_attention", shape, B, N, T), T)


@pytest.mark.parametrize("T", [1, 4])
def test_checked_by_parts_as_whole(T, monkeypatch):
    given = attention(T)
    guess = torch.rand(given.query.shape[:3]) + 5
    found = checks.dense(*given, guess)
    whole = reference.verify_attention_with_scores(*given, guess)
    for part, wanted in zip((found.out, found.lse, found.scores), whole):
        torch.testing.assert_close(part, wanted, rtol=0, atol=1e-12)

    order = torch.rand(2, 2, 128).argsort(-1)[..., :16].sort(-1).values.to(torch.int32)
    start = given.kv_len - 64
    whole = reference.sparse_attention(*given[:3], order, start, given.kv_len)
    for limit in (checks.MOST_LISTED, 0):
        monkeypatch.setattr(checks, "MOST_LISTED", limit)
        found = checks.sparse(*given[:3], order, start, given.kv_len)
        torch.testing.assert_close(found.out, whole[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(found.lse, whole[1], rtol=0, atol=1e-12)
    exact = reference.score_keys(given.query, given.key, given.kv_len)
    assert checks.score_keys(given.query, given.key, given.kv_len, exact) < 1e-6
    assert checks.score_keys(given.query, given.key, given.kv_len, exact * 1.01) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_too(dtype, tmp_path):
    kind = str(dtype).removeprefix("torch.")
    skip = {"int4_linear"} if dtype == torch.float16 else set()
    chosen = [op for op in OPS if op not in skip]
    assert bench("--dtype", kind, "--op", *chosen, "--rival", "none", "--out", tmp_path) == 0
    assert {record["status"] for record in records(tmp_path)[1:]} == {"ok"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_rival_of_score_keys_is_right_at_every_precision(dtype, tmp_path):
    """Whose logits must not be rounded to 8 bits on the way."""
    kind = str(dtype).removeprefix("torch.")
    assert bench("--dtype", kind, "--op", "score_keys", "--out", tmp_path) == 0
    assert [(r["what"], r["status"]) for r in records(tmp_path)[2:]] == [
        ("ours", "ok"), ("eager", "ok"),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_on_a_gpu_are_float32_without_a_copy_of_the_keys(dtype):
    """By shapes and types alone: one product, of the keys as they are."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    with FakeTensorMode():
        rows = torch.empty(3, 2, 28, 64, dtype=dtype, device="cuda")
        key = torch.empty(3, 2, 500, 64, dtype=dtype, device="cuda")
        with Calls():
            found = rivals._products(rows, key)
    assert found.shape == (3, 2, 28, 500) and found.dtype == torch.float32
    assert [name for name in called if "bmm" in name] == [
        "aten.bmm.default" if dtype == torch.float32 else "aten.bmm.dtype"
    ]
    assert not [name for name in called if "copy" in name or "clone" in name]


@pytest.mark.parametrize("T", [1, 4])
def test_keys_that_stand_out(T):
    """Each query gives its own position, and a listed one, a good share of its weight."""
    given = attention(T, B=1, N=1024, shape="qwen2-vl-7b")
    query, key, _, _ = given
    _, lse = reference.verify_attention(*given)
    logits = (query.unflatten(1, (4, 7)) @ key[:, :, None].mT).double() * query.shape[-1] ** -0.5
    share = (logits - lse.unflatten(1, (4, 7))[..., None]).exp()  # [B, Hkv, G, T, N]
    for t in range(T):
        assert share[:, :, t % 7, t, 1024 - T + t].min() > 0.05
    assert share[:, :, 0, 0, 0].min() > 0.05


# Libraries that are not here: stand-ins that are strict about shapes and memory.


def same_memory(view, tensor):
    assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr(), "a copy"


def causal_attention(query, key, value):
    """[..., T, D] on [..., N, D], the mask aligned to the bottom right."""
    T, N = query.shape[-2], key.shape[-2]
    mask = torch.ones(T, N, dtype=torch.bool).tril(N - T)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def right(given):
    return checks.dense(*given, None)


@pytest.mark.parametrize(
    "module, tuple_of", [("flash_attn", False), ("flash_attn_interface", True)]
)
@pytest.mark.parametrize("T", [1, 4])
def test_flash_attention(module, tuple_of, T, monkeypatch):
    given = attention(T, B=3)
    B, Hq, _, D = given.query.shape
    N, Hkv = given.key.shape[2], given.key.shape[1]

    def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, causal):
        assert q.shape == (B, T, Hq, D) and q.stride(-1) == 1
        assert k_cache.shape == v_cache.shape == (B, N, Hkv, D) and k_cache.stride(-1) == 1
        same_memory(k_cache, given.key), same_memory(v_cache, given.value)
        assert cache_seqlens.dtype == torch.int32 and cache_seqlens.tolist() == [N] * B and causal
        heads = [x.transpose(1, 2).repeat_interleave(Hq // Hkv, 1) for x in (k_cache, v_cache)]
        out = causal_attention(q.transpose(1, 2), *heads).transpose(1, 2).contiguous()
        return (out, None) if tuple_of else out

    fake = types.SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)
    monkeypatch.setitem(sys.modules, module, fake)
    rival = libraries.flash(given, module)
    assert right(given).of_rival(rival.output(rival.prepare()()), rival.causal) <= 1


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("T", [1, 4])
def test_variable_length_attention_of_torch(T, paged, monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    given = attention(T, B=3, N=512)
    B, Hq, _, D = given.query.shape
    N, Hkv = given.key.shape[2], given.key.shape[1]
    named, page = inspect.signature(varlen.varlen_attn), libraries.TORCH_PAGE

    def varlen_attn(*args, **options):
        asked = named.bind(*args, **options).arguments
        rows, starts, sequences = asked["query"], asked["cu_seq_q"], B * Hkv
        assert rows.shape == (sequences * T, Hq // Hkv, D) and rows.is_contiguous()
        assert starts.dtype == torch.int32 and starts.tolist() == [*range(0, len(rows) + 1, T)]
        assert asked["window_size"] == (-1, 0) and asked["enable_gqa"]
        assert (asked["max_q"], asked["max_k"]) == (T, N)
        same_memory(asked["key"], given.key), same_memory(asked["value"], given.value)
        if paged:
            table = asked["block_table"]
            assert asked["key"].shape == (sequences * N // page, page, 1, D)
            assert table.dtype == torch.int32 and asked["cu_seq_k"] is None
            assert asked["seqused_k"].tolist() == [N] * sequences
            cache = [
                asked[name][table.long()].view(sequences, N, 1, D) for name in ("key", "value")
            ]
        else:
            assert asked["cu_seq_k"].tolist() == [*range(0, sequences * N + 1, N)]
            cache = [asked[name].view(sequences, N, 1, D) for name in ("key", "value")]
        keys = [x.transpose(1, 2).expand(-1, Hq // Hkv, -1, -1) for x in cache]
        query = rows.view(sequences, T, -1, D).transpose(1, 2)
        return causal_attention(query, *keys).transpose(1, 2).reshape(rows.shape)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    rival = libraries.varlen(given, paged)
    assert right(given).of_rival(rival.output(rival.prepare()()), rival.causal) <= 1


def test_which_of_them_this_torch_has():
    pytest.importorskip("torch.nn.attention.varlen")
    found = libraries.variable_length(attention(1, N=512, dtype=torch.bfloat16))
    assert "varlen" in found and set(found) <= set(rivals.NAMES)
    assert not libraries.variable_length(attention(1, N=512))  # float32
    assert "varlen-paged" not in libraries.variable_length(attention(1, dtype=torch.bfloat16))


class PagedWrapper:
    """flashinfer's two wrappers, as far as they are used: strict, and plain inside."""

    def __init__(self, workspace, layout, use_tensor_cores=None):
        assert workspace.dtype == torch.uint8 and layout == "HND"

    def _plan(self, indptr, indices, last, heads, kv_heads, D, page, types):
        assert indptr.dtype == indices.dtype == last.dtype == torch.int32
        assert len(indptr) == len(last) + 1 and len(indices) == indptr[-1]
        assert set(types) == {"q_data_type", "kv_data_type"}
        self.table = indptr.tolist(), indices, last.tolist(), heads, kv_heads, D, page

    def _run(self, rows, cache, counts):
        indptr, indices, last, heads, kv_heads, D, page = self.table
        assert all(x.shape[1:] == (kv_heads, page, D) and x.is_contiguous() for x in cache)
        assert rows.shape == (sum(counts), heads, D)
        outs, first = [], 0
        for request, count in enumerate(counts):
            pages = indices[indptr[request] : indptr[request + 1]].long()
            length = (len(pages) - 1) * page + last[request]
            keys = [x[pages].transpose(0, 1).reshape(kv_heads, -1, D)[:, :length] for x in cache]
            keys = [x.repeat_interleave(heads // kv_heads, 0) for x in keys]
            query = rows[first : first + count].transpose(0, 1)
            outs.append(causal_attention(query, *keys).transpose(0, 1))
            first += count
        return torch.cat(outs)


class Decode(PagedWrapper):
    def plan(self, indptr, indices, last, heads, kv_heads, D, page, **types):
        self._plan(indptr, indices, last, heads, kv_heads, D, page, types)

    def run(self, rows, cache):
        return self._run(rows, cache, [1] * len(self.table[2]))


class Prefill(PagedWrapper):
    def plan(self, qo_indptr, indptr, indices, last, heads, kv_heads, D, page, *, causal, **types):
        assert causal and qo_indptr.dtype == torch.int32
        self.counts = qo_indptr.diff().tolist()
        self._plan(indptr, indices, last, heads, kv_heads, D, page, types)

    def run(self, rows, cache):
        return self._run(rows, cache, self.counts)


@pytest.fixture
def flashinfer(monkeypatch):
    fake = types.SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=Decode, BatchPrefillWithPagedKVCacheWrapper=Prefill
    )
    monkeypatch.setitem(sys.modules, "flashinfer", fake)


@pytest.mark.parametrize("T", [1, 4])
def test_flashinfer(T, flashinfer):
    given = attention(T, B=3)
    rival = libraries.paged(given, None, 0)
    call = rival.prepare()
    for page, tensor in zip(call.args[1], (given.key, given.value)):
        same_memory(page, tensor)
    assert right(given).of_rival(rival.output(call()), rival.causal) <= 1


def test_flashinfer_top_k(monkeypatch):
    """Twice where it has a rule for ties: as fast as it can, and with the lowest positions."""
    asked = []

    def top_k(scores, k, sorted=False, deterministic=False, tie_break=0):
        asked.append((deterministic, tie_break))
        return scores.topk(k)

    fake = types.SimpleNamespace(top_k=top_k)
    ties = types.SimpleNamespace(TopKTieBreak=types.SimpleNamespace(SMALL=1))
    monkeypatch.setitem(sys.modules, "flashinfer.topk", ties)
    scores = torch.randn(2, 1, 3, 40)
    found = rivals._flashinfer_top_k(fake, scores, 5)
    for rival in found.values():
        got = rival.output(rival.prepare()())
        assert torch.equal(got, scores.topk(5).indices)
    assert [*found] == ["flashinfer", "flashinfer+ties"] and asked == [(False, 0), (True, 1)]
    fake.top_k = lambda scores, k, sorted=False: scores.topk(k)
    assert [*rivals._flashinfer_top_k(fake, scores, 5)] == ["flashinfer"]


@pytest.mark.parametrize("T", [1, 4])
def test_flashinfer_over_pages_of_one_key(T, flashinfer):
    given = attention(T, B=3)
    order = torch.rand(3, 2, 128).argsort(-1)[..., :16].sort(-1).values.to(torch.int32)
    expected = checks.sparse(*given[:3], order, given.kv_len - 64, given.kv_len)
    last = torch.arange(128, 192, dtype=torch.int32).expand(3, 2, 64)
    rival = libraries.paged(given, torch.cat((order, last), -1), 64)
    assert expected.of_rival(rival.output(rival.prepare()()), rival.causal) <= 1


@pytest.mark.parametrize("T", [1, 4])
def test_xformers(T, monkeypatch):
    given = attention(T, B=3)
    B, Hq, _, D = given.query.shape
    N, Hkv = given.key.shape[2], given.key.shape[1]

    class Mask:
        pass

    def memory_efficient_attention_forward(query, key, value, attn_bias):
        assert query.shape == (B, T, Hkv, Hq // Hkv, D)
        assert key.shape == value.shape == (B, N, Hkv, Hq // Hkv, D) and key.stride(3) == 0
        same_memory(key, given.key), same_memory(value, given.value)
        assert isinstance(attn_bias, Mask) if T > 1 else attn_bias is None
        heads = [x.permute(0, 2, 3, 1, 4) for x in (query, key, value)]
        return causal_attention(*heads).permute(0, 3, 1, 2, 4)

    fmha = types.SimpleNamespace(
        memory_efficient_attention_forward=memory_efficient_attention_forward
    )
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", types.ModuleType("xformers.ops"))
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", fmha)
    bias = types.SimpleNamespace(LowerTriangularFromBottomRightMask=Mask)
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha.attn_bias", bias)
    rival = libraries.xformers(given)
    assert right(given).of_rival(rival.output(rival.prepare()()), rival.causal) <= 1


def stateful(op, T):
    """As `bench kernels` makes them of a model of few heads."""
    normal, point = torch.Generator().manual_seed(T), Point("", "tiny-hybrid", 3, tokens=T)
    return op(point, lambda *shape, dtype=None: torch.randn(*shape, generator=normal, dtype=dtype))


@pytest.mark.parametrize("T", [1, 4])
def test_flash_linear_attention(T, monkeypatch):
    rule = stateful(recurrent.Rule, T)

    def fused_recurrent_gated_delta_rule(
        q, k, v, g, beta, *, initial_state, output_final_state, use_qk_l2norm_in_kernel
    ):
        assert q.shape == k.shape == (3, 2 * T, 2, 128) and v.shape == (3, 2 * T, 4, 128)
        assert output_final_state and use_qk_l2norm_in_kernel
        for ours, theirs in ((rule.key, k), (rule.value, v), (rule.state, initial_state)):
            same_memory(theirs, ours)
        zero = torch.zeros(3, dtype=torch.int32)
        given = q, k, v, g, beta, initial_state, zero, zero + 2 * T
        return reference.gated_delta_rule(*given, dtype=torch.float32)

    fla = types.SimpleNamespace(fused_recurrent_gated_delta_rule=fused_recurrent_gated_delta_rule)
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", fla)
    rival = rule.rival(rule._fla)
    result = rival.prepare()()
    assert rule.error(rival.output(result)) <= 1 < rule.error(1.01 * rival.output(result))


@pytest.mark.parametrize("T", [1, 4])
def test_the_convolution_of_a_library(T, monkeypatch):
    conv = stateful(recurrent.Convolution, T)

    def causal_conv1d_fn(x, weight, *, activation):
        assert x.shape == (3, weight.shape[0], T + 3) and x.stride(1) == 1 and activation == "silu"
        same_memory(x, conv.inputs)
        padded = F.pad(x, (weight.shape[1] - 1, 0))
        return F.silu(F.conv1d(padded, weight[:, None], groups=len(weight)))

    fake = types.SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn)
    monkeypatch.setitem(sys.modules, "causal_conv1d", fake)
    rival = conv.rival(conv._library)
    result = rival.prepare()()
    assert conv.error(rival.output(result)) <= 1 < conv.error(rival.output(result.roll(1, -1)))


def test_the_grid_of_ops_with_a_state():
    def asked(*shapes):
        sizes = points.QUICK_CPU._replace(shapes=shapes, batches=(1, 8))
        found = [job.point for job in points.grid(sizes, points.STATEFUL)]
        assert len({*found}) == len(found) and not any(p.context or p.keys for p in found)
        return {(p.shape, p.batch, p.tokens) for p in found if p.op == "gated_delta_rule"}

    each = {(batch, tokens) for batch in (1, 8) for tokens in (1, 4)}
    assert asked("llama-3-8b") == {("tiny-hybrid", *one) for one in each}
    both = asked("qwen3.5-35b-a3b", "llama-3-8b", "qwen3.5-27b")
    assert {shape for shape, *_ in both} == {"qwen3.5-35b-a3b", "qwen3.5-27b"} and len(both) == 8
    point = points.Point("gated_delta_rule", "qwen3.5-27b", 8, tokens=4)
    state = 8 * 48 * 128 * 128 * 4
    assert 2 * state < points.needed_bytes(point, 2) < 4 * state and point.size == "B 8, T 4"
    assert points.reason_to_skip(point, 2, 1e9) is None
    assert "does not fit" in points.reason_to_skip(point, 2, 1e7)


def test_the_picture_takes_the_sizes_that_are_nearest():
    base = dict(op="sparse_attention", batch=1, what="ours")
    rows = [base | dict(tokens=t, keys=k) for t in (1, 3, 10) for k in (256, 2048)]
    assert [(r["tokens"], r["keys"]) for r in tables._nearest(rows)] == [(3, 256)]


@pytest.mark.slow
def test_quick(tmp_path, monkeypatch):
    """As a user runs it, FlexAttention compiled."""
    monkeypatch.undo()
    assert main(["kernels", "--quick", "--out", str(tmp_path)]) == 0
    found = records(tmp_path)[1:]
    assert {r["op"] for r in found} == {"copy", *OPS}
    assert {r["status"] for r in found} == {"ok"}
    assert "flexattention" in {r["what"] for r in found}
    assert all((tmp_path / f"kernels.{kind}").exists() for kind in ("md", "png"))

"""The passes that get captured: without a host read, compiled whole, for every family, and with
few kernels."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import std_decode
from std_decode.passes import compiling, engine, graphs, pool
from tests.decode.families import FAMILIES

# Where each layer is compiled, which takes seconds: one of each kind of attention and positions.
COMPILED = (
    "qwen2_vl",
    "llava_onevision",
    "llama",
    "gemma3",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "gemma2",
    "gpt_oss",
    "mistral",
)


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in COMPILED else pytest.mark.slow) for f in FAMILIES],
)
def test_no_pass_reads_a_value_or_depends_on_one(make_case, uncaptured, monkeypatch, family):
    """Where a capture would be, the pass first runs on tensors that have shapes and no values."""
    shapes = []

    def capture(step, pool):
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = step()
        real = step()
        assert fake.shape == real.shape and fake.dtype == real.dtype
        shapes.append(tuple(real.shape))
        return step

    monkeypatch.setattr(graphs, "capture", capture)
    case = make_case(family, 1, rows=2)
    if (
        "experts" in FAMILIES[family].special
    ):  # a grouped product of float32 has no shapes without values
        case.model.set_experts_implementation("batched_mm")
    expected = case.generate()
    for draft_length in (3, 0):
        with std_decode.patched(case.model, draft_length=draft_length, top_k_keys=4):
            case.assert_same_tokens(expected, case.generate())
            assert std_decode.last_stats(case.model).eager_because is None
    assert shapes == [(2, 1, 120), (2, 4, 120), (2, 1, 120)]  # draft, verify, dense


@pytest.mark.parametrize(
    ("family", "rows"),
    [
        *(("qwen2_vl", 1), ("gemma3", 1), ("llama", 3)),
        *(
            pytest.param(family, 1, marks=pytest.mark.slow)
            for family in COMPILED
            if family not in ("qwen2_vl", "gemma3")
        ),
    ],
)
def test_each_pass_is_one_graph_that_is_compiled_once(
    make_case, uncaptured, monkeypatch, family, rows
):
    """No break, so no host read; no recompilation from step to step, round to round or call to
    call; the tokens of the unpatched model."""
    counter = CompileCounter()
    monkeypatch.setattr(
        engine,
        "compile_pass",
        lambda forward: torch.compile(forward, fullgraph=True, dynamic=False, backend=counter),
    )
    case = make_case(family, 1, rows, max_new_tokens=24)
    for do_sample in (False, True):
        expected = case.generate(do_sample=do_sample)
        with std_decode.patched(case.model, draft_length=3, top_k_keys=8, compile=True):
            for _ in range(2):
                got = case.generate(do_sample=do_sample)
                case.assert_same_tokens(expected, got, do_sample=do_sample)
                stats = std_decode.last_stats(case.model)
                assert stats.calls["draft"] > 6 and stats.calls["verify"] > 2
    assert counter.frame_count == 4  # draft and verify, of two patches


@pytest.mark.parametrize(("top_k_keys", "renewing"), [(10_000, 0), (8, 2)])
def test_kernels_of_a_decoder_layer(make_case, uncaptured, monkeypatch, top_k_keys, renewing):
    """Norms with residuals, rotary, and SiLU times up are fused: what is left of a layer's 30 to
    40 operators, besides the attention op, are 7 matrix products and a dozen generated kernels;
    where verification renews the importance of keys, two more."""
    from torch._inductor import metrics

    monkeypatch.setattr(pool, "bucket", lambda tokens: tokens)  # or all keys would be selected
    counts = {}
    for layers in (1, 2):
        monkeypatch.setitem(make_case.text, "num_hidden_layers", layers)
        case = make_case("qwen2_vl", 0, max_new_tokens=8)
        expected = case.generate()
        torch._dynamo.reset()
        metrics.reset()
        with std_decode.patched(case.model, draft_length=3, top_k_keys=top_k_keys, compile=True):
            case.assert_same_tokens(expected, case.generate())
        counts[layers] = metrics.generated_kernel_count
    # Of a draft pass and of a verifying one.
    assert counts[2] - counts[1] <= 2 * 13 + renewing


def test_a_pass_compiled_with_other_ops_is_not_taken_from_the_cache(
    make_case, uncaptured, monkeypatch, tmp_path
):
    """PyTorch's cache on disk would give it back after an upgrade, with the strides of before."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    case = make_case("llama", 0, max_new_tokens=8)
    expected = case.generate()
    hits = []
    for version in ("one", "one", "another"):
        monkeypatch.setattr(compiling, "version_of_ops", lambda version=version: version)
        torch._dynamo.reset()
        counters.clear()
        with std_decode.patched(case.model, draft_length=0, compile=True):
            case.assert_same_tokens(expected, case.generate())
        hits.append(counters["aot_autograd"]["autograd_cache_hit"])
    assert hits == [0, 1, 0]


def test_the_version_of_the_ops_is_that_of_their_sources(monkeypatch, tmp_path):
    versions = []
    for source in ("a = 1", "a = 2"):
        (tmp_path / "op.py").write_text(source)
        monkeypatch.setattr(compiling.std_kernels, "__file__", str(tmp_path / "__init__.py"))
        versions.append(compiling.version_of_ops.__wrapped__())
    assert versions[0] != versions[1]

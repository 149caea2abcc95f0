import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import std_kernels as sk
from std_kernels import _blocks, cpu_verify, reference

INF, NAN = float("inf"), float("nan")
SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0, 2.0, -4.0, 1.0, 6.0])
OPTIONS = {
    "plain": {},
    "window": {"window": 7},
    "window of one": {"window": 1},
    "wide window": {"window": 500},
    "softcap": {"softcap": 2.5},
    "sinks": {"sinks": SINKS},
    "scale": {"scale": 0.3},
    "all": {"window": 5, "softcap": 4.0, "sinks": SINKS, "scale": 0.2},
}


def lse_floor(dtype):
    """Fused kernels round the softmax weights to half, each by eps/2 at most, then sum them."""
    return 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2


def check(cache, assert_accurate, score_lse=None, **options):
    """Both ops against the reference; returns what the op with scores returned."""
    options = {"kv_start": cache.kv_start, **options}
    if score_lse is None:
        score_lse = torch.full(cache.query.shape[:3], 3.0)
    dtype = cache.query.dtype
    got = sk.verify_attention_with_scores(*cache.args(), score_lse, **options)
    call = reference.verify_attention_with_scores
    exact = call(*cache.args(), score_lse, **options)
    plain = call(*cache.args(), score_lse, **options, dtype=torch.float32)
    half = call(*cache.args(), score_lse, **options, dtype=dtype)
    assert (got[0].dtype, got[1].dtype, got[2].dtype) == (dtype, torch.float32, torch.float32)
    assert_accurate(got[0], exact[0], half[0])
    assert_accurate(got[1], exact[1], plain[1], floor=lse_floor(dtype))
    assert_accurate(got[2], exact[2], plain[2], floor=4e-6)
    assert torch.equal(got[2] == 0, exact[2] == 0)
    out, lse = sk.verify_attention(*cache.args(), **options)
    assert torch.equal(out, got[0]) and torch.equal(lse, got[1])
    return got


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("T", [1, 2, 5])
def test_options(make_cache, assert_accurate, options, T):
    cache = make_cache([96, 61, 40], [0, 3, 31], T=T)
    check(cache, assert_accurate, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("Hkv, G", [(2, 4), (3, 2), (1, 8), (8, 1)])
def test_past_and_blocks_apart(make_cache, assert_accurate, monkeypatch, options, Hkv, G):
    """As the CPU path does it for long caches; the last row has no past."""
    for module, name, size in [
        (cpu_verify, "BLOCK", 8),
        (cpu_verify, "_LONG", 32),
        (_blocks, "_CHUNK", 24),
        (_blocks, "_ROWS", 32),
    ]:
        monkeypatch.setattr(module, name, size)
    if "sinks" in options:
        options = {**options, "sinks": SINKS[: Hkv * G]}
    for T in (1, 5, 11):
        cache = make_cache([96, 61, 40, 24], [0, 3, 31, 19], T=T, Hkv=Hkv, G=G)
        check(cache, assert_accurate, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "D, G, T", [(16, 1, 5), (32, 7, 64), (80, 4, 1), (128, 16, 2), (256, 2, 5), (512, 8, 3)]
)
def test_shapes(make_cache, assert_accurate, dtype, D, G, T):
    check(make_cache([150, 149], D=D, G=G, T=T, N=151, dtype=dtype), assert_accurate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_softcap_and_sinks_in_half_precision(make_cache, assert_accurate, dtype):
    cache = make_cache([70, 50], [9, 0], dtype=dtype)
    check(cache, assert_accurate, softcap=3.0, sinks=SINKS)
    check(cache, assert_accurate, sinks=SINKS)


@pytest.mark.parametrize("layout", ["tokens_first", "padded_rows", "odd_strides"])
@pytest.mark.parametrize("kv_len", [[50, 50], [50, 17]])
def test_strided_views(make_cache, assert_accurate, layout, kv_len):
    check(make_cache(kv_len, layout=layout), assert_accurate)


@pytest.mark.parametrize("kv_len, kv_start", [([0], [0]), ([2], [0]), ([9], [9]), ([9], [7])])
@pytest.mark.parametrize("options", [{}, {"sinks": SINKS}, {"window": 2}, {"softcap": 1.0}])
def test_queries_that_see_nothing(make_cache, assert_accurate, kv_len, kv_start, options):
    cache = make_cache(kv_len, kv_start, T=4, N=16)
    out, lse, scores = check(cache, assert_accurate, **options)
    blind = 4 - (kv_len[0] - kv_start[0])
    assert torch.equal(out[:, :, :blind], torch.zeros_like(out[:, :, :blind]))
    nothing = options["sinks"][:, None] if "sinks" in options else torch.tensor(-INF)
    assert torch.equal(lse[:, :, :blind], nothing.expand_as(lse[:, :, :blind]))
    assert int((scores != 0).sum()) == 2 * (kv_len[0] - kv_start[0])


def test_empty_batch_and_empty_cache():
    lengths = torch.zeros(0, dtype=torch.int32)
    out, lse = sk.verify_attention(
        torch.ones(0, 4, 2, 16), torch.ones(0, 2, 5, 16), torch.ones(0, 2, 5, 16), lengths
    )
    assert out.shape == (0, 4, 2, 16) and lse.shape == (0, 4, 2)
    none = torch.ones(1, 2, 0, 16)
    out, lse = sk.verify_attention(torch.ones(1, 4, 2, 16), none, none, lengths.new_zeros(1))
    assert not out.any() and bool((lse == -INF).all())


def test_sink_of_no_weight_changes_nothing(make_cache):
    cache = make_cache([40, 2], T=4)
    out, lse = sk.verify_attention(*cache.args(), sinks=torch.full((8,), -INF))
    plain, plain_lse = sk.verify_attention(*cache.args())
    assert torch.equal(out, plain) and torch.equal(lse, plain_lse)


@pytest.mark.parametrize("switch", [INF, NAN])
def test_rows_switched_off_leave_no_score(make_cache, assert_accurate, switch):
    cache = make_cache([90, 71], [4, 0])
    score_lse = torch.full((2, 8, 3), 2.0)
    score_lse[0, 4:], score_lse[1, :, 1:] = switch, switch
    _, _, scores = check(cache, assert_accurate, score_lse)
    assert not scores[0, 1].any()
    # Row 0 of batch row 1 sits at position 68, so the keys of the rows switched off are unseen.
    assert not scores[1, :, 69:].any() and bool((scores[1, :, :69] > 0).all())


def test_score_is_bounded_where_the_estimate_is_too_low(make_cache, assert_accurate):
    cache = make_cache([90, 71], [4, 0])
    score_lse = torch.full((2, 8, 3), -INF)
    score_lse[0, :, 0] = -500.0
    _, _, scores = check(cache, assert_accurate, score_lse)
    # Every row counts 1 at every key it sees: G * T = 12, fewer under the causal triangle.
    assert bool((scores[0, :, 4:88] == 12).all())
    assert scores[0, 0, 88:90].tolist() == [8.0, 4.0]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_split_work(make_cache, assert_accurate, small_chunks, monkeypatch, options):
    small_chunks(monkeypatch)
    check(make_cache([96, 61, 40, 3], [0, 3, 31, 0], T=5), assert_accurate, **options)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_range(make_cache, assert_accurate, data):
    N = data.draw(st.integers(1, 24), label="N")
    T = data.draw(st.integers(1, 8), label="T")
    kv_len = data.draw(st.lists(st.integers(0, N), min_size=1, max_size=3), label="kv_len")
    kv_start = [data.draw(st.integers(0, n), label="kv_start") for n in kv_len]
    window = data.draw(st.none() | st.integers(1, N + 2), label="window")
    cache = make_cache(kv_len, kv_start, T=T, N=N, D=16, G=2, seed=N)
    check(cache, assert_accurate, window=window)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(4)), seed=st.integers(0, 99))
def test_batch_rows_permute(make_cache, order, seed):
    cache = make_cache([30, 22, 9, 1], [3, 0, 8, 0], N=32, seed=seed)
    score_lse = torch.randn(4, 8, 3)
    args = (*cache.args(), score_lse, cache.kv_start)
    call = sk.verify_attention_with_scores
    before = call(*args[:-1], kv_start=args[-1])
    moved = [x[list(order)] for x in args]
    for x, y in zip(before, call(*moved[:-1], kv_start=moved[-1]), strict=True):
        assert torch.equal(x[list(order)], y)


@settings(max_examples=20, deadline=None)
@given(left=st.integers(0, 9), right=st.integers(0, 9), window=st.none() | st.integers(1, 40))
def test_padding_changes_nothing(make_cache, left, right, window):
    cache = make_cache([20, 20], N=20)
    padded = make_cache([20 + left] * 2, [left] * 2, N=20 + left + right)
    padded.query = cache.query
    padded.key[:, :, left : left + 20], padded.value[:, :, left : left + 20] = (
        cache.key,
        cache.value,
    )
    score_lse = torch.randn(2, 8, 3)
    call = sk.verify_attention_with_scores
    out, lse, scores = call(*cache.args(), score_lse, window=window)
    again = call(*padded.args(), score_lse, window=window, kv_start=padded.kv_start)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)
    assert torch.equal(again[2][:, :, left : left + 20], scores)
    assert not again[2][:, :, :left].any() and not again[2][:, :, left + 20 :].any()

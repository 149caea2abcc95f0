"""score_keys' kernels: tiles of 16 rows and 16 keys here, splits of 48 keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import std_kernels as sk
from std_kernels import _score_keys_kernels as kernels
from std_kernels import cpu, reference

SINKS = torch.tensor([0.5, -1.0, 3.0, 6.0])
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 2.5},
    "wide softcap": {"softcap": 50.0},
    "sinks": {"sinks": SINKS},
    "no sinks at all": {"sinks": torch.full((4,), -float("inf"))},
    "negative scale": {"scale": -0.3},
    "all": {"softcap": 4.0, "sinks": SINKS, "scale": 0.2},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(cache, assert_accurate, **options):
    options = {"kv_start": cache.kv_start, **options}
    args = cache.query, cache.key, cache.kv_len
    scores = sk.score_keys(*args, **options)
    exact = reference.score_keys(*args, **options)
    plain = reference.score_keys(*args, **options, dtype=torch.float32)
    assert scores.dtype == torch.float32
    assert_accurate(scores, exact, plain, floor=4e-7)
    assert torch.equal(scores == 0, exact == 0)
    return scores


@pytest.fixture
def small_cache(make_cache):
    def make(kv_len, kv_start=None, **sizes):
        return make_cache(kv_len, kv_start, **{"Hkv": 1, "D": 16, "N": 160, **sizes})

    return make


def test_the_kernels_run(small_cache, assert_accurate, monkeypatch):
    monkeypatch.setattr(cpu, "score_keys", None)
    calls = []
    launcher = kernels.score_keys
    monkeypatch.setattr(kernels, "score_keys", lambda *a: calls.append(a) or launcher(*a))
    check(small_cache([5], N=9, T=1), assert_accurate)
    assert len(calls) == 1


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("W", [1, 13])
def test_options(small_cache, assert_accurate, options, W):
    cache = small_cache([159, 97, 40], [0, 50, 31], T=W)
    check(cache, assert_accurate, **options)
    counts = torch.tensor([W, W // 2, W // 3], dtype=torch.int32)
    check(cache, assert_accurate, num_queries=counts, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "D, G, W",
    [(16, 1, 5), (32, 7, 9), (64, 8, 2), (80, 4, 1), (96, 3, 2), (128, 16, 3), (256, 2, 7)]
    + [(512, 3, 4)],
)
def test_shapes(small_cache, assert_accurate, dtype, D, G, W):
    check(small_cache([150], D=D, G=G, T=W, N=151, dtype=dtype), assert_accurate)


@pytest.mark.parametrize(
    "D, layout", [(24, "odd_rows"), (24, "heads_first"), (40, "padded_rows"), (96, "padded_rows")]
)
def test_head_dims_that_fill_no_tile(small_cache, assert_accurate, D, layout):
    # What lies beyond D in memory is the next row, or NaN.
    check(small_cache([60], D=D, G=2, T=2, layout=layout), assert_accurate)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_and_sinks_in_half_precision(small_cache, assert_accurate, dtype):
    check(small_cache([70], [9], dtype=dtype), assert_accurate, softcap=3.0, sinks=SINKS)


@pytest.mark.parametrize("layout", ["tokens_first", "padded_rows", "odd_rows", "odd_strides"])
def test_strided_views(make_cache, assert_accurate, layout):
    check(make_cache([60, 17], [2, 0], layout=layout, G=2, D=16), assert_accurate)


def test_more_rows_than_a_tile_and_more_queries_than_keys(small_cache, assert_accurate):
    check(small_cache([60, 9], N=61, G=3, T=23), assert_accurate)


def test_queries_that_see_nothing_count_in_the_mean(small_cache, assert_accurate):
    cache = small_cache([9, 4, 0], [6, 4, 0], T=4, N=12)
    # Nor are they read: what stands to the left of the range may be anything.
    cache.query[0, :, 0] = float("nan")
    cache.query[1:] = float("nan")
    scores = sk.score_keys(cache.query, cache.key, cache.kv_len, kv_start=cache.kv_start)
    cache.query.nan_to_num_()
    exact = reference.score_keys(cache.query, cache.key, cache.kv_len, kv_start=cache.kv_start)
    assert_accurate(scores, exact, exact, floor=4e-7)
    torch.testing.assert_close(scores[0].sum(-1), torch.full((1,), 0.75))
    assert not scores[1:].any()


def test_no_counted_query_gives_zeros(small_cache):
    cache = small_cache([120, 61], [0, 3], T=9)
    counts = torch.tensor([4, 0], dtype=torch.int32)
    args = cache.query, cache.key, cache.kv_len
    scores = sk.score_keys(*args, kv_start=cache.kv_start, num_queries=counts)
    torch.testing.assert_close(scores[0].sum(-1), torch.ones(1))
    assert not scores[1].any()


def test_logits_far_apart(small_cache, assert_accurate):
    """A split that lies hundreds below another weighs nothing, and overflows nothing."""
    cache = small_cache([159, 100], T=2)
    cache.key[:, :, :60] *= 100
    args = cache.query, cache.key, cache.kv_len
    exact, plain = (reference.score_keys(*args, dtype=x) for x in (torch.float64, torch.float32))
    assert_accurate(sk.score_keys(*args), exact, plain, floor=4e-7)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_range(make_cache, assert_accurate, data):
    N = data.draw(st.sampled_from([1, 15, 16, 17, 47, 48, 49, 97, 110]), label="N")
    W = data.draw(st.integers(1, 18), label="W")
    kv_len = data.draw(st.lists(st.integers(0, N), min_size=1, max_size=3), label="kv_len")
    kv_start = [data.draw(st.integers(0, n), label="kv_start") for n in kv_len]
    counts = [data.draw(st.integers(0, W), label="num_queries") for _ in kv_len]
    cache = make_cache(kv_len, kv_start, Hkv=1, T=W, N=N, D=16, G=2, seed=N)
    check(cache, assert_accurate, num_queries=torch.tensor(counts, dtype=torch.int32))


@settings(max_examples=6, deadline=None)
@given(order=st.permutations(range(3)))
def test_rows_permute(make_cache, order):
    cache = make_cache([90, 61, 7], N=100, G=2, D=16)
    scores = sk.score_keys(cache.query, cache.key, cache.kv_len)
    rows = list(order)
    again = sk.score_keys(cache.query[rows], cache.key[rows], cache.kv_len[rows])
    assert torch.equal(again, scores[rows])


@pytest.mark.parametrize("strides", [(1 << 31, 512, 16), (512, 1 << 31, 16), (64, 32, 1 << 28)])
def test_offsets_beyond_32_bits(make_cache, assert_accurate, strides):
    cache = make_cache([9, 7], N=9, D=16, T=1, dtype=torch.float16)
    shape = cache.key.shape
    room = 1 + sum((size - 1) * stride for size, stride in zip(shape, (*strides, 1), strict=True))
    # Only the pages that hold the rows are ever touched.
    far = torch.empty(room, dtype=torch.float16).as_strided(shape, (*strides, 1))
    cache.key = far.copy_(cache.key)
    check(cache, assert_accurate)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import std_kernels as sk
from std_kernels import reference

SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0, 2.0, -4.0, 1.0, 6.0])
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 2.5},
    "sinks": {"sinks": SINKS},
    "scale": {"scale": 0.3},
    "all": {"softcap": 4.0, "sinks": SINKS, "scale": 0.2},
}


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


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("W", [1, 2, 13])
def test_options(make_cache, assert_accurate, options, W):
    cache = make_cache([96, 61, 40], [0, 3, 22], T=W)
    check(cache, assert_accurate, **options)
    counts = torch.tensor([W, 1, W // 2], dtype=torch.int32)
    check(cache, assert_accurate, num_queries=counts, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "D, G, W", [(16, 1, 5), (32, 7, 64), (80, 4, 1), (128, 16, 2), (256, 2, 70), (512, 2, 7)]
)
def test_shapes(make_cache, assert_accurate, dtype, D, G, W):
    check(make_cache([150, 149], D=D, G=G, T=W, N=151, dtype=dtype), assert_accurate)


@pytest.mark.parametrize("layout", ["tokens_first", "padded_rows", "odd_strides"])
def test_strided_views(make_cache, assert_accurate, layout):
    check(make_cache([50, 17], [0, 4], layout=layout), assert_accurate)


def test_split_work(make_cache, assert_accurate, small_chunks, monkeypatch):
    small_chunks(monkeypatch)
    check(make_cache([96, 61, 3], [0, 3, 0], T=7), assert_accurate, sinks=SINKS)


def test_sums_to_one(make_cache):
    cache = make_cache([96, 61], [0, 3], T=9)
    args = cache.query, cache.key, cache.kv_len
    counts = torch.tensor([4, 0], dtype=torch.int32)
    scores = sk.score_keys(*args, kv_start=cache.kv_start, num_queries=counts)
    torch.testing.assert_close(scores[0].sum(-1), torch.ones(2))
    assert not scores[1].any()


def test_queries_that_see_nothing_count_in_the_mean(make_cache, assert_accurate):
    cache = make_cache([9, 4, 0], [6, 4, 0], T=4, N=12)
    scores = check(cache, assert_accurate)
    torch.testing.assert_close(scores[0].sum(-1), torch.full((2,), 0.75))
    assert not scores[1:].any()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_range(make_cache, assert_accurate, data):
    N = data.draw(st.integers(1, 24), label="N")
    W = data.draw(st.integers(1, 8), label="W")
    kv_len = data.draw(st.lists(st.integers(0, N), min_size=1, max_size=3), label="kv_len")
    kv_start = [data.draw(st.integers(0, n), label="kv_start") for n in kv_len]
    counts = [data.draw(st.integers(0, W), label="num_queries") for _ in kv_len]
    cache = make_cache(kv_len, kv_start, T=W, N=N, D=16, G=2, seed=N)
    check(cache, assert_accurate, num_queries=torch.tensor(counts, dtype=torch.int32))


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(4)), left=st.integers(0, 9), right=st.integers(0, 9))
def test_rows_permute_and_padding_changes_nothing(make_cache, order, left, right):
    cache = make_cache([20] * 4, N=20)
    scores = sk.score_keys(cache.query, cache.key, cache.kv_len)
    padded = make_cache([20 + left] * 4, [left] * 4, N=20 + left + right)
    padded.key[:, :, left : left + 20] = cache.key
    again = sk.score_keys(
        cache.query[list(order)],
        padded.key[list(order)],
        padded.kv_len,
        kv_start=padded.kv_start,
    )
    assert torch.equal(again[:, :, left : left + 20], scores[list(order)])
    assert not again[:, :, :left].any() and not again[:, :, left + 20 :].any()

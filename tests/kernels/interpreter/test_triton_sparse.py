import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import std_kernels as sk
from std_kernels import _sparse_attention_kernels as kernels
from std_kernels import cpu, reference

INF, NAN = float("inf"), float("nan")
SINKS = torch.tensor([0.5, -1.0, 3.0, 6.0])
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 2.5},
    "wide softcap": {"softcap": 50.0},
    "sinks": {"sinks": SINKS},
    "negative scale": {"scale": -0.3},
    "all": {"softcap": 4.0, "sinks": SINKS, "scale": 0.2},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def select(cache, tail_start, K, empties=0, seed=0):
    """Random distinct indices per (b, h), ascending, the last `empties` of them empty."""
    generator = torch.Generator().manual_seed(seed)
    B, Hkv = cache.key.shape[:2]
    indices = torch.full((B, Hkv, K), -1, dtype=torch.int32)
    for b in range(B):
        for h in range(Hkv):
            room = torch.randperm(tail_start[b], generator=generator)
            chosen = room[: K - empties].sort().values
            indices[b, h, : len(chosen)] = chosen
    return indices, torch.tensor(tail_start, dtype=torch.int32)


def poison(cache, indices, tail_start):
    """NaN in every key and value that no entry and no tail names."""
    n = torch.arange(cache.key.shape[2])
    named = (indices[..., None] == n).any(-2) & (n < tail_start[:, None, None])
    named |= ((n >= tail_start[:, None]) & (n < cache.kv_len[:, None]))[:, None]
    cache.key.masked_fill_(~named[..., None], NAN)
    cache.value.masked_fill_(~named[..., None], NAN)


def check(cache, indices, tail_start, assert_accurate, **options):
    poison(cache, indices, tail_start)
    args = cache.query, cache.key, cache.value, indices, tail_start, cache.kv_len
    out, lse = sk.sparse_attention(*args, **options)
    exact = reference.sparse_attention(*args, **options)
    plain = reference.sparse_attention(*args, **options, dtype=torch.float32)
    half = reference.sparse_attention(*args, **options, dtype=cache.query.dtype)
    assert (out.dtype, lse.dtype) == (cache.query.dtype, torch.float32)
    assert_accurate(out, exact[0], half[0])
    assert_accurate(lse, exact[1], plain[1], floor=4e-6)
    return out, lse


@pytest.fixture(scope="session")
def small_cache(make_cache):
    def make(kv_len, kv_start=None, **sizes):
        return make_cache(kv_len, kv_start, **{"Hkv": 1, "D": 16, "N": 160, "T": 1, **sizes})

    return make


def test_the_kernels_run(small_cache, monkeypatch):
    calls = []
    launcher = kernels.sparse_attention
    monkeypatch.setattr(cpu, "sparse_attention", None)
    monkeypatch.setattr(kernels, "sparse_attention", lambda *a: calls.append(1) or launcher(*a))
    cache = small_cache([5], N=9)
    sk.sparse_attention(*cache.args()[:3], *select(cache, [4], 2), cache.kv_len)
    assert calls


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("T, empties", [(1, 0), (3, 7)])
def test_options(small_cache, assert_accurate, options, T, empties):
    cache = small_cache([150, 71], T=T)
    check(cache, *select(cache, [100, 60], 40, empties), assert_accurate, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "D, G, T",
    [(16, 1, 5), (32, 7, 6), (64, 8, 2), (80, 4, 1), (96, 3, 2), (128, 16, 2), (256, 2, 1)]
    + [(320, 2, 1), (512, 8, 3)],
)
def test_shapes(small_cache, assert_accurate, dtype, D, G, T):
    cache = small_cache([150], D=D, G=G, T=T, N=151, dtype=dtype)
    check(cache, *select(cache, [80], 33), assert_accurate)


@pytest.mark.parametrize(
    "D, layout", [(24, "odd_rows"), (24, "heads_first"), (24, "padded_rows"), (96, "padded_rows")]
)
def test_head_dims_that_fill_no_tile(small_cache, assert_accurate, D, layout):
    cache = small_cache([60], D=D, G=2, T=2, layout=layout)
    check(cache, *select(cache, [40], 9), assert_accurate)


def test_more_rows_than_a_tile(small_cache, assert_accurate):
    cache = small_cache([100], T=64, G=1, N=110)
    check(cache, *select(cache, [30], 17), assert_accurate)


@pytest.mark.parametrize("B, Hkv", [(1, 1), (2, 2)])
@pytest.mark.parametrize("tail", [0, 1, 15, 16, 17, 600])
def test_tails(make_cache, assert_accurate, B, Hkv, tail):
    # 600 positions are more than the programs that share a tail read in one tile each.
    cache = make_cache([30 + tail] * B, Hkv=Hkv, G=1, D=16, T=1, N=640)
    check(cache, *select(cache, [30] * B, 20), assert_accurate)


@pytest.mark.parametrize("K", [1, 15, 16, 17, 31, 33, 70])
def test_lists(small_cache, assert_accurate, K):
    cache = small_cache([95, 90, 85], G=1)
    check(cache, *select(cache, [90, 80, 70], K), assert_accurate)


def test_many_splits_merge_in_blocks(small_cache, assert_accurate, merge_two_at_once):
    cache = small_cache([330, 280], T=2, N=340)
    check(cache, *select(cache, [200, 240], 90, 5), assert_accurate)


@pytest.mark.parametrize("layout", ["tokens_first", "padded_rows", "odd_rows", "odd_strides"])
def test_strided_views(make_cache, assert_accurate, layout):
    cache = make_cache([50, 47], layout=layout, G=2, D=16, T=2)
    indices, start = select(cache, [45, 42], 24, 3)
    wide = torch.full((2, 3, 2, 40), -1, dtype=torch.int32).transpose(1, 2)[:, :, 1]
    wide[..., 9:33] = indices
    check(cache, wide[..., 9:33], start, assert_accurate)


def test_key_and_value_laid_out_differently(make_cache, assert_accurate):
    cache, other = make_cache([50], T=1), make_cache([50], T=1, layout="tokens_first")
    cache.value = other.value
    check(cache, *select(cache, [45], 11), assert_accurate)


@pytest.mark.parametrize("strides", [(1 << 30, 512, 16), (512, 1 << 30, 16), (64, 16, 1 << 28)])
def test_offsets_beyond_32_bits(strides):
    # Each stride fits 32 bits, and the offset of the last row does not.
    shape = (4, 4, 9, 16)
    room = 1 + sum((size - 1) * stride for size, stride in zip(shape, (*strides, 1), strict=True))
    # Only the pages that hold the rows are ever touched.
    storage = torch.empty(room, dtype=torch.float16)
    key = storage.as_strided(shape, (*strides, 1))
    value = torch.randn(shape, dtype=torch.float16)
    key.copy_(torch.randn(shape))
    query, kv_len = torch.randn(4, 4, 1, 16).half(), torch.tensor([9, 9, 9, 9], dtype=torch.int32)
    rest = torch.tensor([[[7, 1, 0]] * 4] * 4, dtype=torch.int32), kv_len - 1, kv_len
    for args in ((key, value), (value, key)):
        got = sk.sparse_attention(query, *args, *rest)
        dense = [x.contiguous() for x in args]
        assert all(map(torch.equal, got, sk.sparse_attention(query, *dense, *rest)))


def test_empty_entries_anywhere(make_cache, assert_accurate):
    cache = make_cache([40, 40], [5, 0], N=48, T=2)
    indices = torch.tensor([[[-1, 7, 30, 9], [-7, -1, 47, 31]], [[3, -1, 4, 29], [30, 0, 2, 1]]])
    start = torch.tensor([30, 30], dtype=torch.int32)
    check(cache, indices.int(), start, assert_accurate)


def test_an_entry_at_the_tail_start_is_empty(make_cache, assert_accurate):
    # The tail has that key already: taken twice, it would weigh twice.
    cache = make_cache([40], N=48, T=1)
    indices = torch.tensor([[[3, 9, 30], [1, 2, 4]]], dtype=torch.int32)
    check(cache, indices, torch.tensor([30], dtype=torch.int32), assert_accurate)


@pytest.mark.parametrize("T, K", [(1, 0), (1, 3), (4, 3)])
@pytest.mark.parametrize("options", [{}, {"sinks": SINKS}, {"softcap": 2.0}])
def test_queries_that_see_nothing(small_cache, assert_accurate, T, K, options):
    # Row 0 sees nothing at all, row 1 has a tail shorter than T, row 2 a full one.
    cache = small_cache([12, 14, 20], N=24, T=T)
    start = torch.tensor([12, 12, 12], dtype=torch.int32)
    indices = torch.full((3, 1, K), -1, dtype=torch.int32)
    out, lse = check(cache, indices, start, assert_accurate, **options)
    nothing = options["sinks"][:, None] if "sinks" in options else torch.tensor(-INF)
    assert not out[0].any() and torch.equal(lse[0], nothing.expand_as(lse[0]))
    assert not out[1, :, : max(0, T - 2)].any()


def test_queries_before_the_tail(small_cache, assert_accurate):
    # The first queries stand before the tail: they see the listed keys, all of them.
    cache = small_cache([33], N=40, T=5)
    indices = torch.tensor([[[3, 29, 30]]], dtype=torch.int32)
    check(cache, indices, torch.tensor([31], dtype=torch.int32), assert_accurate)


def test_empty_batch_and_empty_cache():
    none = torch.zeros(0, dtype=torch.int32)
    q, k, indices = torch.ones(0, 4, 2, 16), torch.ones(0, 2, 5, 16), none.view(0, 2, 0)
    out, lse = sk.sparse_attention(q, k, k, indices, none, none)
    assert out.shape == (0, 4, 2, 16) and lse.shape == (0, 4, 2)
    q, k, zero = torch.ones(1, 4, 2, 16), torch.ones(1, 2, 0, 16), none.new_zeros(1)
    out, lse = sk.sparse_attention(q, k, k, none.view(1, 2, 0), zero, zero)
    assert not out.any() and bool((lse == -INF).all())


def test_a_row_is_the_same_bits_in_every_batch_of_the_same_size(small_cache):
    cache = small_cache([150, 61, 109], T=2)
    indices, start = select(cache, [100, 40, 70], 37, 3)
    args = (*cache.args()[:3], indices, start, cache.kv_len)
    together = sk.sparse_attention(*args)
    for rows in ([2, 0, 1], [1, 1, 1]):
        for x, y in zip(together, sk.sparse_attention(*(a[rows] for a in args)), strict=True):
            assert torch.equal(x[rows], y)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_range(small_cache, assert_accurate, data):
    N = data.draw(st.sampled_from([1, 15, 16, 17, 48, 97]), label="N")
    T = data.draw(st.integers(1, 5), label="T")
    kv_len = data.draw(st.lists(st.integers(0, N), min_size=1, max_size=3), label="kv_len")
    start = [data.draw(st.integers(0, n), label="tail_start") for n in kv_len]
    K = data.draw(st.integers(0, 40), label="K")
    cache = small_cache(kv_len, T=T, N=N, G=2, seed=N)
    check(cache, *select(cache, start, K, data.draw(st.integers(0, K))), assert_accurate)


def test_dispatcher_contract(small_cache):
    cache = small_cache([20], N=24, T=2)
    args = (*cache.args()[:3], *select(cache, [10], 5), cache.kv_len, 0.25, None, SINKS)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.std_kernels.sparse_attention.default, args, test_utils=utils)

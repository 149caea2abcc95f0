import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import std_kernels as sk
from std_kernels import _packed, reference

INF, NAN = float("inf"), float("nan")
SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0, 2.0, -4.0, 1.0, 6.0])
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 2.5},
    "sinks": {"sinks": SINKS},
    "scale": {"scale": 0.3},
    "all": {"softcap": 4.0, "sinks": SINKS, "scale": 0.2},
}


def lse_floor(dtype):
    """Fused kernels round the softmax weights to half, each by eps/2 at most, then sum them."""
    return 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2


def select(cache, tail_start, K, empties=0, seed=0):
    """Random distinct indices per (b, h), ascending, the last `empties` of them empty."""
    generator = torch.Generator().manual_seed(seed)
    B, Hkv = cache.key.shape[:2]
    indices = torch.full((B, Hkv, K), -1, dtype=torch.int32)
    for b in range(B):
        first = int(cache.kv_start[b])
        room = max(0, tail_start[b] - first)
        for h in range(Hkv):
            chosen = torch.randperm(room, generator=generator)[: K - empties].sort().values
            indices[b, h, : len(chosen)] = first + chosen
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
    assert_accurate(lse, exact[1], plain[1], floor=lse_floor(cache.query.dtype))
    return out, lse


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("tail_start, empties", [([80, 80], 0), ([90, 50], 0), ([80, 60], 5)])
def test_options(make_cache, assert_accurate, options, T, tail_start, empties):
    cache = make_cache([94, tail_start[1] + 14], [0, 3], T=T)
    indices, start = select(cache, tail_start, 20, empties)
    check(cache, indices, start, assert_accurate, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "D, G, T", [(16, 1, 5), (32, 7, 64), (80, 4, 1), (128, 16, 2), (256, 2, 1), (512, 8, 3)]
)
def test_shapes(make_cache, assert_accurate, dtype, D, G, T):
    cache = make_cache([150, 149], D=D, G=G, T=T, N=151, dtype=dtype)
    indices, start = select(cache, [80, 79], 33)
    check(cache, indices, start, assert_accurate)


@pytest.mark.parametrize("layout", ["tokens_first", "padded_rows", "odd_strides"])
@pytest.mark.parametrize("empties", [0, 3])
def test_strided_views(make_cache, assert_accurate, layout, empties):
    cache = make_cache([50, 47], layout=layout, T=1)
    indices, start = select(cache, [45, 42], 11, empties)
    check(cache, indices, start, assert_accurate)


def test_key_and_value_laid_out_differently(make_cache, assert_accurate):
    cache, other = make_cache([50], T=1), make_cache([50], T=1, layout="tokens_first")
    cache.value = other.value
    check(cache, *select(cache, [45], 11), assert_accurate)


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


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("K", [0, 3])
@pytest.mark.parametrize("options", [{}, {"sinks": SINKS}, {"softcap": 2.0}])
def test_queries_that_see_nothing(make_cache, assert_accurate, T, K, options):
    # Row 0 sees nothing at all, row 1 has a tail shorter than T, row 2 a full one.
    cache = make_cache([12, 14, 20], N=24, T=T)
    start = torch.tensor([12, 12, 12], dtype=torch.int32)
    indices = torch.full((3, 2, K), -1, dtype=torch.int32)
    out, lse = check(cache, indices, start, assert_accurate, **options)
    nothing = options["sinks"][:, None] if "sinks" in options else torch.tensor(-INF)
    assert not out[0].any() and torch.equal(lse[0], nothing.expand_as(lse[0]))
    assert not out[1, :, : max(0, T - 2)].any()
    # A row of its own takes the path on which nothing is gathered.
    out, lse = sk.sparse_attention(
        cache.query[:1],
        cache.key[:1],
        cache.value[:1],
        indices[:1],
        start[:1],
        cache.kv_len[:1],
        **options,
    )
    assert not out.any() and torch.equal(lse[0], nothing.expand_as(lse[0]))


def test_queries_before_the_tail(make_cache, assert_accurate):
    # The first queries stand before the tail: they see the listed keys and nothing else.
    cache = make_cache([33], N=40, T=5)
    check(cache, *select(cache, [31], 6), assert_accurate)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_range(make_cache, assert_accurate, data):
    N = data.draw(st.integers(1, 24), label="N")
    T = data.draw(st.integers(1, 6), label="T")
    kv_len = data.draw(st.lists(st.integers(0, N), min_size=1, max_size=3), label="kv_len")
    start = [data.draw(st.integers(0, n), label="tail_start") for n in kv_len]
    K = data.draw(st.integers(0, 6), label="K")
    cache = make_cache(kv_len, T=T, N=N, D=16, G=2, seed=N)
    check(cache, *select(cache, start, K, data.draw(st.integers(0, K))), assert_accurate)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(3)), slots=st.permutations(range(8)), pad=st.integers(0, 5))
def test_rows_permute_and_order_and_padding_do_not_matter(make_cache, order, slots, pad):
    cache = make_cache([30, 22, 25], N=32, T=2)
    indices, start = select(cache, [20, 15, 18], 8)
    poison(cache, indices, start)
    args = cache.query, cache.key, cache.value, indices, start, cache.kv_len
    out, lse = sk.sparse_attention(*args)
    padded = torch.nn.functional.pad(indices[..., list(slots)], (0, pad), value=-1)
    moved = [x[list(order)] for x in (*args[:3], padded, start, cache.kv_len)]
    again = sk.sparse_attention(*moved)
    torch.testing.assert_close(again[0], out[list(order)], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again[1], lse[list(order)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_all_keys_listed_is_dense(make_cache, assert_accurate, T, options):
    cache = make_cache([60, 45], [0, 6], N=64, T=T)
    start = cache.kv_len - 5
    indices = torch.arange(64, dtype=torch.int32).expand(2, 2, 64).clone()
    indices[1, :, :6] = -1
    out, lse = check(cache, indices, start, assert_accurate, **options)
    dense = {
        dtype: reference.verify_attention(
            *cache.args(), kv_start=cache.kv_start, **options, dtype=dtype
        )
        for dtype in (torch.float32, torch.float64)
    }
    for got, plain, exact in zip((out, lse), dense[torch.float32], dense[torch.float64]):
        assert_accurate(got, exact, plain, floor=4e-6)


def case(make_cache, seed, K=12):
    cache = make_cache([50], T=1)
    cache.query = cache.query + seed
    indices, tail_start = select(cache, [40], K, seed=seed)
    return cache.query, cache.key, cache.value, indices, tail_start, cache.kv_len


@pytest.mark.parametrize("most", [1 << 26, 0], ids=["held", "new"])
def test_memory_that_calls_share_shows_nowhere(make_cache, monkeypatch, most):
    """What rows are gathered into is used again: by other shapes, types, modes and threads."""
    monkeypatch.setattr(_packed, "_MOST_HELD", most)
    monkeypatch.setattr(_packed, "_scratch", _packed._Scratch())
    calls = [case(make_cache, seed, K) for seed, K in enumerate((12, 30, 3, 12))]
    calls.append(tuple(x.to(torch.bfloat16) if x.is_floating_point() else x for x in calls[0]))
    expected = [reference.sparse_attention(*args)[0] for args in calls]
    with torch.inference_mode():  # whose tensors could not be written to afterwards
        sk.sparse_attention(*calls[0])
    got = [sk.sparse_attention(*args)[0] for args in calls]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            many = list(pool.map(lambda args: sk.sparse_attention(*args)[0], 100 * calls))
    finally:
        sys.setswitchinterval(interval)
    for out, exact in zip(got + many, 101 * expected):
        accuracy = 2e-2 if out.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(out.double(), exact.double(), rtol=accuracy, atol=accuracy)
    assert bool(_packed._scratch.held) == (most > 0)

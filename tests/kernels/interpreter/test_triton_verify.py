import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import std_kernels as sk
from std_kernels import _verify_attention_kernels as kernels
from std_kernels import cpu_verify, reference

INF, NAN = float("inf"), float("nan")
SINKS = torch.tensor([0.5, -1.0, 3.0, 6.0])
OPTIONS = {
    "plain": {},
    "window": {"window": 7},
    "window of one": {"window": 1},
    "window over splits": {"window": 70},
    "softcap": {"softcap": 2.5},
    "wide softcap": {"softcap": 50.0},
    "sinks": {"sinks": SINKS},
    "negative scale": {"scale": -0.3},
    "no scale": {"scale": 0.0},
    "all": {"window": 50, "softcap": 4.0, "sinks": SINKS, "scale": 0.2},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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
    assert_accurate(got[1], exact[1], plain[1], floor=4e-6)
    assert_accurate(got[2], exact[2], plain[2], floor=4e-6)
    assert torch.equal(got[2] == 0, exact[2] == 0)
    out, lse = sk.verify_attention(*cache.args(), **options)
    assert torch.equal(out, got[0]) and torch.equal(lse, got[1])
    return got


@pytest.fixture(scope="session")
def small_cache(make_cache):
    def make(kv_len, kv_start=None, **sizes):
        return make_cache(kv_len, kv_start, **{"Hkv": 1, "D": 16, "N": 160, **sizes})

    return make


def test_the_kernels_run(small_cache, monkeypatch):
    calls = []
    for name in ("verify_attention", "verify_attention_with_scores"):
        monkeypatch.setattr(cpu_verify, name, None)
        launcher = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, f=launcher: calls.append(f) or f(*a))
    cache = small_cache([5], N=9, T=1)
    sk.verify_attention(*cache.args())
    sk.verify_attention_with_scores(*cache.args(), torch.zeros(1, 4, 1))
    assert len(calls) == 2


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("T", [1, 3])
def test_options(small_cache, assert_accurate, options, T):
    check(small_cache([159, 97, 40], [0, 50, 31], T=T), assert_accurate, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "D, G, T",
    [(16, 1, 5), (32, 7, 9), (64, 8, 2), (80, 4, 1), (96, 3, 2), (128, 16, 3), (256, 2, 2)]
    + [(320, 2, 3), (512, 3, 2)],
)
def test_shapes(small_cache, assert_accurate, dtype, D, G, T):
    check(small_cache([150], D=D, G=G, T=T, N=151, dtype=dtype), assert_accurate)


@pytest.mark.parametrize(
    "D, layout", [(24, "odd_rows"), (24, "heads_first"), (40, "padded_rows"), (96, "padded_rows")]
)
def test_head_dims_that_fill_no_tile(small_cache, assert_accurate, D, layout):
    # What lies beyond D in memory is the next row, or NaN.
    check(small_cache([60], D=D, G=2, T=2, layout=layout), assert_accurate)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_and_sinks_in_half_precision(small_cache, assert_accurate, dtype):
    check(small_cache([70], [9], dtype=dtype), assert_accurate, softcap=3.0, sinks=SINKS)


def test_64_queries(small_cache, assert_accurate):
    check(small_cache([70], T=64, G=2, N=70), assert_accurate)


@pytest.mark.parametrize("layout", ["tokens_first", "padded_rows", "odd_rows", "odd_strides"])
def test_strided_views(make_cache, assert_accurate, layout):
    check(make_cache([60, 17], [2, 0], layout=layout, G=2, D=16), assert_accurate)


def test_key_and_value_laid_out_differently(make_cache, assert_accurate):
    cache, other = make_cache([50], G=2), make_cache([50], G=2, layout="tokens_first")
    cache.value = other.value
    check(cache, assert_accurate, torch.randn(1, 8, 6)[:, ::2, 2:5])


@pytest.mark.parametrize("strides", [(1 << 30, 512, 16), (512, 1 << 30, 16), (64, 16, 1 << 28)])
def test_offsets_beyond_32_bits(assert_accurate, strides):
    # Each stride fits 32 bits, and the offset of the last row does not.
    shape = (4, 4, 9, 16)
    room = 1 + sum((size - 1) * stride for size, stride in zip(shape, (*strides, 1), strict=True))
    # Only the pages that hold the rows are ever touched.
    storage = torch.empty(room, dtype=torch.float16)
    key = storage.as_strided(shape, (*strides, 1))
    value = torch.randn(shape, dtype=torch.float16)
    key.copy_(torch.randn(shape))
    query, kv_len = torch.randn(4, 4, 1, 16).half(), torch.tensor([9, 7, 8, 9], dtype=torch.int32)
    for args in ((key, value), (value, key)):
        got = sk.verify_attention(query, *args, kv_len)
        dense = [x.contiguous() for x in args]
        assert all(map(torch.equal, got, sk.verify_attention(query, *dense, kv_len)))


@pytest.mark.parametrize("kv_len, kv_start", [([0], [0]), ([2], [0]), ([9], [9]), ([50], [48])])
@pytest.mark.parametrize("options", [{}, {"sinks": SINKS}, {"window": 2}, {"softcap": 1.0}])
def test_queries_that_see_nothing(small_cache, assert_accurate, kv_len, kv_start, options):
    cache = small_cache(kv_len, kv_start, T=4, N=52)
    out, lse, scores = check(cache, assert_accurate, **options)
    blind = 4 - (kv_len[0] - kv_start[0])
    assert torch.equal(out[:, :, :blind], torch.zeros_like(out[:, :, :blind]))
    nothing = options["sinks"][:, None] if "sinks" in options else torch.tensor(-INF)
    assert torch.equal(lse[:, :, :blind], nothing.expand_as(lse[:, :, :blind]))
    assert int((scores != 0).sum()) == kv_len[0] - kv_start[0]


def test_empty_batch_and_empty_cache():
    none = torch.zeros(0, dtype=torch.int32)
    q, k, score_lse = torch.ones(0, 4, 2, 16), torch.ones(0, 2, 5, 16), torch.ones(0, 4, 2)
    out, lse, scores = sk.verify_attention_with_scores(q, k, k, none, score_lse)
    assert (out.shape, lse.shape, scores.shape) == ((0, 4, 2, 16), (0, 4, 2), (0, 2, 5))
    q, k, kv_len = torch.ones(1, 4, 2, 16), torch.ones(1, 2, 0, 16), none.new_zeros(1)
    out, lse, scores = sk.verify_attention_with_scores(q, k, k, kv_len, torch.ones(1, 4, 2))
    assert not out.any() and bool((lse == -INF).all()) and scores.shape == (1, 2, 0)


def test_sink_of_no_weight_changes_nothing(small_cache):
    cache = small_cache([100, 2], T=4)
    out, lse = sk.verify_attention(*cache.args(), sinks=torch.full((4,), -INF))
    plain, plain_lse = sk.verify_attention(*cache.args())
    assert torch.equal(out, plain) and torch.equal(lse, plain_lse)


@pytest.mark.parametrize("switch", [INF, NAN])
def test_rows_switched_off_leave_no_score(make_cache, assert_accurate, switch):
    cache = make_cache([60, 51], [4, 0], G=2)
    score_lse = torch.full((2, 4, 3), 2.0)
    score_lse[0, 2:], score_lse[1, :, 1:] = switch, switch
    _, _, scores = check(cache, assert_accurate, score_lse)
    assert not scores[0, 1].any()
    assert not scores[1, :, 49:].any() and bool((scores[1, :, :49] > 0).all())


def test_score_is_bounded_where_the_estimate_is_too_low(small_cache, assert_accurate):
    cache = small_cache([60, 51], [4, 0])
    score_lse = torch.full((2, 4, 3), -INF)
    score_lse[0, :, 0] = -500.0
    _, _, scores = check(cache, assert_accurate, score_lse)
    # Every row counts 1 at every key it sees: G * T = 12, fewer under the causal triangle.
    assert bool((scores[0, 0, 4:58] == 12).all())
    assert scores[0, 0, 57:61].tolist() == [12.0, 8.0, 4.0, 0.0]


@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.float32, {}),
        (torch.float32, {"window": 130}),
        (torch.bfloat16, {"softcap": 3.0, "sinks": SINKS[:3]}),
    ],
)
def test_a_row_is_the_same_bits_for_every_T(small_cache, merge_two_at_once, dtype, options):
    # 16 * 3 rows fill more than a tile. The window starts at 151 - T: in an odd split of
    # 48 and in an even one, and anywhere in a tile. It leaves the last row three splits or more.
    cache = small_cache([280], G=3, T=16, N=290, dtype=dtype)
    everything = sk.verify_attention(*cache.args(), **options)
    for T in range(1, 16):
        short = sk.verify_attention(cache.query[:, :, -T:], *cache.args()[1:], **options)
        assert torch.equal(short[0], everything[0][:, :, -T:]), T
        assert torch.equal(short[1], everything[1][:, :, -T:]), T
    for t in (0, 1, 6, 14):
        # What comes after the row's token does not exist yet.
        now = int(cache.kv_len) - 15 + t
        key, value = cache.key.clone(), cache.value.clone()
        key[:, :, now:], value[:, :, now:] = NAN, NAN
        alone = sk.verify_attention(
            cache.query[:, :, t : t + 1], key, value, torch.full_like(cache.kv_len, now), **options
        )
        assert torch.equal(alone[0], everything[0][:, :, t : t + 1]), t
        assert torch.equal(alone[1], everything[1][:, :, t : t + 1]), t


def test_a_row_is_the_same_bits_in_every_batch(small_cache, merge_two_at_once):
    """Where splits are as long: here they always are, on a GPU for one number of rows."""
    cache = small_cache([150, 61, 9, 100], [0, 7, 3, 52], T=2)
    score_lse = torch.randn(4, 4, 2)
    args = (*cache.args(), score_lse, cache.kv_start)

    def call(rows):
        *first, kv_start = (x[rows] for x in args)
        return sk.verify_attention_with_scores(*first, kv_start=kv_start)

    together = call([0, 1, 2, 3])
    for rows in ([0], [1], [2], [3], [3, 1, 0, 2], [1, 1]):
        for x, y in zip(together, call(rows), strict=True):
            assert torch.equal(x[rows], y)


def test_many_splits_merge_in_blocks(small_cache, assert_accurate, merge_two_at_once):
    check(small_cache([330, 290], [0, 200], T=2, N=340), assert_accurate)
    check(small_cache([330, 290], [0, 200], T=2, N=340), assert_accurate, window=120)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_range(small_cache, assert_accurate, data):
    N = data.draw(st.sampled_from([1, 15, 16, 17, 48, 49, 97]), label="N")
    T = data.draw(st.integers(1, 5), label="T")
    kv_len = data.draw(st.lists(st.integers(0, N), min_size=1, max_size=3), label="kv_len")
    kv_start = [data.draw(st.integers(0, n), label="kv_start") for n in kv_len]
    window = data.draw(st.none() | st.integers(1, N + 2), label="window")
    cache = small_cache(kv_len, kv_start, T=T, N=N, G=2, seed=N)
    check(cache, assert_accurate, window=window)


def test_dispatcher_contract(small_cache):
    cache = small_cache([20], N=24, T=2)
    options = (cache.kv_start, 9, 0.25, None, SINKS)
    utils = ("test_schema", "test_faketensor")
    ops = torch.ops.std_kernels
    torch.library.opcheck(
        ops.verify_attention.default, (*cache.args(), *options), test_utils=utils
    )
    args = (*cache.args(), torch.zeros(1, 4, 2), *options, torch.empty(1, 1, 24))
    torch.library.opcheck(ops.verify_attention_with_scores.default, args, test_utils=utils)


@pytest.mark.parametrize("T", [3, 9])  # rows of one tile, and of two that are added
def test_scores_go_where_they_are_asked_to(small_cache, T):
    """To one layer's place among others; no byte of the others changes."""
    cache = small_cache([100, 70], [0, 20], T=T, N=130)
    buffer = torch.full((3, 2, 1, 130), 7.0)
    given = *cache.args(), torch.full(cache.query.shape[:3], 2.0)
    own = sk.verify_attention_with_scores(*given, kv_start=cache.kv_start)
    got = sk.verify_attention_with_scores(*given, kv_start=cache.kv_start, scores=buffer[1])
    assert got[2].data_ptr() == buffer[1].data_ptr()
    assert all(map(torch.equal, got, own)) and bool((buffer[::2] == 7).all())

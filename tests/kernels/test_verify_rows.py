"""On the CPU a row has the same bits whatever T, its place, the batch, and what lies behind it.

Rounding hides most differences in the order of adding. So logits and values cancel here: half of
each sum are the terms of the other half, in another order and with the other sign.
"""

import pytest
import torch

import std_kernels as sk
from std_kernels import _blocks, cpu_verify

NAN = float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(8, 1, 32), (2, 4, 32), (3, 3, 64), (4, 7, 128), (1, 6, 16), (1, 16, 80), (2, 1, 256)]
SHAPES += [(1, 8, 512)]
SHAPES += [(2, 2, 24)]  # rows of 96 bytes, which start anywhere in a cache line
SINKS = torch.linspace(-3, 5, 32)
OPTIONS = {
    "plain": {},
    "window": {"window": 200},
    "narrow window": {"window": 3},
    "wide window": {"window": 1200},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": SINKS},
    "all": {"window": 150, "softcap": 2.0, "sinks": SINKS},
}


@pytest.fixture(autouse=True)
def threads():
    """Restores what a test sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def cancelling(heads, n, D, dtype, seed=0):
    """Queries and a cache [1, ., n, D] whose sums over D and over keys nearly cancel."""
    Hkv, G = heads
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(D // 2, generator=generator)
    query = 9 * torch.randn(1, Hkv * G, n, D // 2, generator=generator)
    key = torch.randn(1, Hkv, n, D // 2, generator=generator)
    value = torch.randn(1, Hkv, n, D, generator=generator)
    # Each 64 keys come a second time, in another order and with the opposite values.
    for start in range(64, n - 63, 128):
        other = torch.randperm(64, generator=generator) + start - 64
        key[:, :, start : start + 64] = key[:, :, other]
        value[:, :, start : start + 64] = -value[:, :, other]
    query = torch.cat((query, query[..., order]), -1)
    key = torch.cat((key, -key[..., order]), -1)
    # As much again of what does not cancel, or all weights would be alike.
    key += 0.1 * torch.randn(key.shape, generator=generator)
    return [x.to(dtype) for x in (query, key, value)]


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def call(query, key, value, lengths, starts, T, N, scores=False, **options):
    """One call of rows that all come from the one cache, each cut to its own range."""
    rows = [query[:, :, torch.arange(end - T, end).clamp(min=0)] for end in lengths]
    caches = []
    for x in (key, value):
        cache = x.new_full((len(lengths), *x.shape[1:2], N, x.shape[3]), NAN)
        for b, (low, high) in enumerate(zip(starts, lengths)):
            cache[b, :, low:high] = x[0, :, low:high]
        caches.append(cache)
    given = torch.cat(rows), *caches, torch.tensor(lengths, dtype=torch.int32)
    options["kv_start"] = torch.tensor(starts, dtype=torch.int32)
    if "sinks" in options:
        options["sinks"] = options["sinks"][: query.shape[1]]
    if scores:
        score_lse = torch.full(given[0].shape[:3], 2.0)
        return sk.verify_attention_with_scores(*given, score_lse, **options)[:2]
    return sk.verify_attention(*given, **options)


def check(heads, D, dtype, lengths, starts, T, scores=False, few=64, **options):
    """Every row of one call has the bits of the same row alone, whatever the threads."""
    n = max(lengths)
    given = cancelling(heads, n, D, dtype)
    torch.set_num_threads(2)
    out, lse = call(*given, lengths, starts, T, n + 7, scores, **options)
    assert not out.isnan().any() and not lse.isnan().any()
    for b, (low, high) in enumerate(zip(starts, lengths)):
        for t in range(T) if T <= few else {0, 1, T // 3, T // 2 + 1, T - 2, T - 1}:
            torch.set_num_threads(2 if t == 0 else 1)
            end = max(0, high - T + t + 1)
            alone = call(*given, [end], [min(low, end)], 1, end + t % 2, **options)
            where = f"row {b}, token {t} of {T}, position {end - 1}"
            assert torch.equal(bits(out[b : b + 1, :, t : t + 1]), bits(alone[0])), where
            assert torch.equal(bits(lse[b : b + 1, :, t : t + 1]), bits(alone[1])), where


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Hkv, G, D", SHAPES)
def test_any_number_of_tokens(dtype, Hkv, G, D):
    for T in (2, 3, 5, 9, 33, 64):
        check((Hkv, G), D, dtype, [700 + T], [T % 4], T, few=9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Hkv, G", [(2, 4), (8, 1), (1, 3)])
@pytest.mark.parametrize("end", [7, 127, 128, 129, 260, 512, 513, 1025])
def test_around_the_borders_of_blocks(dtype, Hkv, G, end):
    check((Hkv, G), 32, dtype, [end], [0], 7)
    check((Hkv, G), 32, dtype, [end + 3], [0], 7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("Hkv, G", [(2, 4), (8, 1), (3, 2)])
def test_options_and_batches(dtype, options, Hkv, G):
    check((Hkv, G), 32, dtype, [1290, 700, 131, 5], [0, 61, 128, 3], 6, **options)
    check((Hkv, G), 32, dtype, [514, 514], [9, 9], 4, scores=True, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_batch_and_the_start_change_nothing(dtype):
    """One call of many rows of a range, the same with other ranges beside, the same moved."""
    given = cancelling((2, 4), 600, 32, dtype)
    one = call(*given, [600], [30], 5, 600)
    for lengths, starts in ([600] * 3, [30] * 3), ([600, 77], [30, 0]):
        many = call(*given, lengths, starts, 5, 640)
        assert all(torch.equal(bits(x[:1]), bits(y)) for x, y in zip(many, one))
    moved = [x[:, :, 30:] for x in given]
    assert all(
        torch.equal(bits(x), bits(y)) for x, y in zip(call(*moved, [570], [0], 5, 570), one)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_where_the_number_of_rows_counts(dtype, softcap, monkeypatch):
    """As on a machine whose matrix products are not alike for 4 rows and more."""
    monkeypatch.setattr(_blocks, "_one_order", lambda *_: False)
    for Hkv, G in (2, 4), (3, 1), (1, 2):
        check((Hkv, G), 32, dtype, [1290, 300], [0, 61], 5, softcap=softcap)


def test_the_trial_finds_an_order_that_depends_on_the_rows(monkeypatch):
    """Of an attention that adds the keys the other way round from 20 rows on."""
    whole = _blocks._attend

    def attend(rows, keys, values, *options):
        turned = [x.flip(2) if rows.shape[2] >= 20 else x for x in (keys, values)]
        return whole(rows, *turned, *options)

    for fused in (True, False):
        for dtype in DTYPES:
            monkeypatch.setattr(_blocks, "_attend", attend)
            assert not _blocks._one_order.__wrapped__(dtype, 32, fused)
            monkeypatch.setattr(_blocks, "_attend", whole)
            assert _blocks._one_order.__wrapped__(dtype, 32, fused) in (True, False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Hkv, G, D", SHAPES)
def test_every_number_of_tokens(dtype, Hkv, G, D):
    for T in range(1, 65):
        check((Hkv, G), D, dtype, [1300 - 17 * T], [T], T)


def test_blocks_are_where_the_docstring_says():
    assert cpu_verify._same_cuts(126, 64, None) == 2
    assert cpu_verify._same_cuts(128, 64, None) == 64
    assert cpu_verify._same_cuts(10, 64, 12) == 2  # 10 and 11 see key 0, 12 does not
    assert cpu_verify._same_cuts(130, 64, 4) == 1  # 131 sees none of the first block

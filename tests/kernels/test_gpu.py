"""The kernels on a GPU: real sizes, bits, CUDA graphs, streams, addresses past 2^31.

In Triton's interpreter the same tests run at tiny sizes, less those about CUDA itself.
By hand: pytest -m gpu tests/kernels, or TRITON_INTERPRET=1 pytest tests/kernels/test_gpu.py
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import std_kernels as sk
from std_kernels import reference

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
cuda_only = pytest.mark.skipif(INTERPRETED, reason="about CUDA, not about the kernels")
ROOT = Path(__file__).parents[2]
MEMCHECK = 240  # seconds
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(scope="module", autouse=True)
def device():
    """The reference makes its tensors on the default device."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with torch.device(DEVICE):
        yield
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def real(size, tiny):
    return tiny if INTERPRETED else size


@pytest.fixture
def big_cache(make_cache):
    """Two rows, one nearly full and one half, the unused part NaN."""

    def make(N, **sizes):
        with torch.device("cpu"):
            return make_cache([N - 1, N // 2 + 3], [5, 0], N=N, device=DEVICE, **sizes)

    return make


# N, D, G, tokens, dtype: GQA of current models, head dims that fill no tile, one long row.
SHAPES = [
    (real(131072, 160), 128, 7, 5, BF16),
    (real(32768, 97), 64, 8, 9, FP16),
    (real(8193, 49), 256, 2, 3, BF16),
    (real(8200, 50), 512, 8, 5, BF16),
    (real(4097, 33), 96, 16, 4, FP16),
    (real(5000, 50), 80, 4, 2, BF16),
    (real(3001, 45), 120, 3, 3, BF16),
    (real(2048, 60), 32, 1, 64, FP32),
    (real(1 << 20, 100), 64, 2, 1, BF16),
]
SOME = [SHAPES[0], SHAPES[1], SHAPES[3], SHAPES[5]]
NAMES = "N, D, G, T, dtype"


@pytest.mark.parametrize(NAMES, SHAPES)
def test_verify_attention(big_cache, assert_accurate, N, D, G, T, dtype):
    cache = big_cache(N, D=D, G=G, T=T, dtype=dtype, Hkv=1)
    score_lse = torch.full(cache.query.shape[:3], 8.0)
    window = {"window": N // 3} if N % 2 else {}
    options = {"kv_start": cache.kv_start, **window}
    got = sk.verify_attention_with_scores(*cache.args(), score_lse, **options)
    exact = reference.verify_attention_with_scores(*cache.args(), score_lse, **options)
    half, plain = (
        reference.verify_attention_with_scores(*cache.args(), score_lse, **options, dtype=x)
        for x in (dtype, FP32)
    )
    # Float32 sums are rounded key by key, in another order than plain torch's: keys one by one
    # in tiles of 32 and splits of 256 come to 0.7 of a limit with a floor of one unit.
    units = 4 if dtype == FP32 else 1
    floor = units * torch.finfo(dtype).eps * max(1.0, float(exact[0].abs().max()))
    assert_accurate(got[0], exact[0], half[0], floor=floor)
    assert_accurate(got[1], exact[1], plain[1], floor=1e-5)
    assert_accurate(got[2], exact[2], plain[2], floor=1e-5)
    out, lse = sk.verify_attention(*cache.args(), **options)
    assert torch.equal(out, got[0]) and torch.equal(lse, got[1])


@pytest.mark.parametrize(NAMES, SHAPES)
def test_sparse_attention(big_cache, assert_accurate, N, D, G, T, dtype):
    cache = big_cache(N, D=D, G=G, T=T, dtype=dtype, Hkv=2)
    tail_start = (cache.kv_len - T - 40).clamp(min=6)
    K = min(1024, N // 4)
    n = torch.arange(N)
    listed = (n >= cache.kv_start[:, None]) & (n < tail_start[:, None])
    indices = sk.select_topk(torch.rand(2, 2, N), K, candidates=listed)
    args = *cache.args()[:3], indices, tail_start, cache.kv_len
    got = sk.sparse_attention(*args)
    exact = reference.sparse_attention(*args)
    half, plain = (reference.sparse_attention(*args, dtype=x) for x in (dtype, FP32))
    assert_accurate(got[0], exact[0], half[0])
    assert_accurate(got[1], exact[1], plain[1], floor=1e-5)


@pytest.mark.parametrize(NAMES, SHAPES[::2])
def test_score_keys(big_cache, assert_accurate, N, D, G, T, dtype):
    W = real(64, 11)
    cache = big_cache(N, D=D, G=G, T=W, dtype=dtype, Hkv=1)
    counts = torch.tensor([W, W // 2], dtype=torch.int32)
    args = cache.query, cache.key, cache.kv_len
    options = {"kv_start": cache.kv_start, "num_queries": counts, "softcap": 20.0}
    exact = reference.score_keys(*args, **options)
    plain = reference.score_keys(*args, **options, dtype=FP32)
    assert_accurate(sk.score_keys(*args, **options), exact, plain, floor=1e-6)


@pytest.mark.parametrize("rows, N, k", [(64, 25088, 1024), (8, 131072, 4096), (2, 1 << 20, 16384)])
@pytest.mark.parametrize("kind", ["random", "ties", "few", "masked"])
def test_select_topk(rows, N, k, kind):
    rows, N, k = real(rows, 2), real(N, {25088: 120, 131072: 150, 1 << 20: 200}[N]), real(k, 40)
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(N)
        scores = torch.rand(rows // 2, 1, 2, N, generator=generator).mul(1e4).log()
        chance = torch.rand(2, 1, N, generator=generator)
        masks = {}
        if kind == "ties":
            scores = scores.round()
        elif kind == "few":
            scores[..., N // k * 2 :] = -float("inf")
        elif kind == "masked":
            masks = {"candidates": chance[0] < 0.8, "always": chance[1] < k / N / 2}
        expected = reference.select_topk(scores, k, **masks)
    masks = {name: mask.to(DEVICE) for name, mask in masks.items()}
    got = sk.select_topk(scores.to(DEVICE), k, **masks)
    assert torch.equal(got.cpu(), expected)
    again = sk.select_topk(scores.to(DEVICE), k, **masks)
    assert torch.equal(got, again)


def four_bits(N, K, group):
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(N)
        values = torch.randint(256, (N, K // 2), dtype=torch.uint8, generator=generator)
        pairs = torch.rand(K // group, N, 2, generator=generator) / 10 + 0.01
    return values.to(DEVICE), pairs.bfloat16().to(DEVICE)


# Matrices of a 7B: q, k, v in one, and down, whose K is split unevenly; odd ones.
@pytest.mark.parametrize(
    "N, K, group",
    [
        (real(4608, 80), real(3584, 384), 128),
        (real(3584, 48), real(18944, 640), 128),
        (real(336, 16), real(192, 64), 64),
        (real(1040, 16), real(4896, 96), 32),
    ],
)
@pytest.mark.parametrize("rows", real([1, 2, 16, 33], [1, 3]))
def test_int4_linear(assert_accurate, N, K, group, rows):
    values, scales = four_bits(N, K, group)
    given, bias = torch.randn(rows, K, dtype=BF16), torch.randn(N, dtype=BF16)
    packed = sk.pack_int4(values, group)
    exact = reference.int4_linear(given, values, scales, bias)
    plain = reference.int4_linear(given, values, scales, bias, dtype=BF16)
    got = sk.int4_linear(given, packed, scales, bias)
    assert_accurate(got, exact, plain)
    parts = sk.int4_linear_partials(given, packed, scales)
    assert torch.equal((sum(parts[1:], parts[0]) + bias.float()).to(BF16), got)
    if N > 64:
        part = slice(64, N)
        alone = sk.pack_int4(values[part], group), scales[:, part].contiguous()
        shared = packed[part], scales[:, part]
        assert torch.equal(*(sk.int4_linear(given, *weight) for weight in (alone, shared)))


@pytest.mark.parametrize("N, D, G, _, dtype", SOME)
def test_verify_rows_do_not_depend_on_their_number(big_cache, N, D, G, _, dtype):
    """Bit for bit: the last T tokens of 16, for any T, and each token alone."""
    cache = big_cache(N, D=D, G=G, T=16, dtype=dtype, Hkv=1)
    query, key, value, kv_len = cache.args()
    out, lse = sk.verify_attention(query, key, value, kv_len, kv_start=cache.kv_start)
    for T in real(range(1, 16), (2, 5)):
        some = sk.verify_attention(query[:, :, -T:], key, value, kv_len, kv_start=cache.kv_start)
        assert torch.equal(some[0], out[:, :, -T:]) and torch.equal(some[1], lse[:, :, -T:]), T
    for t in real(range(16), (0, 9)):
        at = slice(t, t + 1)
        alone = sk.verify_attention(
            query[:, :, at], key, value, kv_len - 15 + t, kv_start=cache.kv_start
        )
        assert torch.equal(alone[0], out[:, :, at]) and torch.equal(alone[1], lse[:, :, at]), t


@pytest.mark.parametrize("N, D, G, T, dtype", SOME)
def test_verify_rows_do_not_depend_on_each_other(make_cache, N, D, G, T, dtype):
    """Bit for bit, for one number of rows: how long splits are goes by that."""
    lengths = [N, N // 2, N - 7, T, N // 3]
    with torch.device("cpu"):
        cache = make_cache(lengths, N=N, D=D, G=G, T=T, dtype=dtype, Hkv=1, device=DEVICE)
    together = sk.verify_attention(*cache.args())
    for b in range(len(lengths)):
        for rows in ([b] * 5, [(b + i) % 5 for i in range(5)]):
            others = sk.verify_attention(*(x[rows] for x in cache.args()))
            assert torch.equal(others[0][0], together[0][b])
            assert torch.equal(others[1][0], together[1][b])


@pytest.mark.parametrize("far", ["batch", "head", "token"])
def test_offsets_beyond_32_bits(make_cache, far):
    N = real(256, 32)
    with torch.device("cpu"):
        cache = make_cache([N, N - 7], N=N, D=64, G=2, T=2, dtype=FP16, device=DEVICE)
    shape = cache.key.shape
    strides = {
        "batch": (1 << 31, N * 64, 64, 1),
        "head": (N * 64, 1 << 31, 64, 1),
        "token": (128, 64, (1 << 32) // N, 1),
    }[far]
    room = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 3 * 2 * room:
        pytest.skip(f"needs {6 * room / 1e9:.0f} GB of GPU memory")
    near = every_op(cache)
    key, value = (torch.empty(room, dtype=FP16).as_strided(shape, strides) for _ in range(2))
    # A product of two 32-bit numbers would fold back to addresses that hold these.
    key.copy_(cache.key), value.copy_(cache.value)
    cache.key, cache.value = key, value
    for name, call in every_op(cache).items():
        for got, expected in zip(call(), near[name](), strict=True):
            # Strides of 64 bits compile to another kernel, whose bits nothing promises.
            torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3, msg=name)


def every_op(cache):
    """A call of each op on one cache, by name; each returns a tuple of tensors."""
    B, Hq, T, _ = cache.query.shape
    Hkv, N = cache.key.shape[1:3]
    indices = torch.arange(min(32, N // 2)).repeat(B, Hkv, 1).to(torch.int32)
    # As a function of the length at the time, so that a graph sees it change.
    tail = 3 * T
    scores = torch.sin(torch.arange(2 * B * Hkv * N) * 0.37).view(2, B, Hkv, N)
    score_lse = torch.full((B, Hq, T), 3.0)
    qkv, kv_len = (cache.query, cache.key, cache.value), cache.kv_len
    return {
        "score_keys": lambda: (sk.score_keys(cache.query, cache.key, kv_len),),
        "select_topk": lambda: (
            sk.select_topk(scores, N // 5, candidates=torch.arange(N) < kv_len[:, None]),
        ),
        "sparse_attention": lambda: sk.sparse_attention(*qkv, indices, kv_len - tail, kv_len),
        "verify_attention": lambda: sk.verify_attention(*qkv, kv_len),
        "verify_attention_with_scores": lambda: sk.verify_attention_with_scores(
            *qkv, kv_len, score_lse
        ),
    }


def small_cache(make, lengths, **sizes):
    with torch.device("cpu"):
        return make(lengths, **{"D": 64, "T": 3, "device": DEVICE, **sizes})


def test_every_op_reads_its_length_when_it_runs(make_cache):
    cache = small_cache(make_cache, real([290, 120], [90, 70]), dtype=BF16, N=real(300, 96))
    calls = every_op(cache)
    before = {name: call() for name, call in calls.items()}
    cache.kv_len -= 50
    fresh = every_op(cache)
    for name, call in calls.items():
        changed = call()
        assert any(not torch.equal(x, y) for x, y in zip(before[name], changed, strict=True)), name
        for x, y in zip(changed, fresh[name](), strict=True):
            assert torch.equal(x, y), name


@cuda_only
@pytest.mark.parametrize(
    "name", ["score_keys", "select_topk", "sparse_attention", "verify_attention",
             "verify_attention_with_scores"],
)  # fmt: skip
def test_a_graph_replays_with_changing_lengths(make_cache, name):
    cache = small_cache(make_cache, [9000, 9000], N=9000, T=5, G=7, D=128, dtype=BF16)
    call = every_op(cache)[name]
    lengths = torch.randint(300, 9000, (16, 2), dtype=torch.int32)
    expected = []
    for length in lengths:
        cache.kv_len.copy_(length)
        expected.append([x.clone() for x in call()])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    wrong = torch.zeros((), dtype=torch.int64)
    for i in range(1000):
        cache.kv_len.copy_(lengths[i % 16])
        for x in result:
            x.fill_(-7)
        graph.replay()
        for x, y in zip(result, expected[i % 16], strict=True):
            wrong += (x != y).sum()
    assert int(wrong) == 0


@cuda_only
def test_two_streams_at_once(make_cache):
    caches = [
        small_cache(make_cache, lengths, N=20000, T=5, G=7, D=128, dtype=BF16, seed=seed)
        for seed, lengths in enumerate(([20000, 7000], [4000, 19999]))
    ]
    expected = [{name: call() for name, call in every_op(cache).items()} for cache in caches]
    calls = [every_op(cache) for cache in caches]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    wrong = [torch.zeros((), dtype=torch.int64) for _ in streams]
    torch.cuda.synchronize()
    for _ in range(50):
        for name in expected[0]:
            for stream, call, wanted, count in zip(streams, calls, expected, wrong, strict=True):
                with torch.cuda.stream(stream):
                    for x, y in zip(call[name](), wanted[name], strict=True):
                        count += (x != y).sum()
    torch.cuda.synchronize()
    assert [int(count) for count in wrong] == [0, 0]


def run_every_op():
    """One small call of each op, for a memory checker: odd sizes, nothing beyond the tensors."""
    with torch.device(DEVICE):
        B, Hkv, G, T, N, D = 2, 2, 3, 2, 77, 40
        query = torch.randn(B, Hkv * G, T, D).to(FP16)
        key, value = torch.randn(2, B, Hkv, N, D).to(FP16).unbind()
        lengths = torch.tensor([N, 31], dtype=torch.int32)

        class Cache:
            pass

        cache = Cache()
        cache.query, cache.key, cache.value, cache.kv_len = query, key, value, lengths
        results = {name: call() for name, call in every_op(cache).items()}
        long = torch.randn(1, 1, real(40001, 201))
        results["select_topk, long rows"] = (sk.select_topk(long, 99),)
        values, scales = four_bits(80, 160, 32)
        weight = sk.pack_int4(values, 32), scales
        for rows in (1, 5, 33):
            given = torch.randn(rows, 160, dtype=FP16)
            results[f"int4_linear, {rows} rows"] = (sk.int4_linear(given, *weight),)
        for name, tensors in results.items():
            for x in tensors:
                assert not x.isnan().any(), name
                print(name, tuple(x.shape))


def test_every_op_at_odd_sizes():
    run_every_op()


@cuda_only
def test_memcheck():
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    # PyTorch asks CUDA for what may not be there and handles the answer: no error of memory.
    command = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "99"]
    command += [sys.executable, __file__]
    # The caching allocator would hide an overrun inside a larger block.
    environment = {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    process = subprocess.Popen(
        command, env=environment, text=True, errors="replace", start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=MEMCHECK)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what the tool has started on the GPU
        process.communicate()
        pytest.skip(f"compute-sanitizer was not through after {MEMCHECK} s")
    if "not supported" in output.lower():
        pytest.skip("compute-sanitizer does not support this device")
    assert process.returncode == 0, output[-4000:]
    assert "verify_attention_with_scores" in output and "long rows" in output


if __name__ == "__main__":
    run_every_op()

"""Which kernels a launch would compile: asked, without a GPU, of the code that decides it then.

Triton compiles another kernel where a pointer or a stride is no multiple of 16, and for a stride
of 1. Another kernel for another T may round differently, and one first met while a CUDA graph is
captured would be loaded in the middle of it.
"""

import os
from importlib import import_module

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter specialises nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from std_kernels import _tuning  # noqa: E402

OPS = {
    "verify_attention": ("_verify_split_kernel", "merge_kernel"),
    "sparse_attention": ("_sparse_split_kernel", "merge_kernel"),
    "score_keys": (
        "_score_keys_lse_kernel",
        "_score_keys_merge_kernel",
        "_score_keys_column_kernel",
    ),
}
SINKS = torch.zeros(7)[1:]
BACKEND = make_backend(GPUTarget("cuda", 90, 32))


class Spy:
    """Stands for a kernel: what a launch is given, and what it is specialised on."""

    def __init__(self, kernel, seen):
        self.name, self.seen = kernel.__name__, seen
        self.bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)

    def __getitem__(self, grid):
        def launch(*args, **options):
            given, key, _ = self.bind(*args, **options)
            self.seen.append((self.name, given, str(key)))

        return launch


@pytest.fixture
def launches(monkeypatch):
    """A function that calls an op's launcher and returns what `Spy` saw."""
    seen = []
    monkeypatch.setattr(_tuning, "arch_of", lambda device: "sm_90")
    for op, names in OPS.items():
        module = import_module(f"std_kernels._{op}_kernels")
        if hasattr(module, "arch_of"):
            monkeypatch.setattr(module, "arch_of", lambda device: "sm_90")
            module._plan.cache_clear()
        for name in names:
            monkeypatch.setattr(module, name, Spy(getattr(module, name), seen))

    def call(op, query, key, lengths, indices):
        seen.clear()
        launcher = getattr(import_module(f"std_kernels._{op}_kernels"), op)
        if op == "verify_attention":
            launcher(query, key, key, lengths, lengths, None, 0.1, None, SINKS)
        elif op == "sparse_attention":
            launcher(query, key, key, indices, lengths, lengths, 0.1, None, SINKS)
        else:
            launcher(query, key, lengths, lengths, lengths, 0.1, None, SINKS)
        assert [name for name, *_ in seen] == list(OPS[op])
        return list(seen)

    yield call
    for op in ("verify_attention", "sparse_attention"):
        import_module(f"std_kernels._{op}_kernels")._plan.cache_clear()


def inputs(D, T, rows=slice(None), tokens_first=False):
    """Views as a decoder has them: Hq 6, Hkv 3, three rows of a batch, lists of 5 keys."""
    query = torch.zeros(3, T, 6, D) if tokens_first else torch.zeros(3, 6, T, D)
    query = (query.transpose(1, 2) if tokens_first else query).bfloat16()
    key = torch.zeros(3, 3, 64, D, dtype=torch.bfloat16)
    lengths, indices = torch.zeros(3, dtype=torch.int32), torch.zeros(3, 3, 5, dtype=torch.int32)
    return query[rows], key[rows], lengths[rows], indices[rows]


@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize("D", [64, 72, 120])
@pytest.mark.parametrize("op", OPS)
def test_one_kernel_serves_every_number_of_tokens_and_every_row(launches, op, D, tokens_first):
    found = {
        tuple(key for *_, key in launches(op, *inputs(D, T, rows, tokens_first)))
        for T in range(1, 6)
        for rows in (slice(None), slice(1), slice(1, 2), slice(1, 3))
    }
    assert len(found) == 1


@pytest.mark.parametrize("op", OPS)
def test_rows_of_a_multiple_of_8_are_declared_so(launches, op):
    """What 16-byte loads need where D is no multiple of 16: see the launch of D = 120 in bench."""

    def units(D, view=lambda x: x):
        query, key, *rest = inputs(D, 2)
        seen = launches(op, query, view(key), *rest)
        return {given["UNIT"] for _, given, _ in seen if "UNIT" in given}

    assert units(128) == {1}
    assert units(120) == {8}
    assert units(120, lambda x: torch.nn.functional.pad(x, (0, 1))[..., :-1]) == {1}


@pytest.mark.parametrize("op", OPS)
def test_a_query_of_odd_strides_is_copied(launches, op):
    query, *rest = inputs(64, 2)
    odd = torch.nn.functional.pad(query, (0, 3))[..., :-3]
    for view, copied in ((query, False), (odd, True)):
        given = [x["query_ptr"] for _, x, _ in launches(op, view, *rest) if "query_ptr" in x]
        assert given and all((x.data_ptr() != view.data_ptr()) == copied for x in given)
        assert all(stride % 8 == 0 for x in given for stride in x.stride()[:3])


@pytest.mark.parametrize("op", OPS)
def test_a_batch_beyond_the_grid_is_named(launches, op):
    query, key, lengths, indices = (x[:1] for x in inputs(16, 1))
    rows = (x.expand(21846, *x.shape[1:]) for x in (query, key[:, :, :1], lengths, indices))
    match = f"^{op}: key has B \\* Hkv = 65538, expected at most 65535 on a GPU; pass .*"
    with pytest.raises(ValueError, match=match):
        launches(op, *rows)


@pytest.mark.parametrize("numbers", [(1,), (2, 3, 16), (17, 40)])
def test_one_4_bit_kernel_serves_every_weight_and_every_slice(monkeypatch, numbers):
    """Sizes that are ones or multiples of 16 are not another kernel, nor is a layer's share."""
    module, seen = import_module("std_kernels._int4_linear_kernels"), []
    monkeypatch.setattr(module, "arch_of", lambda device: "sm_90")
    for name in ("_int4_linear_row_kernel", "_int4_linear_rows_kernel"):
        monkeypatch.setattr(module, name, Spy(getattr(module, name), seen))
    module._plan.cache_clear()
    for N, K in ((16, 128), (80, 128), (208, 640)):
        packed = torch.zeros(N, K // 2, dtype=torch.uint8)
        scales = torch.zeros(K // 128, N, 2, dtype=torch.bfloat16)
        for R in numbers:
            for part in (slice(None), slice(64, None) if N > 64 else slice(None)):
                given = torch.zeros(R + 1, K, dtype=torch.bfloat16)[1:], packed[part]
                module.int4_linear_partials(*given, scales[:, part])
    module._plan.cache_clear()
    assert len(seen) == 6 * len(numbers) and len({key for *_, key in seen}) == 1

"""select_topk's kernels: rows of up to 128 scores take one launch here, longer ones five."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import std_kernels as sk
from std_kernels import _select_topk_kernels as kernels
from std_kernels import cpu, reference

INF, NAN = float("inf"), float("nan")
# Few distinct values, so that ties, and every value with a rule of its own, are common.
SPECIAL = torch.tensor(
    [0.0, -0.0, 1.0, -1.0, 1e-42, -1e-42, 3.4e38, -3.4028234663852886e38, INF, -INF, NAN, -NAN]
)
SHORT, LONG = 128, 200


def check(scores, k, **masks):
    indices = sk.select_topk(scores, k, **masks)
    assert indices.dtype == torch.int32
    assert torch.equal(indices, reference.select_topk(scores, k, **masks))
    return indices


@pytest.mark.parametrize("N, launches", [(SHORT, ["row"]), (LONG, ["count"] * 4 + ["write"])])
def test_the_kernels_run(monkeypatch, N, launches):
    monkeypatch.setattr(cpu, "select_topk", None)
    seen = []
    for name in ("row", "count", "write"):
        kernel = getattr(kernels, f"_select_topk_{name}_kernel")

        class Spy:
            def __getitem__(self, grid, name=name, kernel=kernel):
                seen.append(name)
                return kernel[grid]

        monkeypatch.setattr(kernels, f"_select_topk_{name}_kernel", Spy())
    check(torch.randn(1, 1, N), 9)
    assert seen == launches


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_scores_and_masks(data):
    B, Hkv = data.draw(st.integers(1, 2), label="B"), data.draw(st.integers(1, 2), label="Hkv")
    N = data.draw(st.sampled_from([1, 2, 12, 63, 64, 65, 127, 128, 129, 192, 193]), label="N")
    lead = data.draw(st.sampled_from([(), (1,), (2,), (0,), (1, 2)]), label="lead")
    kinds = data.draw(st.integers(1, len(SPECIAL)), label="kinds")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    values = SPECIAL[torch.randperm(len(SPECIAL), generator=generator)[:kinds]]
    scores = values[torch.randint(kinds, (*lead, B, Hkv, N), generator=generator)]
    masks = {}
    for name in ("candidates", "always"):
        share = data.draw(st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]), label=name)
        if share is not None:
            masks[name] = torch.rand(B, N, generator=generator) < share
    k = data.draw(st.one_of(st.integers(1, N), st.just(N)), label="k")
    check(scores, k, **masks)


@pytest.mark.parametrize("N", [SHORT - 1, LONG + 3])
@pytest.mark.parametrize("k", [1, 40, 101])
def test_ties_take_the_lowest_position(N, k):
    indices = check(torch.full((1, 1, N), 0.25), k)
    assert indices.flatten().tolist() == list(range(k))
    scores = torch.zeros(1, 1, N)
    scores[..., 1::2] = -0.0
    assert torch.equal(check(scores, k), indices)


@pytest.mark.parametrize("N", [SHORT, LONG])
def test_too_many_always_keep_the_highest_positions(N):
    always = torch.ones(1, N, dtype=torch.bool)
    always[0, 7::5] = False
    indices = check(torch.full((1, 1, N), NAN), 70, always=always)
    assert indices.flatten().tolist() == always[0].nonzero().flatten()[-70:].tolist()


@pytest.mark.parametrize("N", [SHORT, LONG])
def test_fewer_than_k_are_padded(N):
    scores = torch.full((1, 2, N), -INF)
    scores[:, :, ::3] = NAN
    scores[:, 1, [5, N - 1]] = torch.tensor([-1e-42, INF])
    always = torch.zeros(1, N, dtype=torch.bool)
    always[0, 100] = True
    indices = check(scores, N - 1, always=always)
    assert indices[0, 0, :2].tolist() == [100, -1]
    assert indices[0, 1, :4].tolist() == [5, 100, N - 1, -1]
    nobody = torch.zeros(1, N, dtype=torch.bool)
    assert (check(scores, 3, candidates=nobody) == -1).all()


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_digit_decides(shift):
    """Scores that differ in one byte of their bits only."""
    generator = torch.Generator().manual_seed(shift)
    bits = 0x3F123456 + (torch.randint(0, 0x40, (1, 2, LONG), generator=generator) << shift)
    scores = bits.to(torch.int32).view(torch.float32)
    # Negative ones too: what stands beyond the end reads as 0, and would be above them all.
    for signed in (scores, -scores):
        check(signed, 31)
        check(signed[..., : SHORT - 1], 31)


@pytest.mark.parametrize("N", [27, 150])
def test_leading_dimensions_and_strides(N):
    generator = torch.Generator().manual_seed(N)
    wide = torch.randn(2, 2, 2, 1, N + 13, generator=generator)[..., 3 : N + 3]
    masks = {
        "candidates": (torch.arange(N) % 3 > 0).expand(2, N),
        "always": (torch.rand(2, 3 * N, generator=generator) < 0.1)[:, N : 2 * N],
    }
    # B and Hkv swapped, leading dimensions that do not fold, a stride of 0.
    check(wide.transpose(0, 3), 7, **masks)
    check(wide.transpose(0, 1), 7, **masks)
    check(wide[0, :, 0, :1].expand(3, 2, 1, N), 7, **masks)


@pytest.mark.parametrize("N", [60, 150])
def test_rows_of_a_call_do_not_touch_each_other(N):
    scores = torch.randn(2, 2, N, generator=torch.Generator().manual_seed(N)).round(decimals=1)
    together = check(scores, 11)
    for b in range(2):
        assert torch.equal(sk.select_topk(scores[b : b + 1], 11), together[b : b + 1])


def test_offsets_beyond_32_bits():
    # Only the pages that hold the rows are ever touched.
    # A stride that fits 32 bits, and one that does not.
    for rows, stride in ((3, 1 << 30), (2, 1 << 31)):
        storage = torch.empty((1 << 31) + LONG)
        scores = storage.as_strided((rows, 1, 1, LONG), (stride, LONG, LONG, 1))
        scores.copy_(torch.randn(rows, 1, 1, LONG, generator=torch.Generator().manual_seed(0)))
        check(scores, 20)
        check(scores[..., :50], 20)

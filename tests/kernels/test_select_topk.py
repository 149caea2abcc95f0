import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import std_kernels as sk
from std_kernels import reference

INF, NAN = float("inf"), float("nan")
# Few distinct values, so that ties, and every value with a rule of its own, are common.
VALUES = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1e-42, 3.4e38, -3.4028234663852886e38, INF, -INF, NAN]
)


def check(scores, k, **masks):
    indices = sk.select_topk(scores, k, **masks)
    assert indices.dtype == torch.int32
    assert torch.equal(indices, reference.select_topk(scores, k, **masks))
    return indices


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_scores_and_masks(data):
    B, Hkv, N = (data.draw(st.integers(1, top)) for top in (3, 2, 12))
    lead = data.draw(st.lists(st.integers(0, 2), max_size=2), label="lead")
    scores = torch.empty(*lead, B, Hkv, N)
    drawn = data.draw(st.lists(VALUES, min_size=scores.numel(), max_size=scores.numel()))
    scores = torch.tensor(drawn, dtype=torch.float32).view(scores.shape)
    mask = st.none() | st.lists(st.booleans(), min_size=B * N, max_size=B * N)
    masks = {}
    for name in ("candidates", "always"):
        drawn = data.draw(mask, label=name)
        masks[name] = None if drawn is None else torch.tensor(drawn).view(B, N)
    check(scores, data.draw(st.integers(1, N), label="k"), **masks)


@pytest.mark.parametrize("N, k", [(1, 1), (1000, 1), (1000, 1000), (1009, 257), (16384, 256)])
def test_random_scores(N, k):
    scores = torch.rand(2, 3, N, generator=torch.Generator().manual_seed(N))
    check(scores, k)
    # 50 distinct values: hundreds of ties at the threshold, of which the first must win.
    check((scores * 50).floor(), k)
    masks = torch.rand(2, 2, N, generator=torch.Generator().manual_seed(k)) < 0.6
    check(scores, k, candidates=masks[0], always=masks[1])


def test_ties_take_the_lowest_position():
    assert check(torch.tensor([[[1.0, 2.0, 1.0, 2.0, 1.0]]]), 4).tolist() == [[[0, 1, 2, 3]]]
    assert check(torch.tensor([[[-0.0, 0.0, -0.0]]]), 2).tolist() == [[[0, 1]]]


def test_nan_and_minus_inf_are_never_selected_but_inf_is():
    scores = torch.tensor([[[NAN, -INF, 3.0, INF, NAN]]])
    assert check(scores, 4).tolist() == [[[2, 3, -1, -1]]]
    assert check(torch.full((1, 1, 3), NAN), 2).tolist() == [[[-1, -1]]]


def test_always_comes_first_whatever_its_score():
    scores = torch.tensor([[[5.0, NAN, 4.0, -INF, 9.0]]])
    always = torch.tensor([[False, True, False, True, False]])
    nobody = torch.zeros(1, 5, dtype=torch.bool)
    assert check(scores, 3, always=always).tolist() == [[[1, 3, 4]]]
    assert check(scores, 3, always=always, candidates=nobody).tolist() == [[[1, 3, -1]]]
    assert check(scores, 1, always=always).tolist() == [[[3]]]
    assert check(scores, 5, always=~nobody).tolist() == [[[0, 1, 2, 3, 4]]]


def test_more_always_than_k_beside_a_row_with_none():
    scores = torch.tensor([1.0, INF, 2.0, 3.0]).expand(2, 1, 4)
    always = torch.tensor([[True, False, True, True], [False] * 4])
    assert check(scores, 2, always=always).tolist() == [[[2, 3]], [[1, 3]]]


def test_leading_dimensions_and_strides():
    scores = torch.randn(3, 2, 2, 2, 40, generator=torch.Generator().manual_seed(0))
    layers = torch.stack([sk.select_topk(x, 7) for x in scores.flatten(0, 1)]).view(3, 2, 2, 2, 7)
    assert torch.equal(check(scores, 7), layers)
    wide = scores.transpose(0, 2)[..., 3:30]
    masks = {"candidates": (torch.arange(27) % 3 > 0).expand(3, 27)}
    assert torch.equal(check(wide, 7, **masks), sk.select_topk(wide.contiguous(), 7, **masks))


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(3)), left=st.integers(0, 9), right=st.integers(0, 9))
def test_rows_permute_and_padding_changes_nothing(order, left, right):
    scores = torch.randn(3, 2, 30, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    indices = sk.select_topk(scores, 8)
    padded = torch.nn.functional.pad(scores, (left, right), value=INF)
    valid = torch.nn.functional.pad(torch.ones(3, 30, dtype=torch.bool), (left, right))
    again = sk.select_topk(padded[list(order)], 8, candidates=valid)
    assert torch.equal(again, indices[list(order)] + left)


def test_the_largest_row():
    scores = torch.rand(1, 1, 1 << 20, generator=torch.Generator().manual_seed(0))
    check((scores * 1e5).floor(), 1 << 14)

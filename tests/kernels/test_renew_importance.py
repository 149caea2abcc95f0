"""renew_importance on the CPU, and in the interpreter by interpreter/test_triton_renew.py."""

import pytest
import torch

import std_kernels as sk
from std_kernels import reference

NAN, INF = float("nan"), float("inf")
# L, B, Hkv, S, N, stop: chunks are of 32 keys in the interpreter.
SHAPES = [
    (1, 1, 1, 1, 1, [1]),
    (2, 1, 2, 33, 40, [33]),
    (3, 2, 2, 96, 96, [96, 96]),
    (2, 3, 1, 130, 200, [130, 64, 5]),
    (1, 2, 2, 50, 64, [0, 49]),
    (2, 0, 2, 8, 8, []),
]


def case(L, B, Hkv, S, N, stop, seed=0):
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(L, B, Hkv, S, generator=generator) / max(S, 1)
    scores = torch.rand(L, B, Hkv, N, generator=generator) ** 4
    stop = torch.tensor(stop, dtype=torch.int32)
    beyond = torch.arange(N) >= stop[:, None, None]
    return importance, scores.masked_fill(beyond, NAN), stop  # what does not compete is not read


@pytest.mark.parametrize("sizes", SHAPES)
def test_it_is_the_reference_s(sizes, assert_accurate):
    importance, scores, stop = case(*sizes)
    given, kept = importance.clone(), scores.clone()
    expected = reference.renew_importance(given, scores, stop, 0.9)
    plain = reference.renew_importance(given, scores, stop, 0.9, dtype=torch.float32)
    assert sk.renew_importance(importance, scores, stop, 0.9) is importance
    assert torch.equal(scores.nan_to_num(), kept.nan_to_num()), "scores are only read"
    assert_accurate(importance, expected, plain, floor=2e-7)
    beyond = (torch.arange(sizes[3]) >= stop[:, None, None]).expand(importance.shape)
    assert torch.equal(importance[beyond], given[beyond])


@pytest.mark.parametrize("spoiled", [NAN, INF, -INF, -1.0, 0.0])
def test_scores_that_are_no_shares_leave_what_was(spoiled):
    """As fmax has it: NaN is left out, of the scores as of what was there."""
    importance, scores, stop = case(2, 2, 2, 70, 80, [70, 70])
    scores[1, 0] = spoiled
    scores[0, 1, 0, 3] = spoiled
    importance[0, 0, 0, 5] = NAN
    expected = reference.renew_importance(importance, scores, stop, 0.5, dtype=torch.float32)
    sk.renew_importance(importance, scores, stop, 0.5)
    torch.testing.assert_close(importance, expected, rtol=1e-5, atol=1e-9)
    assert not importance.isnan().any()


def test_no_fading_and_nothing_but_the_newest():
    for fade in (0.0, 1.0):
        importance, scores, stop = case(1, 1, 1, 40, 40, [40])
        share = scores / scores.sum(-1, keepdim=True)
        expected = torch.maximum(importance * fade, share)
        got = sk.renew_importance(importance, scores, stop, fade)
        torch.testing.assert_close(got, expected)

"""The same questions, asked of the kernels: that they answer shows first."""

from functools import partial

import pytest
import torch

import std_kernels as sk
from std_kernels import _causal_conv1d_kernels, _gated_delta_rule_kernels, cpu_recurrent
from tests.kernels.recurrence import make_tokens
from tests.kernels.test_recurrent import (  # noqa: F401
    check,
    test_64_tokens,
    test_a_draft_leaves_the_state_alone,
    test_a_full_ring,
    test_a_token_of_a_convolution_has_its_bits_for_every_number_of_tokens,
    test_convolution,
    test_no_bit_depends_on_how_the_tokens_came,
    test_nothing_new_is_accepted,
    test_rows_that_accepted_differently,
    test_views_of_one_projection,
)


def test_the_kernels_run(monkeypatch):
    seen = []

    def note(op, launcher, *args):
        seen.append(op)
        return launcher(*args)

    for module in (_gated_delta_rule_kernels, _causal_conv1d_kernels):
        op = module.__name__.split("._")[1].removesuffix("_kernels")
        launcher = getattr(module, op)
        monkeypatch.setattr(cpu_recurrent, op, None)
        monkeypatch.setattr(module, op, partial(note, op, launcher))
    tokens = make_tokens()
    sk.gated_delta_rule(*tokens.call(tokens.state, [2, 5], [8, 9], 3))
    sk.causal_conv1d(torch.zeros(2, 8, 16), torch.ones(16, 4), torch.ones(2).int(), 1)
    assert seen == ["gated_delta_rule", "causal_conv1d"]


@pytest.mark.parametrize("Hk, Hv, Dk, Dv", [(2, 4, 24, 40), (1, 2, 96, 24)])
def test_shapes(assert_accurate, Hk, Hv, Dk, Dv):
    check(make_tokens(Hk=Hk, Hv=Hv, Dk=Dk, Dv=Dv), [3, 4], [6, 6], 2, assert_accurate)

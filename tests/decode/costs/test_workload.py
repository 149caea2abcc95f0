import math
from dataclasses import replace

import pytest

from std_decode.costs.workload import Device, Workload, expected_tokens


def test_expected_tokens():
    for acceptance in (0.0, 1e-300, 0.3, 0.97, 1 - 1e-9, 1 - 2**-53, 1.0):
        for gamma in (0, 1, 7, 63):
            exact = sum(acceptance**drafts for drafts in range(gamma + 1))
            assert expected_tokens(acceptance, gamma) == pytest.approx(exact, rel=1e-12)


def test_a_pass_reads_the_experts_that_its_tokens_take():
    """Of 8 experts of 10 bytes a token takes 2; 100 bytes are read by all."""
    workload = Workload(
        weight_bytes=180, parameters=0, kv_bytes=0, batch=2, context=0, draft_keys=0,
        draft_weight_bytes=130, expert_bytes=80, expert_share=2 / 8,
    )  # fmt: skip
    device = Device(bandwidth=1.0, flops=math.inf)
    for tokens in (1, 3, 5):
        distinct = 8 * (1 - (1 - 2 / 8) ** (2 * tokens))
        assert workload.dense_seconds(device, tokens) == pytest.approx(100 + 10 * distinct)
    assert workload.draft_seconds(device) == pytest.approx(50 + 10 * 8 * (1 - (6 / 8) ** 2))
    one = replace(workload, batch=1)
    assert one.dense_seconds(device) == pytest.approx(100 + 2 * 10)
    whole = replace(workload, expert_share=1.0)
    assert whole.dense_seconds(device) == 180

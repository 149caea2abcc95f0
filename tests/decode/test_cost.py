import pytest

from std_decode.cost import expected_tokens


def test_expected_tokens():
    for acceptance in (0.0, 1e-300, 0.3, 0.97, 1 - 1e-9, 1 - 2**-53, 1.0):
        for gamma in (0, 1, 7, 63):
            exact = sum(acceptance**drafts for drafts in range(gamma + 1))
            assert expected_tokens(acceptance, gamma) == pytest.approx(exact, rel=1e-12)

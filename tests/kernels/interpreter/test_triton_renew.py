"""The same of renew_importance's kernels, in chunks of 32 keys."""

import pytest

from std_kernels import cpu
from tests.kernels.test_renew_importance import *  # noqa: F401, F403


@pytest.fixture(autouse=True)
def the_kernels_run(monkeypatch):
    monkeypatch.setattr(cpu, "renew_importance", None)

"""What tests on a GPU leave to those that run beside them."""

from types import SimpleNamespace

import pytest
import torch

from tests import conftest


@pytest.mark.parametrize("marker", [None, "gpu"])
def test_a_gpu_test_gives_its_memory_back(monkeypatch, marker):
    done = []
    monkeypatch.setattr(conftest.gc, "collect", lambda: done.append("collected"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    item = SimpleNamespace(get_closest_marker=lambda name: marker if name == marker else None)
    conftest.pytest_runtest_teardown(item)
    # Collected first: what a cycle holds cannot be given back.
    assert done == (["collected", "emptied"] if marker else [])

"""How an op's launcher is reached, without a GPU."""

import sys
from types import SimpleNamespace

import pytest
import torch

from std_kernels import _library


@pytest.mark.parametrize("index", [0, 1])
def test_a_launcher_runs_with_its_tensors_device_current(monkeypatch, index):
    """Triton launches on the current device, wherever the tensors are."""
    current, seen = [0], []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            self.before, current[0] = current[0], self.device

        def __exit__(self, *_):
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    made = SimpleNamespace(op=lambda tensor: seen.append(current[0]) or "launched")
    monkeypatch.setitem(sys.modules, "kernels_of_a_test", made)
    launch = _library._on_device("kernels_of_a_test", "op")
    for _ in range(2):
        assert launch(SimpleNamespace(get_device=lambda: index)) == "launched"
    assert seen == [index] * 2 and current == [0]

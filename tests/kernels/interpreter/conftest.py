"""Collected only where kernels run in Triton's interpreter; see ../test_interpreter.py."""

import os

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def kernels_are_interpreted():
    """A test that ran the CPU path instead would prove nothing about a kernel."""
    from triton.runtime.interpreter import InterpretedFunction

    from std_kernels._device import INTERPRET, merge_kernel

    assert INTERPRET.value and isinstance(merge_kernel, InterpretedFunction)


@pytest.fixture
def merge_two_at_once(monkeypatch):
    """Several blocks of splits in the merge, as at a hundred times the size."""
    from std_kernels import _sparse_attention_kernels, _verify_attention_kernels

    modules = (_sparse_attention_kernels, _verify_attention_kernels)
    for module in modules:
        module._plan.cache_clear()
        monkeypatch.setattr(module, "MERGED_AT_ONCE", 2)
    yield
    for module in modules:
        module._plan.cache_clear()

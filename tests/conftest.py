"""How the tests are run: side by side where pytest-xdist is there, one thread each."""

import gc
import os
from importlib.util import find_spec

import pytest

# Before torch is imported, and for the processes that tests start: two processes with two OpenMP
# threads each on two cores spend their time waiting for one another (16 ms for a call of 30 us).
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--captured",
        action="store_true",
        help="have the tests of tests/decode capture and replay passes, by a stand-in for CUDA "
        "graphs that runs on the CPU",
    )
    parser.addoption(
        "--tested",
        metavar="WHAT",
        help="when all have passed, write these versions into docs/models.md (tests/versions.py)",
    )


def pytest_sessionfinish(session, exitstatus):
    what = session.config.getoption("--tested")
    if what and exitstatus == 0 and "PYTEST_XDIST_WORKER" not in os.environ:
        from tests.versions import note

        note(what)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """As `-n auto`, unless told otherwise; as an option in setup.cfg it would need xdist.

    One GPU is for one process, and so is a debugger.
    """
    chosen = getattr(config.option, "numprocesses", 0) is not None
    if chosen or config.option.usepdb or config.option.markexpr == "gpu":
        return
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.option.numprocesses = min(8, os.cpu_count() or 1)
        config.option.dist = "worksteal"  # some tests take half a minute, most a tenth of a second


def pytest_collection_modifyitems(items):
    if find_spec("torchvision") is not None:
        return
    missing = pytest.mark.skip(reason='no torchvision; pip install -e ".[hub]"')
    for item in items:
        if item.get_closest_marker("torchvision") is not None:
            item.add_marker(missing)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """A GPU test keeps nothing from the processes beside it: a reference takes up to 11 GB."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    gc.collect()
    torch.cuda.empty_cache()

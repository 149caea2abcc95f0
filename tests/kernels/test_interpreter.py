"""Runs the tests of the Triton kernels in Triton's interpreter, on the CPU.

The variable that switches it on is read when Triton is imported, so each file of interpreter/
runs in a process of its own. By hand: TRITON_INTERPRET=1 pytest tests/kernels/interpreter
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
# The GPU suite too, at tiny sizes: otherwise its code would first run where time is short. CI runs
# it by itself, with the oldest and the newest Triton.
FILES = [
    *sorted((HERE / "interpreter").glob("test_*.py")),
    pytest.param(HERE / "test_gpu.py", marks=pytest.mark.slow),
]


def test_there_are_files_to_run():
    assert FILES


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="collected directly")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file):
    # One process a file: importing Triton in two more takes longer than what they would share.
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = run.stdout.decode(errors="replace")
    # 0 is given only where tests ran: without any the code is 5.
    assert run.returncode == 0, f"{' '.join(command)} failed:\n{output}"

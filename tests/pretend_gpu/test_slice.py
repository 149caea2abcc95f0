"""A slice of the GPU tests and benches on the pretend GPU: what a first contact must not find.

Each in a process of its own, which believes in a GPU for good.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretend_gpu.install import missing, surroundings

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
GPU_TESTS = [
    "test_a_second_question_on_the_same_graphs",
    "test_the_generator_ends_where_it_does_unpatched",
    "test_one_synchronisation_a_round",
]
SMALL_COPY = """
import sys
from bench.__main__ import main
from bench.kernels import ops
plain = ops.copy_case
ops.copy_case = lambda device, size: plain(device, 1 << 20)
"""


def python(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env=surroundings(), timeout=280,
    )  # fmt: skip


def bench(*arguments):
    """``python -m bench``, with a copy of 1 MB where 512 MB and more are: a GPU's 0.3 ms."""
    return python("-c", f"{SMALL_COPY}sys.exit(main(sys.argv[1:]))", *arguments)


def test_what_a_call_asks_of_a_gpu():
    done = python("-m", "pytest", "-n0", "-q", "-m", "gpu", "tests/pretend_gpu/test_counts.py")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


def test_gpu_tests():
    names = [f"tests/decode/test_gpu.py::{name}" for name in GPU_TESTS]
    done = python("-m", "pytest", "-n0", "-q", "-m", "gpu", *names)
    assert f"{len(names)} passed" in done.stdout, done.stdout[-4000:]


def records_of(done, folder, name):
    """What a command that ended well left in its only file of such a name."""
    assert done.returncode == 0, done.stderr[-4000:]
    (path,) = folder.glob(name)
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def test_bench_decode(tmp_path):
    """Each way that runs without Dynamo, with 4-bit drafts, all tokens those of transformers."""
    done = bench(
        "decode", "--shape", "tiny", "--dtype", "float32", "--context", "100", "--draft-weights",
        "own", "int4", "--new-tokens", "7", "--runs", "1", "--ways", "dense", "drafts",
        "--out", tmp_path,
    )  # fmt: skip
    records = records_of(done, tmp_path, "decode-pretend-*.jsonl")
    assert {r["status"] for r in records} == {"ok"}, records
    drafted = [r for r in records if r["kind"] == "decode" and r.get("draft_length")]
    assert drafted and all(r["same_as_transformers"] == "7 of 7" for r in drafted)


def test_bench_kernels(tmp_path):
    """In bfloat16: rivals are right by the reference, captured, and timed."""
    done = bench(
        "kernels", "--quick", "--context", "512", "--top-k-keys", "64", "--op",
        "score_keys", "select_topk", "--out", tmp_path,
    )  # fmt: skip
    records = records_of(done, tmp_path, "*.jsonl")
    assert {r["what"] for r in records if r["status"] == "ok"} > {"ours", "eager"}
    assert not [r for r in records if r["status"] != "ok" or "relaunched" in r], records


@pytest.mark.slow
def test_bench_kernels_of_4_bits(tmp_path):
    """Packed, launched and captured as on a GPU, beside PyTorch's own product."""
    done = bench(
        "kernels", "--quick", "--shape", "tiny", "--op", "int4_linear", "--batch", "1", "5",
        "--out", tmp_path,
    )  # fmt: skip
    records = records_of(done, tmp_path, "*.jsonl")
    named = {"copy", "ours", "partials", "int4pack_mm", "dense-weights"}
    assert {r["what"] for r in records if r["status"] == "ok"} == named, records
    assert not [r for r in records if r["status"] != "ok" or "relaunched" in r], records


SANITIZER = """#!/bin/sh
case "$*" in *"--report-api-errors no"*) ;; *) exit 99;; esac
echo "verify_attention_with_scores, select_topk, long rows"
"""


def test_memcheck_does_not_count_what_pytorch_asks_for_in_vain(tmp_path, monkeypatch):
    """compute-sanitizer itself needs a GPU: one that only looks at what it is asked."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    name = "tests/kernels/test_gpu.py::test_memcheck"
    done = python("-m", "pytest", "-n0", "-q", "-m", "gpu", name)
    assert "1 passed" in done.stdout, done.stdout[-4000:]

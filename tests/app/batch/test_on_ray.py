"""`std-decode batch --ray` on a Ray of this machine, with two workers."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from std_decode.app import main as cli
from tests.app.batch.test_cli import by_video
from tests.demo.tiny_qwen import ROOT

pytest.importorskip("ray.data")

# A worker dies of "once.mp4" the first time, of "deadly.mp4" each time. The script's own class, so
# that it goes to the workers by value.
COMMAND = """
    import os, signal, sys
    from dataclasses import replace
    from pathlib import Path
    from std_decode.app import main as cli
    from std_decode.app.batch import on_ray

    folder = Path(sys.argv[1])

    class Mortal(on_ray._OnRay):
        def __init__(self, job):
            if (folder / "unloadable").exists():
                job = replace(job, prompt="Sing!")
            super().__init__(job)

        def __call__(self, block):
            videos = "".join(block["videos"])
            first = folder / "first"
            if "deadly" in videos or "once" in videos and not first.exists():
                first.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(block)

    on_ray._OnRay = Mortal
    sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture
def command(tmp_path):
    """``command(*arguments)``: the run's process, which is ended after the test."""
    begun = []

    def begin(*arguments):
        code = [sys.executable, "-c", textwrap.dedent(COMMAND), str(tmp_path)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        begun.append(
            subprocess.Popen(
                [*code, "batch", *map(str, arguments), "--ray", "--workers", "2"],
                env={**os.environ, "PYTHONPATH": path, "RAY_ADDRESS": ""},
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
            )
        )
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def expected(clips, tmp_path_factory):
    """What a run without Ray writes about the clips."""
    out = tmp_path_factory.mktemp("expected") / "a.jsonl"
    assert cli.main(["batch", str(clips), "--out", str(out), "--batch-size", "1"]) == 1
    return by_video(out)


def test_a_worker_dies_and_the_job_finishes(clips, expected, tmp_path, command):
    once = tmp_path / "once.mp4"
    once.write_bytes((clips / "1.mp4").read_bytes())
    run = command(clips, once, "--out", "a.jsonl", "--batch-size", "2")
    _, told = run.communicate(timeout=200)
    assert run.returncode == 1, told
    found = by_video(tmp_path / "a.jsonl")
    again = found.pop(str(once))
    assert again["answer"] == expected[str(clips / "1.mp4")]["answer"]
    assert found == expected and (tmp_path / "first").exists()
    assert "7 of 8 videos have an answer" in told


@pytest.mark.slow
def test_a_video_that_takes_down_each_worker_gets_an_error(clips, expected, tmp_path, command):
    deadly = tmp_path / "deadly.mp4"
    deadly.write_bytes((clips / "1.mp4").read_bytes())
    run = command(clips, deadly, "--out", "a.jsonl", "--batch-size", "2")
    _, told = run.communicate(timeout=280)
    assert run.returncode == 1, told
    found = by_video(tmp_path / "a.jsonl")
    assert "worker that was to answer it died" in found.pop(str(deadly))["error"]
    assert found == expected


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_where_it_was(clips, expected, tmp_path, command):
    out = tmp_path / "a.jsonl"
    arguments = [clips, "--out", out, "--batch-size", "1"]
    run = command(*arguments)
    while not out.exists() or b"\n" not in out.read_bytes():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    before = out.read_bytes()
    done = [json.loads(line)["video"] for line in before.splitlines()]
    assert 1 <= len(done) < len(expected)
    run = command(*arguments)
    _, told = run.communicate(timeout=200)
    assert run.returncode == 1 and f"{len(done)} of 7 done before" in told
    assert by_video(out) == expected and out.read_bytes().startswith(before)


@pytest.mark.slow
def test_a_model_that_the_workers_cannot_load_is_one_line(clips, tmp_path, command):
    (tmp_path / "unloadable").touch()
    run = command(clips, "--out", "a.jsonl")
    assert "std-decode: the demo model only narrates" in run.communicate(timeout=100)[1]
    assert run.returncode == 2 and (tmp_path / "a.jsonl").read_bytes() == b""


def test_a_cluster_that_is_not_there_is_one_line(clips, tmp_path, monkeypatch, capsys):
    def init(address=None, **options):
        assert address == "head:6379"
        raise ConnectionError("long and winding")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    out = tmp_path / "a.jsonl"
    assert cli.main(["batch", str(clips), "--out", str(out), "--ray"]) == 2
    assert "--ray: RAY_ADDRESS is head:6379, but no cluster is there" in capsys.readouterr().err

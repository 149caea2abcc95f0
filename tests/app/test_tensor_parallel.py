"""`std-decode generate --tp`: two processes answer as one, and only the first one speaks."""

import os
import re
import socket
import subprocess
import sys

import pytest

from std_decode.app import main as cli

ASKED = ["--prompt", "Why so?", "--max-new-tokens", "40", "--draft-length", "3", "--top-k-keys"]
SAMPLED = ["--sample", "--temperature", "1.5", "--seed", "7"]


def torchrun(*arguments):
    """Run two processes of ``std-decode`` as a user would."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "std_decode", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def alone(capsys, *arguments):
    assert cli.main([*map(str, arguments)]) == 0
    told = capsys.readouterr().out
    assert len(told) > 30
    return told


@pytest.mark.parametrize("more", [[], SAMPLED], ids=["greedy", "sampled"])
def test_a_text_model_answers_as_in_one_process(llama, capsys, more):
    question = ["generate", "--model", llama, *ASKED, "8", *more]
    expected = alone(capsys, *question)
    done = torchrun(*question, "--tp", "--stats")
    assert done.returncode == 0 and done.stdout == expected, done.stderr
    assert done.stderr.count("acceptance rate") == 1


def test_each_process_keeps_4_bit_copies_of_its_own_share(llama, tmp_path):
    question = ["generate", "--tp", "--model", llama, *ASKED, "8", "--draft-weights", "int4"]
    question += ["--draft-weights-cache", tmp_path / "copies.bin"]
    told, files = [], []
    for _ in range(2):
        done = torchrun(*question)
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
        files.append({path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()})
    assert files[0].keys() == {"copies-1-of-2.bin", "copies-2-of-2.bin"}
    assert files[0] == files[1] and told[0] == told[1]  # read, not made anew


@pytest.mark.torchvision
@pytest.mark.parametrize(
    "family", ["qwen2_vl", pytest.param("llava_onevision", marks=pytest.mark.slow)]
)
def test_a_video_model_answers_as_in_one_process(filmed, checkpoints, capsys, family):
    question = ["generate", "--model", checkpoints / family, "--video", filmed, "--frames", "8"]
    question += [*ASKED, "8"]
    expected = alone(capsys, *question)
    done = torchrun(*question, "--tp")
    assert done.returncode == 0 and done.stdout == expected, done.stderr


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--tp"], "--tp is for a model of yours; give --model too"),
        (["--model", "m", "--prompt", "a", "--tp", "--device", "cuda"], "--device is for one pro"),
        (["--model", "m", "--prompt", "a", "--tp"], "start it as: torchrun --nproc-per-node"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_shared_is_one_line(monkeypatch, capsys, given, words):
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(["generate", *given]) == 2
    told = capsys.readouterr()
    assert words in told.err and told.err.count("\n") == 1 and not told.out


def test_a_model_that_cannot_be_loaded_is_said_once(tmp_path):
    done = torchrun("generate", "--tp", "--model", tmp_path, "--prompt", "a")
    assert done.returncode != 0 and not done.stdout
    ours = re.findall(r"^std-decode.*$", done.stderr, re.MULTILINE)
    assert len(ours) == 1 and str(tmp_path) in ours[0]
    assert "question.py" not in done.stderr  # no traceback, but torchrun's own


def test_waiting_for_a_process_that_never_comes_is_said():
    code = (
        "import sys; from std_decode import parallel; parallel.SILENCE = 0.1\n"
        "sys.exit(parallel.run(lambda place: 0, patience=1))"
    )
    alone = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **alone, "MASTER_PORT": str(free_port())},
        capture_output=True,
        text=True,
    )
    waiting, *rest = done.stderr.splitlines()
    assert waiting == "std-decode, process 0 of 2: waiting for the others, for at most 1 s"
    assert done.returncode == 1 and "does not answer" in "".join(rest)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]

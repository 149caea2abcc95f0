"""`std-decode batch`, as a user meets it: resumed, interrupted, refused."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from std_decode.app import main as cli
from tests.demo import tiny_qwen


def rows(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def by_video(path):
    """The rows by their videos, of which each has one."""
    found = {row["video"]: row for row in rows(path)}
    assert len(found) == len(rows(path))
    return found


@pytest.fixture(scope="module")
def expected(clips, tmp_path_factory):
    """What an uninterrupted run, one at a time, writes about the clips."""
    out = tmp_path_factory.mktemp("expected") / "a.jsonl"
    assert cli.main(["batch", str(clips), "--out", str(out), "--batch-size", "1"]) == 1
    return by_video(out)


def test_every_video_has_a_row(clips, expected, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    assert cli.main(["batch", str(clips), "--out", str(out), "--batch-size", "3"]) == 1
    assert by_video(out) == expected
    told = capsys.readouterr().err
    assert "6 of 7 videos have an answer" in told and "7/7" in told and "left:" in told
    assert expected.keys() == {str(clips / f"{name}.mp4") for name in (*range(6), "bad")}
    for name, row in expected.items():
        assert row["prompt"] is None and row["settings"]["model"] == "demo"
        found = row.keys() - {"video", "prompt", "settings"}
        right = {"answer", "prompt_tokens", "tokens"}
        assert found == ({"error"} if name.endswith("bad.mp4") else right)


def test_all_answered_is_status_0_and_nothing_is_asked_twice(clips, tmp_path, monkeypatch, capsys):
    out, one = tmp_path / "a.jsonl", str(clips / "1.mp4")
    asked = ["--out", str(out), "--prompt", "narrate from #00."]
    assert cli.main(["batch", one, *asked]) == 0
    before = out.read_bytes()
    monkeypatch.setattr("std_decode.app.batch.run.Worker", None)
    assert cli.main(["batch", one, one, *asked]) == 0
    assert "1 of 1 done before" in capsys.readouterr().err and out.read_bytes() == before
    assert rows(out)[0]["prompt"] == "narrate from #00."


def test_errors_are_asked_again_when_wanted(clips, tmp_path):
    out, late = tmp_path / "a.jsonl", tmp_path / "late.mp4"
    command = ["batch", str(clips / "1.mp4"), str(late), "--out", str(out)]
    assert cli.main(command) == 1
    assert "no such file" in by_video(out)[str(late)]["error"]
    late.write_bytes((clips / "3.mp4").read_bytes())
    assert cli.main(command) == 1 and "error" in by_video(out)[str(late)]
    assert cli.main([*command, "--retry-errors"]) == 0
    assert "answer" in by_video(out)[str(late)] and len(rows(out)) == 2


# Dies in the middle of a line, when there are so many.
KILLED = """
    import os, signal, sys
    from std_decode.app import main as cli
    from std_decode.app.batch.answers import Answers

    plain = Answers.append

    def append(self, rows):
        if len(self.done) >= 3:
            self.file.write(b'{"video": "/somewhere/ha')
            os.kill(os.getpid(), signal.SIGKILL)
        plain(self, rows)

    Answers.append = append
    cli.main(sys.argv[1:])
"""


def test_a_run_that_was_killed_goes_on_where_it_was(clips, expected, tmp_path):
    out = tmp_path / "a.jsonl"
    command = ["batch", str(clips), "--out", str(out), "--batch-size", "2"]
    root = str(tiny_qwen.ROOT)
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), *command],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL
    before = out.read_bytes()
    assert before.count(b"\n") == 4 and not before.endswith(b"\n")
    assert cli.main(command) == 1
    assert by_video(out) == expected
    assert out.read_bytes().startswith(before[: before.rindex(b"\n") + 1])


def test_an_interruption_keeps_what_is_there(clips, expected, tmp_path, monkeypatch):
    from std_decode.app.batch.worker import Worker

    out, plain, calls = tmp_path / "a.jsonl", Worker.answer, []

    def answer(self, read):
        calls.append(read)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, read)

    command = ["batch", str(clips), "--out", str(out), "--batch-size", "1"]
    with monkeypatch.context() as patches:
        patches.setattr(Worker, "answer", answer)
        assert cli.main(command) == 130
    assert len(rows(out)) == 2
    assert cli.main(command) == 1 and by_video(out) == expected


def test_the_first_errors_are_shown_as_they_come(tmp_path, capsys):
    gone = [str(tmp_path / f"{name}.mp4") for name in range(5)]
    assert cli.main(["batch", *gone, "--out", str(tmp_path / "a.jsonl")]) == 1
    told = capsys.readouterr().err
    assert told.count("no such file") == 3 and told.count("more errors are in the file") == 1


def test_when_interrupted_the_rest_of_a_batch_is_not_read(clips, monkeypatch):
    from std_decode.app.batch import run
    from std_decode.app.batch.worker import Job, Settings, Worker

    worker = Worker(Job(None, Settings("demo", None, 8, "float32"), False, {}))
    read, reading, go_on = [], threading.Event(), threading.Event()

    def inputs_of(video):
        read.append(video)
        reading.set()
        go_on.wait(10)
        return "never asked"

    def answer(rows):
        reading.wait(10)
        threading.Timer(0.2, go_on.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "inputs_of", inputs_of)
    monkeypatch.setattr(worker, "answer", answer)
    rows = run.answer_here(worker, [[], ["a", "b", "c"]])
    with pytest.raises(KeyboardInterrupt):
        next(rows)
    assert read == ["a"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["clips", "--out", "a.jsonl", "--prompt", " "], "--prompt: is empty"),
        (["clips"], "required: --out"),
        (["--out", "a.jsonl"], "required: VIDEOS"),
        (["clips", "--out", "."], "--out: . cannot be a file"),
        (["clips", "--out", "a.jsonl", "--batch-size", "0"], "is 0, expected 1 to 1024"),
        (["clips", "--out", "a.jsonl", "--frames", "4"], "--frames is for a model of yours"),
        (["clips", "--out", "a.jsonl", "--model", "m"], "--model needs a question"),
        (["clips", "--out", "a.jsonl", "--workers", "2"], "--workers is for --ray"),
        (["clips", "--out", "a.jsonl", "--prompt", "Why?"], "the demo model only narrates"),
        (["empty", "--out", "a.jsonl"], "no videos in empty; expected files that end in"),
        (["gone.txt", "--out", "a.jsonl"], "gone.txt: not a list of videos"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, words):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(["batch", *arguments])
    except SystemExit as error:
        status = error.code
    told = capsys.readouterr()
    assert status == 2 and words in told.err and told.err.count("\n") == 1 and not told.out
    assert not (tmp_path / "a.jsonl").exists()


def test_other_settings_are_refused(clips, tmp_path, capsys):
    command = ["batch", str(clips / "1.mp4"), "--out", str(tmp_path / "a.jsonl")]
    assert cli.main([*command, "--draft-length", "0"]) == 0
    assert cli.main([*command, "--draft-length", "4", "--batch-size", "1"]) == 0
    capsys.readouterr()
    assert cli.main([*command, "--max-new-tokens", "5"]) == 2
    assert "--max-new-tokens 328, now 5" in capsys.readouterr().err


def test_without_ray_it_says_what_to_install(clips, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    out = tmp_path / "a.jsonl"
    assert cli.main(["batch", str(clips), "--out", str(out), "--ray"]) == 2
    assert 'pip install "sparse-to-dense[ray]"' in capsys.readouterr().err and not out.exists()


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        cli.main(["batch", "--help"])
    told = capsys.readouterr().out
    for word in ("killed", "--retry-errors", "[ray]", "RAY_ADDRESS", "padded", "examples:"):
        assert word in told


COMMAND = "import sys\nfrom std_decode.app import main as cli\nsys.exit(cli.main(sys.argv[1:]))"


@pytest.mark.torchvision
def test_a_model_from_a_folder(clips, tmp_path):
    code = "import sys\nfrom pathlib import Path\ntiny_qwen.save(Path(sys.argv[1]))"
    assert tiny_qwen.run(code, tmp_path / "m", cwd=tmp_path).returncode == 0
    told = []
    for size in ("1", "4"):
        arguments = ["--model", "./m", "--prompt", "Why?", "--frames", "8", "--batch-size", size,
                     "--max-new-tokens", "6", "--out", f"{size}.jsonl"]  # fmt: skip
        done = tiny_qwen.run(COMMAND, "batch", clips, *arguments, cwd=tmp_path)
        assert done.returncode == 1, done.stderr
        told.append(by_video(tmp_path / f"{size}.jsonl"))
    assert told[0] == told[1]
    row = told[0][str(clips / "4.mp4")]
    assert row["tokens"] == 6 and row["prompt"] == "Why?" and row["settings"]["frames"] == 8

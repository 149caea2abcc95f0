"""The command line, as a user meets it: in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from std_decode import DecodeStats
from std_decode.app.demo import hardly_drafted

COMMAND = [sys.executable, "-m", "std_decode"]
QUICK = ["--seconds", "6", "--events", "2"]


def run(*arguments, cwd=None):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=cwd
    )


@pytest.mark.parametrize(
    "extra",
    [
        ["--draft-length", "4"],
        ["--sample", "--seed", "3", "--repeat", "2"],
        ["--draft-length", "0"],
    ],
)
def test_demo_narrates_and_finds_the_tokens_identical(tmp_path, extra):
    figures = tmp_path / "figures.json"
    done = run("demo", *QUICK, *extra, "--json", figures)
    assert done.returncode == 0, done.stderr
    assert "#" in done.stdout and "tokens identical" in done.stdout
    told = json.loads(figures.read_text())
    assert told["identical"] is True and told["video_tokens"] == 24
    ways = "unpatched", "patched", "dense_path"
    assert all(told[f"{way}_tokens_per_second"] > 0 for way in ways)
    assert 0 <= told["attributes_right"] <= 1
    assert told["fallback"] is None
    assert ("hardly drafted" in done.stdout) == ("--draft-length" not in extra)
    if "--draft-length" in extra:
        assert (told["rounds"] > 0) == ("0" not in extra)


def test_what_counts_as_hardly_drafted():
    """Tokens of look-ups do not make up for those of drafts."""
    by_drafts = DecodeStats(drafted=60, accepted=57, emitted=66)
    by_look_ups = DecodeStats(drafted=61, lookup_drafted=60, accepted=30, lookup_accepted=30)
    by_look_ups.emitted = 66
    assert not hardly_drafted(by_drafts) and hardly_drafted(by_look_ups)


def test_a_kept_clip_is_narrated_from_the_file(tmp_path):
    clip = tmp_path / "kept.mp4"
    assert run("demo", *QUICK, "--seed", 5, "--keep", clip).returncode == 0
    first = run("demo", "--video", clip, "--json", tmp_path / "a.json")
    assert first.returncode == 0, first.stderr
    assert json.loads((tmp_path / "a.json").read_text())["video_tokens"] == 24
    again = run("demo", *QUICK, "--keep", clip)
    assert again.returncode == 2 and "exists already" in again.stderr


def test_status_1_when_the_tokens_differ(monkeypatch, capsys):
    from std_decode.app import main as cli
    from std_decode.rounds.rows import Rows

    plain = Rows.keep
    monkeypatch.setattr(
        Rows, "keep", lambda self, tokens, *args: plain(self, (tokens + 1) % 60, *args)
    )
    assert cli.main(["demo", *QUICK]) == 1
    assert "NO" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--speed", "9"], "unrecognized arguments: --speed 9"),
        (["demo", "--top-k-keys", "0"], "--top-k-keys: is 0, expected at least 1"),
        (["demo", "--draft-length", "-1"], "--draft-length: is -1, expected 0 to 63"),
        (["demo", "--seconds", "many"], "'many' is no whole number"),
        (["demo", "--seconds", "5"], "--events is 12, expected at most one a second, 5"),
        (["demo", "--video", "nothing.mp4"], "nothing.mp4: no such file"),
        (["demo", "--video", "."], "not a file"),
        (["demo", "--json", "."], "--json: . cannot be a file"),
        (["demo", "--json", "no/such/folder/a.json"], "cannot be a file"),
        (["demo", "--video", "a.mp4", "--keep", "b.mp4"], "drop one of them"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_status_2(tmp_path, arguments, words):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr and done.stderr.count("\n") == 1 and not done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no video"])
def test_a_bad_video_leaves_every_file_as_it_was(tmp_path, content):
    clip, figures = tmp_path / "clip.mp4", tmp_path / "figures.json"
    clip.write_bytes(content)
    figures.write_text("earlier")
    done = run("demo", "--video", clip, "--json", figures)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert clip.read_bytes() == content and figures.read_text() == "earlier"


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert run("--version").stdout.strip() == version("sparse-to-dense")


def test_help_teaches():
    done = run("demo", "--help")
    assert done.returncode == 0
    for option in ("--video", "--seed", "--events", "--seconds", "--sample", "--top-k-keys",
                   "--draft-length", "--json"):  # fmt: skip
        assert option in done.stdout

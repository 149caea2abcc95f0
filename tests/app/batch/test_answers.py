"""The file of answers: nothing lost, nothing doubled, nobody else's file touched."""

import json
import os
from pathlib import Path

import pytest

from std_decode.app.batch.answers import Answers
from std_decode.errors import BadInput

SETTINGS = {"model": "m", "frames": 8}


def row(video, **found):
    return {"video": video, "prompt": "why?", **(found or {"answer": "déjà \n vu"})}


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def path(tmp_path):
    """Of a file with two answers and an error."""
    path = tmp_path / "answers.jsonl"
    with Answers(path, SETTINGS) as answers:
        answers.append([row("/a"), row("/b", error="bad")])
        answers.append([row("/c"), row("/a", answer="another")])
    return path


def test_a_line_is_a_row_and_no_row_is_doubled(path):
    assert lines(path) == [
        {**r, "settings": SETTINGS} for r in (row("/a"), row("/b", error="bad"), row("/c"))
    ]
    with Answers(path, SETTINGS) as answers:
        assert answers.done == {("/a", "why?"), ("/b", "why?"), ("/c", "why?")}
        assert answers.wrong == {("/b", "why?")}


@pytest.mark.parametrize("cut", range(0, 100, 7))
def test_a_line_that_was_cut_off_is_taken_away(path, cut):
    whole = path.read_bytes()
    first_two = whole[: whole.rindex(b"\n", 0, -1) + 1]
    last = whole[len(first_two) :]
    assert len(last) == 101
    path.write_bytes(first_two + last[:cut])
    with Answers(path, SETTINGS) as answers:
        assert answers.done == {("/a", "why?"), ("/b", "why?")}
        answers.append([row("/c")])
    assert path.read_bytes() == whole


def test_an_empty_line_is_passed_over(path):
    whole = path.read_bytes()
    path.write_bytes(b"\n" + whole + b" \r\n")
    with Answers(path, SETTINGS) as answers:
        assert len(answers.done) == 3
        answers.append([row("/d")])
    with Answers(path, SETTINGS) as answers:
        assert len(answers.done) == 4
    assert path.read_bytes().startswith(b"\n" + whole + b" \r\n{")


def test_another_prompt_adds_lines(path):
    with Answers(path, SETTINGS) as answers:
        answers.append([{**row("/a"), "prompt": None}])
    assert len(lines(path)) == 4


def test_errors_are_dropped_to_be_tried_again(path):
    with Answers(path, SETTINGS, retry=True) as answers:
        assert answers.done == {("/a", "why?"), ("/c", "why?")} and not answers.wrong
        answers.append([row("/b")])
    assert [r["video"] for r in lines(path)] == ["/a", "/c", "/b"]
    assert [p.name for p in path.parent.iterdir()] == ["answers.jsonl"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "m", "frames": 9}, "by other settings: --frames 8, now 9; give these again"),
        ({"model": "n", "frames": 9}, "--model m, now n, --frames 8, now 9;"),
        ({"model": "m", "frames": 8, "max_new_tokens": 7}, "--max-new-tokens None, now 7"),
    ],
)
def test_other_settings_are_refused_by_name(path, settings, words):
    before = path.read_bytes()
    with pytest.raises(BadInput, match=words):
        Answers(path, settings)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "number"),
    [
        (b"a letter to my aunt", 1),
        (b"a letter\n", 1),
        (b'{"video": "/a", "prompt": "why?"}\n', 1),
        (b'["video", "prompt", "settings"]\n', 1),
        (json.dumps({**row("/a"), "settings": SETTINGS}).encode() + b"\n\xff\xfe\n", 2),
    ],
)
@pytest.mark.parametrize("retry", [False, True])
def test_a_file_of_something_else_is_left_alone(tmp_path, content, number, retry):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=f"line {number}, is no line of std-decode batch"):
        Answers(path, SETTINGS, retry)
    assert path.read_bytes() == content


@pytest.mark.parametrize("retry", [False, True])
def test_two_runs_do_not_write_into_one_file(path, retry):
    with Answers(path, SETTINGS, retry), pytest.raises(BadInput, match="by another run"):
        Answers(path, SETTINGS)
    Answers(path, SETTINGS).__exit__()


def test_a_path_that_is_no_text_is_found_again(tmp_path):
    strange = b"/clips/\xff\xe9.mp4".decode(errors="surrogateescape")
    with Answers(tmp_path / "a.jsonl", SETTINGS) as answers:
        answers.append([row(strange)])
    with Answers(tmp_path / "a.jsonl", SETTINGS) as answers:
        assert answers.done == {(strange, "why?")}


def test_no_place_for_a_file(tmp_path):
    for path in (tmp_path, tmp_path / "no" / "a.jsonl"):
        with pytest.raises(BadInput, match="--out: .* cannot be a file"):
            Answers(path, SETTINGS)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match="a device or a pipe, expected a file"):
        Answers(tmp_path / "pipe", SETTINGS)


@pytest.mark.parametrize("saved", [False, True], ids=["removed", "saved"])
def test_answers_are_not_written_where_nobody_finds_them(path, saved):
    with Answers(path, SETTINGS) as answers:
        content = path.read_bytes()
        path.unlink()
        if saved:  # by an editor, under the same name
            path.write_bytes(content)
        with pytest.raises(BadInput, match="removed or replaced while"):
            answers.append([row("/d")])
        assert ("/d", "why?") not in answers.done
    assert path.exists() == saved


def test_a_full_disk_is_an_error():
    answers = Answers.__new__(Answers)
    with (
        open("/dev/full", "ab", buffering=0) as answers.file,
        pytest.raises(OSError, match="space"),
    ):
        answers.path = Path("/dev/full")
        answers.done, answers.wrong, answers.settings = set(), set(), SETTINGS
        answers.append([row("/a")])

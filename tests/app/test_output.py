"""Files and streams that cannot be written: one line, nothing broken that was there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from std_decode.app import main as cli
from std_decode.app import output

QUICK = ["--seconds", "6", "--events", "2"]
COMMAND = [sys.executable, "-m", "std_decode"]


def test_a_device_is_written_to_and_never_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    output.check_file("--json", pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    output.replace_file(pipe, b"told")
    assert os.read(reading, 9) == b"told" and pipe.is_fifo()
    os.close(reading)


def test_of_a_link_what_it_points_to_is_replaced(tmp_path):
    link, real = tmp_path / "link.json", tmp_path / "real.json"
    real.write_text("old")
    link.symlink_to(real)
    output.replace_file(link, b"new")
    assert link.is_symlink() and real.read_text() == "new" and len(list(tmp_path.iterdir())) == 2


def test_a_place_that_takes_no_files_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setattr("std_decode.app.demo._film", None)
    for option in ("--json", "--keep"):
        assert cli.main(["demo", option, str(tmp_path / "a")]) == 2
        told = capsys.readouterr().err
        assert f"{option}: {tmp_path / 'a'} cannot be written" in told and told.count("\n") == 1


def test_a_disk_that_is_full_in_the_end_is_one_line(tmp_path, monkeypatch, capsys):
    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert cli.main(["demo", *QUICK, "--json", str(tmp_path / "a.json")]) == 2
    told = capsys.readouterr()
    assert "a.json cannot be written: No space left on device" in told.err
    assert told.err.count("\n") == 1 and "tokens identical" in told.out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_stdout_that_is_full_is_one_line(filmed):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "generate", "--video", filmed], stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 2
    assert done.stderr == b"std-decode: the output cannot be written: No space left on device\n"


def test_stdout_that_is_closed_is_no_error(filmed, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["generate", "--video", str(filmed)]) == 0


def test_a_table_that_nobody_reads_is_no_difference_of_tokens(monkeypatch):
    def gone(options):
        raise SystemExit(1)  # as rich does

    monkeypatch.setattr(cli, "_command", lambda name: gone)
    assert cli.main(["demo"]) == 141

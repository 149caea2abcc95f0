"""Video files from strangers: a clip or one line of error, in bounded memory and time."""

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import pytest

from std_decode.app import main as cli
from std_decode.app.output import replace_file
from std_decode.demo import video
from std_decode.errors import InputError
from std_decode.frames import read_video
from std_decode.video import media
from tests.reliability.fuzz import damaged, fuzz, make_files
from tests.video.test_frames import film


def both(path):
    """What both readers make of a file: number of frames, or the error."""
    results = []
    for reader in (lambda: read_video(path, 8).frames, lambda: video.read(path)[0]):
        try:
            results.append(len(reader()))
        except InputError as error:
            assert "\n" not in str(error) and path.name in str(error)
            results.append(str(error))
    return results


# --- fuzzing ---


def test_mutated_files():
    """A small part of `python -m tests.reliability fuzz`."""
    found = fuzz(0, 25)
    assert not found["failures"], found["failures"]
    assert sum(found["outcomes"].values()) == 50 and min(found["outcomes"].values()) > 5
    assert found["peak_mib"] < 1024


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_500_mutated_files():
    found = fuzz(0, 500)
    assert not found["failures"], found["failures"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("import os; os.abort()", "crashes"),
        ("import time; time.sleep(60)", "takes too long"),
        ("bytearray(2**33)", "bug: MemoryError"),
        ("raise ValueError('other')", "bug: ValueError"),
        ("raise media.InputError(f'{path}: two\\nlines')", "bug: not one line"),
    ],
)
def test_the_fuzzer_sees(monkeypatch, tmp_path, fault, words):
    """A reader that fails in this way, put in its place in the process that reads."""
    (tmp_path / "sitecustomize.py").write_text(
        "from std_decode import frames\nfrom std_decode.video import media\n"
        f"def read_video(path, frames):\n    {fault}\n"
        "frames.read_video = read_video\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), root]))
    monkeypatch.setattr("tests.reliability.fuzz.SECONDS", 2)
    failures = fuzz(3, 1)["failures"]
    assert len(failures) == 1 and words in failures[0]


def test_damages_differ(tmp_path):
    import random

    make_files(tmp_path)
    data = (tmp_path / "a.mp4").read_bytes()
    assert len({damaged(data, random.Random(seed)) for seed in range(100)} - {data}) > 95


# --- by hand ---


def mpegts(path):
    film(path.with_suffix(".ts"))
    path.with_suffix(".ts").rename(path)


def y4m(width, height):
    return lambda path: path.write_bytes(
        f"YUV4MPEG2 W{width} H{height} F25:1 Ip A1:1 C420jpeg\nFRAME\n".encode() + bytes(4096)
    )


def gif(path):
    path.write_bytes(b"GIF89a" + b"\xff\xff\xff\xff" + b"\x80\0\0" + bytes(6) + b"\x2c" + bytes(4)
                     + b"\xff\xff\xff\xff\0\x02\x02\x4c\x01\0\x3b")  # fmt: skip


def playlist(path):
    film(path.parent / "secret.ts")
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:6,\nsecret.ts\n#EXT-X-ENDLIST\n")


def listing(path):
    film(path.parent / "secret.mp4")
    path.write_text("ffconcat version 1.0\nfile secret.mp4\n")


def sdp(path):
    path.write_text("v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
                    "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n")  # fmt: skip


def sparse(path):
    path.write_bytes(b"\0\0\0\x18ftypisom\0\0\x02\0isomiso2")
    os.truncate(path, 2**36)


def long_ago(path):
    """Two frames, four hundred thousand years apart."""
    film(path, times=[0, 2**47])


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("empty.mp4", lambda path: path.write_bytes(b""), "is empty"),
        ("zeros.mp4", lambda path: path.write_bytes(bytes(5000)), "not a readable video"),
        ("text.mp4", lambda path: path.write_text("hello\n" * 999), "not a readable video"),
        ("pipe.mp4", lambda path: os.mkfifo(path), "not a file"),
        ("sound.mp4", lambda path: path.write_bytes(b"RIFF\x24\0\0\0WAVEfmt "), "not a readable"),
        ("wide.y4m", y4m(100_000, 100_000), "not a readable video|frames of"),
        ("tall.y4m", y4m(2, 2**25), "not a readable video|frames of|cannot be decoded"),
        ("large.y4m", y4m(16_384, 16_384), "not a readable video|frames of 16384 x 16384"),
        ("large.gif", gif, "not a readable video|frames of 65535 x 65535"),
        ("list.m3u8", playlist, "not a readable video"),
        ("list.mp4", playlist, "not a readable video"),
        ("concat.mp4", listing, "not a readable video"),
        ("call.sdp", sdp, "not a readable video"),
        ("sparse.mp4", sparse, "not a readable video|no video stream"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_files_at_the_edge(tmp_path, name, make, words):
    make(tmp_path / name)
    for result in both(tmp_path / name):
        assert isinstance(result, str), "a clip"
    with pytest.raises(InputError, match=words):
        read_video(tmp_path / name, 8)


@pytest.mark.parametrize("name", ["ts.mp4", "film.txt", "no-extension", "50%d.mp4", "http:x.mp4"])
def test_a_file_is_what_it_contains(tmp_path, name):
    mpegts(tmp_path / "film.ts.part")
    (tmp_path / "film.ts.part").rename(tmp_path / name)
    assert both(tmp_path / name) == [8, 12]


def test_absurd_times(tmp_path):
    long_ago(tmp_path / "a.mkv")
    clip = read_video(tmp_path / "a.mkv", 8)
    assert len(clip.frames) == len(clip.indices) and clip.fps > 0
    with pytest.raises(InputError, match="longer than 4096 s"):
        video.read(tmp_path / "a.mkv")


def test_frames_that_change_their_size(tmp_path):
    """All are given that of the first."""
    for size in ((64, 48), (128, 96)):
        film(tmp_path / f"{size[0]}.h264", size=size)
    parts = [(tmp_path / f"{width}.h264").read_bytes() for width in (64, 128)]
    (tmp_path / "both.h264").write_bytes(b"".join(parts))
    with (
        av.open(str(tmp_path / "both.h264")) as source,
        av.open(str(tmp_path / "a.mkv"), "w") as to,
    ):
        stream = to.add_stream_from_template(source.streams.video[0])
        for i, packet in enumerate(p for p in source.demux(video=0) if p.size):
            packet.stream, packet.pts, packet.dts = stream, i, i
            packet.time_base = Fraction(1, 10)
            to.mux(packet)
    assert read_video(tmp_path / "a.mkv", 12).frames.shape == (12, 48, 64, 3)


def test_a_name_in_an_unknown_encoding(tmp_path):
    path = film(tmp_path / "a.mp4")
    with av.open(str(path)) as source, av.open(str(tmp_path / "b.mkv"), "w") as to:
        to.metadata["title"] = "AAAAAAAA"
        stream = to.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                to.mux(packet)
    data = (tmp_path / "b.mkv").read_bytes()
    assert b"AAAAAAAA" in data
    (tmp_path / "b.mkv").write_bytes(
        data.replace(b"AAAAAAAA", b"\xff\xfe\xff\xfe\xff\xfe\xff\xfe")
    )
    assert both(tmp_path / "b.mkv") == [8, 12]


@pytest.mark.parametrize(
    "told",
    [
        "[" * 100_000,
        json.dumps({"seconds": 9, "events": [dict(second="x", tag="y", colour=[], pattern=None)]}),
        json.dumps({"seconds": 9, "events": [dict(second=1, tag=99, colour=0, pattern=0)]}),
        json.dumps({"seconds": 9, "events": [dict(second=1, tag=True, colour=0, pattern=0)]}),
        json.dumps({"seconds": 1e999, "events": []}),
        json.dumps({"seconds": 9, "events": 7}),
        json.dumps([1, 2]),
    ],
)
def test_what_a_file_says_of_itself_is_not_believed(told):
    assert video._clip(told) is None


def test_limits(tmp_path, monkeypatch):
    path = film(tmp_path / "a.mp4")
    for owner, name, value, words in (
        (media, "MOST_FRAME_PIXELS", 64 * 48 - 1, "frames of 64 x 48, expected at most"),
        (media, "MOST_SECONDS", 0.0, "takes more than 0 s to read"),  # in ffmpeg
        (media.time, "monotonic", iter(range(0, 10**6, 400)).__next__, "takes more than 600 s"),
    ):
        with monkeypatch.context() as patches:
            patches.setattr(owner, name, value)
            results = both(path)
        assert all(words in result for result in results)
    monkeypatch.setattr("std_decode.video.packets.MOST_PACKETS", 59)
    assert all("more than 59 frames" in result for result in both(path))


@pytest.mark.parametrize("command", ["demo", "sparsity"])
def test_the_command_line_says_it_in_one_line(tmp_path, capsys, command):
    path = tmp_path / "list.m3u8"
    playlist(path)
    more = ["--picture", str(tmp_path / "a.png")] if command == "sparsity" else []
    assert cli.main([command, "--video", str(path), *more]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("std-decode: ") and err.count("\n") == 1 and "list.m3u8" in err


# --- what is written ---


def test_nothing_is_written_in_place():
    """But for records that are appended to as they come, and files in a folder of their own."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    found = subprocess.run(
        ["grep", "-rnE", r"write_text|write_bytes|torch\.save\(|save_file\(|open\([^)]*\"[wx]b?\"",
         "--include=*.py", "std_decode", "bench"],
        capture_output=True, text=True, cwd=root,
    ).stdout.splitlines()  # fmt: skip
    known = (
        "std_decode/app/output.py",
        "std_decode/weights/twin_cache.py",
        "std_decode/demo/train.py",
    )
    # Clips go to a temporary folder.
    streams = ("std_decode/demo/video.py",)
    others = [line for line in found if not line.startswith((*known, *streams))]
    assert found and not others, others


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("old")

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError):
        replace_file(tmp_path / "a.json", b"newer")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "old")]


def test_no_pickle_is_read():
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    found = subprocess.run(
        ["grep", "-rnE", r"torch\.load\(|pickle\.load|np\.load\(|trust_remote_code=True",
         "--include=*.py", "std_decode", "bench", "std_kernels"],
        capture_output=True, text=True, cwd=root,
    ).stdout.splitlines()  # fmt: skip
    assert found and all("weights_only=True" in line for line in found), found


if sys.platform == "win32":
    pytest.skip("limits of processes, pipes and grep are of Unix", allow_module_level=True)

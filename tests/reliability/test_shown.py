"""Which pictures a video file shows, and when: those that are decoded of it, all of it decoded."""

import random
from fractions import Fraction

import av
import pytest

from std_decode import frames
from std_decode.demo import video
from std_decode.errors import InputError
from std_decode.frames import read_video
from std_decode.video.media import Deadline
from std_decode.video.seeking import read_index
from tests.reliability.films import check, copy, edit, truth, write


@pytest.fixture
def cheap(monkeypatch):
    """Nothing is decoded whole."""
    monkeypatch.setattr(frames, "_all_stamps", None)


@pytest.fixture
def sought(monkeypatch, cheap):
    """Nor is anything that is not wanted read twice."""
    decode_runs = frames.decode_runs

    def seeking(*args):
        assert args[-2:] == (True, 0)
        return decode_runs(*args)

    monkeypatch.setattr(frames, "decode_runs", seeking)


# --- edit lists ---


@pytest.mark.parametrize(("gop", "between"), [(4, 2), (30, 0), (30, 2)])
@pytest.mark.parametrize(
    "segments",
    [
        [(0.7, 3)],  # from within a GOP
        [(0, 1.3)],
        [(0.9, 2.2)],
        [(0.85, 1.95)],  # frames in part
        [(None, 0.6), (0.4, 2)],
        [(0.2, 1.2), (1.9, 2.9)],  # a hole
        [(0.3, 1.5), (0.3, 1.5)],
        [(0, 2.1), (0.8, 3)],
    ],
    ids=str,
)
def test_an_edit_list(tmp_path, segments, gop, between):
    path = write(tmp_path / "a.mp4", gop=gop, between=between)
    check(edit(path, *segments))


def test_a_trimmed_film_is_sought_in(tmp_path, sought):
    check(edit(write(tmp_path / "a.mov", times=range(60)), (1.7, 4.4)), 3)


@pytest.mark.parametrize("start", [4, 13, 26])
def test_a_cut_without_encoding(tmp_path, start, sought):
    """What comes before the cut has times before 0, which an edit list hides."""
    write(tmp_path / "a.mp4", times=range(40), gop=10)
    key = start // 10 * 10
    cut = copy(tmp_path / "a.mp4", tmp_path / "b.mp4", slice(key, None), -start)
    assert check(cut).total == 40 - start


def test_a_trimmed_film_that_is_cut_off(tmp_path):
    path = write(tmp_path / "a.mp4", muxing={"movflags": "faststart"})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    for reader in (lambda: read_video(path, 4), lambda: video.read(path)):
        with pytest.raises(InputError, match=r"truncated: \d+ of 30 frames"):
            reader()


# --- headers that count more than there are ---


def test_empty_packets_in_an_avi(tmp_path, cheap):
    times = [*range(11), *range(15, 20), *range(21, 31)]
    write(tmp_path / "a.avi", "mpeg4", times, between=0)
    with av.open(str(tmp_path / "a.avi")) as container:
        assert container.streams.video[0].frames == 31 > len(times)
    check(tmp_path / "a.avi")


def counting(path, more):
    """The AVI's header counts so many frames more, as where the last ones were dropped."""
    data = bytearray(path.read_bytes())
    for at in (data.index(b"avih") + 24, data.index(b"strh") + 40):
        count = int.from_bytes(data[at : at + 4], "little")
        data[at : at + 4] = (count + more).to_bytes(4, "little")
    path.write_bytes(data)
    return path


def test_empty_packets_at_an_avi_s_end(tmp_path, cheap):
    check(counting(write(tmp_path / "a.avi", "mpeg4", between=0), 4))


@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_an_avi_that_is_cut_off(tmp_path, part):
    path = write(tmp_path / "a.avi", "mpeg4", range(60), between=0)
    data = path.read_bytes()
    path.write_bytes(data[: int(data.index(b"idx1") * part)])
    for reader in (lambda: read_video(path, 4), lambda: video.read(path)):
        with pytest.raises(InputError, match="truncated"):
            reader()


def test_empty_samples_in_an_mp4(tmp_path, cheap):
    path = write(tmp_path / "a.mp4", gop=1, between=0)
    data = bytearray(path.read_bytes())
    table = data.index(b"stsz") + 16
    data[table + 4 * 28 : table + 4 * 30] = bytes(8)
    path.write_bytes(data)
    assert check(path).total == 28


def test_an_mp4_whose_index_leads_behind_its_end(tmp_path):
    path = write(tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    table = data.index(b"stsz") + 16
    data[table + 4 * 17 : table + 4 * 18] = bytes.fromhex("00ffffff")
    path.write_bytes(data)
    with av.open(str(path)) as container:
        told = getattr(container.streams.video[0], "index_entries", None)
    if told is None:
        pytest.skip("PyAV before 17 does not tell an index")
    for reader in (lambda: read_video(path, 4), lambda: video.read(path)):
        with pytest.raises(InputError, match=r"truncated: \d+ of 30 frames"):
            reader()


# --- packets that are not one frame each ---


def test_two_frames_in_a_packet(tmp_path):
    """As DivX wrote B frames: with the frame before them, and an empty packet in their place."""
    write(tmp_path / "a.avi", "mpeg4", range(31), between=1, sc_threshold="1000000000")
    with (
        av.open(str(tmp_path / "a.avi")) as source,
        av.open(str(tmp_path / "b.avi"), "w") as to,
    ):
        stream = to.add_stream_from_template(source.streams.video[0])
        first, *rest = [bytes(p) for p in source.demux(video=0) if p.size]
        vop = first.index(b"\0\0\1\xb6")
        packets = [first[:vop] + b"\0\0\1\xb2DivX503b1393p" + first[vop:]]
        for later, earlier in zip(rest[::2], rest[1::2]):
            packets += [later + earlier, b"\0\0\1\xb6\x50\0\0"]
        for i, data in enumerate(packets):
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 10), i, i
            packet.is_keyframe = i == 0
            to.mux(packet)
    pictures = [pixels for _, pixels in truth(tmp_path / "b.avi")]
    clip = read_video(tmp_path / "b.avi", 40)
    assert clip.total == len(pictures) == 31
    assert all((a == b).all() for a, b in zip(clip.frames, pictures, strict=True))
    assert len(video.read(tmp_path / "b.avi")[0]) == 7


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi"])
def test_where_each_packet_is_a_frame_it_is_sought(tmp_path, name, sought):
    check(write(tmp_path / name, "mpeg4" if name == "a.avi" else "libx264", range(60)), 4)


@pytest.mark.parametrize("number", [19, 20])
def test_a_packet_that_gives_no_picture(tmp_path, number):
    """Here one that says that its picture was not coded."""
    write(tmp_path / "a.mkv", "mpeg4", range(41), between=0, sc_threshold="1000000000")
    with (
        av.open(str(tmp_path / "a.mkv")) as source,
        av.open(str(tmp_path / "b.mkv"), "w") as to,
    ):
        stream = to.add_stream_from_template(source.streams.video[0])
        for i, packet in enumerate(p for p in source.demux(video=0) if p.size):
            if i == number:
                empty = av.Packet(b"\0\0\1\xb6\x50\0\0")
                empty.pts, empty.dts, empty.time_base = packet.pts, packet.dts, packet.time_base
                packet = empty
            packet.stream = stream
            to.mux(packet)
    assert check(tmp_path / "b.mkv", 3).total == 40


@pytest.mark.parametrize("most", [2, 3, 4])
def test_an_avi_of_b_frames_and_gaps(tmp_path, most):
    """AVI does not tell when a frame is shown: what is guessed of that is not in order."""
    params = "keyint=5:min-keyint=5:bframes=3:scenecut=0:b-adapt=0:open-gop=1"
    times = [0, 2, 3, 5, 6, 9, 10, 11, 12, 15, 17, 19]
    check(write(tmp_path / "a.avi", times=times, gop=5, **{"x264-params": params}), most)


@pytest.mark.parametrize(("gop", "between"), [(1, 0), (12, 1)])
@pytest.mark.parametrize("count", [25, 48])
def test_seeking_that_leads_astray(tmp_path, count, gop, between):
    """In a program stream, where a packet's time may come out as that of another."""
    write(tmp_path / "a.mpg", "mpeg2video", range(count), gop, between, fps=25)
    for most in (2, 3, 5, 8, 13):
        check(tmp_path / "a.mpg", most)
    assert not read_index(tmp_path / "a.mpg", Deadline(tmp_path / "a.mpg")).seeks


@pytest.mark.parametrize(("gop", "skip"), [(10, 0), (10, 3), (4, 13), (4, 14)])
def test_pictures_of_which_a_part_is_renewed_each(tmp_path, gop, skip, cheap):
    """There a decoder shows nothing before it has had all parts, some frames after it starts."""
    params = f"keyint={gop}:intra-refresh=1:bframes=0"
    write(tmp_path / "a.ts", times=range(40), **{"x264-params": params})
    check(copy(tmp_path / "a.ts", tmp_path / "b.ts", slice(skip, None)), 5)


# --- broadcasts ---


@pytest.mark.parametrize("between", [0, 1])
@pytest.mark.parametrize(
    ("name", "lengths"), [("a.ts", [27, 14, 33]), ("a.mpg", [12, 31]), ("a.mkv", [21, 30])]
)
def test_recordings_that_were_joined(tmp_path, name, lengths, between):
    codec = "mpeg2video" if name == "a.mpg" else "libx264"
    parts = [
        write(tmp_path / f"{n}{name}", codec, range(n), 8, between, first=5 * n) for n in lengths
    ]
    (tmp_path / name).write_bytes(b"".join(part.read_bytes() for part in parts))
    for most in (3, 80):
        assert check(tmp_path / name, most, parts).total == sum(lengths)


def test_joined_recordings_are_not_decoded_whole(tmp_path, cheap):
    parts = [write(tmp_path / f"{n}.ts", times=range(n), first=n) for n in (50, 41)]
    (tmp_path / "a.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    check(tmp_path / "a.ts", 4, parts)
    assert not read_index(tmp_path / "a.ts", Deadline(tmp_path / "a.ts")).seeks


def test_a_time_that_is_two_places_is_not_sought(tmp_path):
    path = edit(write(tmp_path / "a.mp4"), (1.5, 2.9), (0.3, 1.5))
    check(path)
    assert not read_index(path, Deadline(path)).seeks


def test_a_recording_joined_to_a_much_later_one(tmp_path):
    parts = [write(tmp_path / "0.ts"), write(tmp_path / "1.ts", times=range(900, 917), first=77)]
    (tmp_path / "a.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    check(tmp_path / "a.ts", 11, parts)


def test_a_short_gap_in_a_broadcast_is_kept(tmp_path, cheap):
    check(write(tmp_path / "a.ts", times=[*range(12), *range(60, 75)]), 5)


@pytest.mark.parametrize("name", ["a.ts", "a.mkv"])
@pytest.mark.parametrize("options", ["bframes=0", "bframes=2", "bframes=2:open-gop=1"])
@pytest.mark.parametrize("skip", [1, 14])
def test_a_recording_that_begins_between_two_key_frames(tmp_path, name, options, skip, cheap):
    params = f"keyint=12:min-keyint=12:scenecut=0:b-adapt=0:{options}"
    # In MP4 what a decoder has to know is said once, in MPEG-TS at each key frame.
    whole = tmp_path / ("whole.ts" if name == "a.ts" else "whole.mp4")
    write(whole, times=range(60), **{"x264-params": params})
    cut = copy(whole, tmp_path / name, slice(skip, None))
    for most in (1, 6):
        check(cut, most)


def test_one_whose_decoder_refuses_what_comes_before_the_first_key_frame(tmp_path, cheap):
    write(tmp_path / "a.webm", "libvpx-vp9", between=0, **{"cpu-used": "8", "lag-in-frames": "0"})
    with av.open(str(tmp_path / "a.webm")) as container:
        keys = [p.is_keyframe for p in container.demux(video=0) if p.size]
    cut = copy(tmp_path / "a.webm", tmp_path / "b.webm", slice(2, None))
    assert check(cut).total == 30 - keys.index(True, 1)


# --- all together ---

CODECS = {
    "mp4": ("libx264", "mpeg4"), "mov": ("libx264",), "mkv": ("libx264", "mpeg2video", "libvpx"),
    "avi": ("mpeg4", "libx264"), "ts": ("libx264", "mpeg2video"), "nut": ("libx264",),
    "mpg": ("mpeg2video",),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(30))
def test_files_at_random(tmp_path, seed):
    draw = random.Random(seed)
    kind = draw.choice(list(CODECS))
    codec, path = draw.choice(CODECS[kind]), tmp_path / f"a.{kind}"
    count, gop, between = draw.randint(12, 40), draw.choice((1, 5, 12, 50)), draw.randrange(4)
    options = {}
    if codec == "libx264":
        gops = draw.choice(("", ":open-gop=1", ":intra-refresh=1:bframes=0"))
        options["x264-params"] = f"keyint={gop + 1}:bframes={between}:scenecut=0:b-adapt=0{gops}"
    times = range(count)
    if kind == "mkv" and draw.randrange(2):
        times = sorted(draw.sample(range(3 * count), count))
    write(path, codec, times, gop, between, **options)
    if kind in ("mp4", "mov") and codec == "libx264" and between:
        a, b = sorted(draw.sample(range(int(times[-1]) - 9), 2))
        edit(path, (a / 10, b / 10 + 1))
    elif draw.randrange(2) and kind not in ("avi", "mkv"):
        path = copy(path, tmp_path / f"b.{kind}", slice(draw.randint(1, 5), None))
    if truth(path):
        check(path, draw.choice((1, 2, 5, 50)))
    else:  # no key frame, nor what a decoder has to know first
        with pytest.raises(InputError, match="no frames"):
            read_video(path, 5)

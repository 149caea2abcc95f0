"""Any video file, sampled evenly within bounded memory."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from transformers import BatchFeature

from std_decode import frames
from std_decode.frames import read_video
from std_decode.inputs import InputError, to_model
from std_decode.video import seeking

FRAMES, STEP = 60, 4  # grey grows by this much a frame


def film(path, times=range(FRAMES), size=(64, 48), gop=12):
    """A file whose frame i is grey of level STEP * i, shown at times[i] / 10 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height = size
        stream.pix_fmt, stream.gop_size = "yuv420p", gop
        stream.options = {"crf": "1", "bf": "2"}
        for i, time in enumerate(times):
            grey = np.full((size[1], size[0], 3), STEP * i, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turned(path):
    """The same file, to be shown turned clockwise by a quarter."""
    one, none = (1 << 16).to_bytes(4, "big"), bytes(4)
    minus, w = (2**32 - (1 << 16)).to_bytes(4, "big"), (1 << 30).to_bytes(4, "big")
    straight = one + none * 3 + one + none * 3 + w
    clockwise = none + one + none + minus + none * 4 + w
    data = path.read_bytes()
    track = data.index(b"tkhd")
    path.write_bytes(data[:track] + data[track:].replace(straight, clockwise, 1))
    return path


def shown(clip):
    """Which frames of `film` these are."""
    return np.rint(clip.frames.mean(axis=(1, 2, 3)) / STEP).astype(int).tolist()


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.mov"])
@pytest.mark.parametrize("count", [1, 2, 5, 17, 59, 60, 400])
def test_frames_are_spread_evenly_over_the_file(tmp_path, name, count):
    clip = read_video(film(tmp_path / name), count)
    even = np.linspace(0, FRAMES - 1, min(count, FRAMES))
    assert clip.indices == shown(clip) and len(clip.indices) == min(count, FRAMES)
    assert np.abs(np.array(clip.indices) - even).max() < 0.51
    assert clip.total == FRAMES and clip.fps == pytest.approx(10, rel=0.01)
    assert clip.seconds == pytest.approx(6, rel=0.01)


def test_uneven_frames_are_sampled_by_time(tmp_path):
    times = [*range(40), *range(100, 300, 10)]
    clip = read_video(film(tmp_path / "a.mkv", times), 6)
    wanted = [min(range(60), key=lambda i: abs(times[i] - t)) for t in np.linspace(0, 290, 6)]
    assert shown(clip) == sorted(set(wanted))
    seconds = [i / clip.fps for i in clip.indices]
    assert seconds == pytest.approx([times[i] / 10 for i in shown(clip)], abs=1 / clip.fps)


def test_decoded_pixels_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "MOST_PIXELS", 60 * 300)
    clip = read_video(film(tmp_path / "a.mp4"), 60)
    assert clip.frames.shape == (60, 15, 20, 3)
    assert np.abs(np.array(shown(clip)) - range(60)).max() <= 1  # as far as scaling keeps grey


def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    """From the key frame before each wanted frame on; a long file is not read through."""
    decoded = []
    film(tmp_path / "a.mp4")
    decode = seeking.decode

    def counting(*args):
        for frame in decode(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(seeking, "decode", counting)
    monkeypatch.setattr(frames, "shown", None)  # which decodes all
    read_video(tmp_path / "a.mp4", 3)
    assert len(decoded) < 40 and len(decoded) == len(set(decoded))
    decoded.clear()
    read_video(tmp_path / "a.mp4", 60)
    assert len(decoded) == 60


def test_a_turned_video_is_upright(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[:, :16] = 255  # white on the left
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    frame = read_video(turned(path), 1).frames[0]
    assert frame.shape == (64, 48, 3)
    assert frame[:12].mean() > 200 and frame[20:].mean() < 30  # left has become top


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "not a file"),
        (lambda path: path.write_bytes(b""), "not a readable video"),
        (lambda path: path.write_bytes(b"no video at all"), "not a readable video"),
        (lambda path: path.write_bytes(film(path).read_bytes()[:-400]), "truncated"),
    ],
    ids=["missing", "folder", "empty", "text", "cut off"],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, make, words):
    make(tmp_path / "a.mp4")
    with pytest.raises(InputError, match=words) as error:
        read_video(tmp_path / "a.mp4", 4)
    assert "a.mp4" in str(error.value) and "\n" not in str(error.value)


def test_a_file_without_time_stamps_says_what_to_do(tmp_path):
    film(tmp_path / "a.h264")
    with pytest.raises(InputError, match="no time stamps.*ffmpeg"):
        read_video(tmp_path / "a.h264", 4)


@pytest.mark.parametrize("batch", [dict, BatchFeature])
def test_pixels_take_the_model_s_dtype_and_nothing_else(batch):
    model = torch.nn.Linear(1, 1, dtype=torch.bfloat16)
    model.device, model.dtype = torch.device("cpu"), torch.bfloat16
    given = batch(
        {
            "input_ids": torch.ones(1, 2, dtype=torch.int64),
            "pixel_values_videos": torch.ones(4, 8),
            "second_per_grid_ts": torch.tensor([1 / 3]),  # positions come of it
        }
    )
    got = to_model(given, model)
    assert got["pixel_values_videos"].dtype == torch.bfloat16
    for name in ("input_ids", "second_per_grid_ts"):
        assert torch.equal(got[name], given[name]) and got[name].dtype == given[name].dtype
    assert to_model({"names": ["a"]}, model) == {"names": ["a"]}

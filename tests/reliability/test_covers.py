"""A picture that is attached to a film or to sound is not the film."""

import av
import numpy as np
import pytest
from av.stream import Disposition

from std_decode.demo import video
from std_decode.errors import InputError
from std_decode.frames import read_video

SIZE = 64
NOISE = np.random.default_rng(0).integers(0, 256, (SIZE, 99, 3), dtype=np.uint8)


def covered(path, *, film, sound=False):
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 16, "yuvj420p"
        cover.disposition = Disposition.attached_pic.value
        white = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 255, np.uint8), format="rgb24")
        given = [(cover, [white])]
        if film:
            moving = container.add_stream("libx264", rate=10)
            moving.width, moving.height, moving.pix_fmt = SIZE, SIZE, "yuv420p"
            pictures = (np.ascontiguousarray(NOISE[:, i : i + SIZE]) for i in range(15))
            given.append(
                (moving, [av.VideoFrame.from_ndarray(p, format="rgb24") for p in pictures])
            )
        if sound:
            silence = np.zeros((2, 1024), np.float32)
            tone = av.AudioFrame.from_ndarray(silence, format="fltp", layout="stereo")
            tone.sample_rate = 44100
            given.append((container.add_stream("aac", rate=44100), [tone]))
        for stream, pictures in given:
            for picture in [*pictures, None]:
                container.mux(stream.encode(picture))
    return path


def test_a_cover_is_not_the_film(tmp_path):
    path = covered(tmp_path / "a.mp4", film=True)
    data = path.read_bytes()
    at = {box: data.index(box) - 4 for box in (b"mdat", b"moov", b"trak", b"udta")}
    assert at[b"mdat"] < at[b"moov"] < at[b"trak"] < at[b"udta"]
    path.write_bytes(data[: at[b"trak"]] + data[at[b"udta"] :] + data[at[b"trak"] : at[b"udta"]])
    with av.open(str(path)) as container:
        first, second = container.streams.video
        assert first.disposition & Disposition.attached_pic and second.width == SIZE
    assert read_video(path, 30).frames.shape == (15, SIZE, SIZE, 3)
    assert len(video.read(path)[0]) == 3


@pytest.mark.parametrize("sound", [False, True])
def test_sound_with_a_cover_has_no_film(tmp_path, sound):
    path = covered(tmp_path / "a.mp4", film=False, sound=sound)
    for reader in (lambda: read_video(path, 4), lambda: video.read(path)):
        with pytest.raises(InputError, match=r"no video stream, only a picture .*\(a cover\)"):
            reader()

"""Small films whose pictures are all known, and what both readers of the package make of them."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from std_decode import frames
from std_decode.demo import video
from std_decode.demo.camera import FRAME
from std_decode.frames import read_video

SIZE = 64
NOISE = np.random.default_rng(0).integers(0, 256, (SIZE, 499, 3), dtype=np.uint8)


def write(
    path,
    codec="libx264",
    times=range(30),
    gop=9,
    between=2,
    fps=10,
    first=0,
    muxing=None,
    **options,
):
    """A film of noise that moves, so that no two pictures are alike."""
    if codec == "libx264":
        options.setdefault("x264-params", f"keyint={gop}:bframes={between}:scenecut=0:b-adapt=0")
    with av.open(str(path), "w", options=muxing or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = SIZE, SIZE, "yuv420p", gop
        stream.options = {"bf": str(between), **options}
        for i, time in enumerate(times):
            picture = np.ascontiguousarray(np.roll(NOISE, -3 * (first + i), 1)[:, :SIZE])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def truth(path, size=SIZE):
    """Seconds and picture of every frame."""
    found, begun = [], False
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except av.error.InvalidDataError:
                assert not begun
                continue
            for frame in decoded:
                begun = True
                pixels = frame.to_ndarray(
                    format="rgb24", width=size, height=size, interpolation="AREA"
                )
                found.append((frame.pts * stream.time_base, pixels))
    return found


def check(path, most=7, parts=None):
    """Both readers tell what is true, be it of parts that were joined."""
    parts = parts or [path]
    times, small = [], []
    for part in parts:
        own = truth(part)
        begin = times[-1] + Fraction(1, 10) if times else 0
        times += [time - own[0][0] + begin for time, _ in own]
        small += [pixels for _, pixels in truth(part, FRAME)]
    pictures = [pixels for part in parts for _, pixels in truth(part)]
    order, times = times, sorted(times)  # in an AVI of B frames not the same
    clip = read_video(path, most)
    assert clip.total == len(pictures)
    assert clip.seconds == pytest.approx(float(times[-1]) * clip.total / (clip.total - 1))
    wanted = frames._evenly(np.array([int(time * 90_000) for time in times]), most)
    assert len(clip.frames) == len(wanted)
    for got, told, i in zip(clip.frames, clip.indices, wanted):
        assert (got == pictures[i]).all()
        assert told / clip.fps == pytest.approx(float(times[i]), abs=0.51 / clip.fps)
    halves = [Fraction(i, 2) for i in range(int(times[-1] * 2) + 1)]
    ends = np.maximum.accumulate([float(time) for time in order])
    newest = [max(i for i, end in enumerate(ends) if end <= half) for half in halves]
    got, _ = video.read(path)
    assert len(got) == len(newest) and all((a == small[i]).all() for a, i in zip(got, newest))
    return clip


def edit(path, *segments):
    """Show these seconds of the film only, one after another; from None on is nothing."""
    data = path.read_bytes()
    at = data.index(b"elst") - 4
    old = int.from_bytes(data[at : at + 4], "big")
    delay = int.from_bytes(data[at + 20 : at + 24], "big")  # of frames that are reordered
    scale = int.from_bytes(data[data.index(b"mvhd") + 16 :][:4], "big")
    media = int.from_bytes(data[data.index(b"mdhd") + 16 :][:4], "big")
    entries = [
        (round((b - (a or 0)) * scale), -1 if a is None else delay + round(a * media))
        for a, b in segments
    ]
    body = b"".join(struct.pack(">IiI", *entry, 1 << 16) for entry in entries)
    head = struct.pack(">I4sII", 16 + len(body), b"elst", 0, len(entries))
    out = bytearray(data[:at] + head + body + data[at + old :])
    for box in (b"moov", b"trak", b"edts"):
        grow(out, box, 16 + len(body) - old)
    path.write_bytes(out)
    return path


def grow(data, box, by):
    at = data.index(box) - 4
    data[at : at + 4] = (int.from_bytes(data[at : at + 4], "big") + by).to_bytes(4, "big")


def copy(source, target, packets, move=0):
    """Only these packets, without decoding them, so many frames later."""
    with av.open(str(source)) as a, av.open(str(target), "w") as b:
        stream = a.streams.video[0]
        to = b.add_stream_from_template(stream)
        for packet in [p for p in a.demux(stream) if p.size][packets]:
            packet.pts += move * packet.duration
            packet.dts += move * packet.duration
            packet.stream = to
            b.mux(packet)
    return target

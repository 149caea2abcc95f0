"""The demo's world, its tokenizer and its video files."""

import numpy as np
import pytest
import torch

from std_decode.demo import camera, video
from std_decode.demo.model import (
    VIDEO_TOKEN,
    generate_inputs,
    load_tokenizer,
    new_tokenizer,
    patchify,
    prompt,
)
from std_decode.errors import InputError

# A GPU machine that runs `pytest -m gpu` need not have it; an installation of the package has.
av = pytest.importorskip("av")


def a_clip(seconds=12, events=5, seed=0):
    return camera.random_clip(seconds, events, np.random.default_rng(seed))


def test_clips_have_what_was_asked_for():
    clip = a_clip(40, 12)
    seconds = [event.second for event in clip.events]
    tags = [event.tag for event in clip.events]
    assert len(clip.events) == 12 and sorted(set(seconds)) == seconds and seconds[-1] < 40
    assert tags == list(range(tags[0], tags[0] + 12)) and tags[-1] < camera.TAGS
    assert camera.Clip.from_dict(clip.to_dict()) == clip
    with pytest.raises(ValueError, match="events is 5, expected 1 <= events <= min"):
        a_clip(4, 5)


def test_attributes_are_graded_under_their_own_tag():
    clip = a_clip()
    told = camera.narration(clip)
    assert camera.attributes_right(told, clip) == 1
    lines = told.split("\n")[1:]
    assert camera.attributes_right("\n".join(reversed(lines)), clip) == 1
    colour = clip.events[0].words[0]
    other = next(word for word in camera.COLOURS if word != colour)
    wrong = told.replace(f" {colour} ", f" {other} ", 1)
    assert camera.attributes_right(wrong, clip) == pytest.approx(0.9)
    assert camera.attributes_right("\n".join(lines[1:]), clip) == pytest.approx(0.8)
    assert camera.attributes_right("", clip) == 0


def test_the_tokenizer_gives_back_the_text():
    clip = a_clip()
    text = prompt(2, clip.first_tag) + camera.narration(clip) + "<eos>"
    for tokenizer in (new_tokenizer(), load_tokenizer()):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert ids.count(VIDEO_TOKEN) == 8 and tokenizer.pad_token_id not in ids


def test_patchify_is_what_the_vision_tower_of_qwen2_vl_expects():
    """Patch by patch: 2 x 2 patches of a merge block follow one another; c, t, y, x inside."""
    pictures = torch.rand(3, 2, 3, camera.FRAME, camera.FRAME)
    rows = patchify(pictures)
    assert rows.shape == (3 * 16, 1176)
    row = 0
    for second in range(3):
        for block_y in range(2):
            for block_x in range(2):
                for y in range(2):
                    for x in range(2):
                        top, left = 28 * block_y + 14 * y, 28 * block_x + 14 * x
                        patch = pictures[second, :, :, top : top + 14, left : left + 14]
                        wanted = ((patch - 0.5) / 0.25).transpose(0, 1).flatten()
                        assert torch.allclose(rows[row], wanted)
                        row += 1


def test_generate_inputs_agree_with_the_frames():
    frames = np.zeros((7, camera.FRAME, camera.FRAME, 3), np.uint8)
    inputs = generate_inputs(frames, 9, load_tokenizer())
    assert int((inputs["input_ids"] == VIDEO_TOKEN).sum()) == 3 * camera.TOKENS_PER_SECOND
    assert inputs["video_grid_thw"].tolist() == [[3, 4, 4]]
    assert len(inputs["pixel_values_videos"]) == 3 * 16
    assert torch.equal(inputs["mm_token_type_ids"] > 0, inputs["input_ids"] == VIDEO_TOKEN)


def test_a_rendered_clip_survives_the_file(tmp_path):
    clip = a_clip()
    video.render(clip, tmp_path / "clip.mp4", np.random.default_rng(1))
    frames, told = video.read(tmp_path / "clip.mp4")
    assert told == clip and frames.shape == (24, camera.FRAME, camera.FRAME, 3)
    drawn = camera.draw_seconds(clip).repeat(2, axis=0).transpose(0, 2, 3, 1) * 255
    assert np.abs(frames - drawn).mean() < 12  # the camera's noise is 0.05 * 255 = 13 strong


def write_video(path, frames, rate, codec="libx264"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for shade in frames:
            picture = np.full((48, 64, 3), shade, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def test_other_files_are_sampled_at_two_frames_a_second(tmp_path):
    """At each half second, the newest frame there is."""
    shades = list(range(20, 245, 5))  # 45 frames at 10 a second: 0.0 to 4.4 s
    write_video(tmp_path / "other.mkv", shades, rate=10)
    frames, told = video.read(tmp_path / "other.mkv")
    assert told is None and len(frames) == 9
    wanted = [shades[5 * i] for i in range(9)]
    assert np.abs(frames.mean((1, 2, 3)) - wanted).max() < 4


def damaged(folder, kind):
    path = folder / "clip.mp4"
    if kind == "a folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no video at all\n" * 200)
    elif kind == "too short":
        write_video(path, [100], rate=10)
    elif kind != "missing":
        video.render(a_clip(), path, np.random.default_rng(1))
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * float(kind))])
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no such file"),
        ("a folder", "not a file"),
        ("empty", "the file is empty"),
        ("text", "not a readable video"),
        ("0.5", "truncated"),
        ("0.99", "truncated"),
        ("too short", "shorter than"),
    ],
)
def test_what_is_no_video_is_one_clear_line(tmp_path, kind, words):
    path = damaged(tmp_path, kind)
    with pytest.raises(InputError, match=words) as raised:
        video.read(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_cut_after_its_index_is_truncated(tmp_path):
    """With the index in front, such a file opens well and runs out of frames."""
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 64
        for _ in range(40):
            picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(InputError, match="truncated"):
        video.read(path)

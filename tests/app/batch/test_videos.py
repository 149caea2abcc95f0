"""Which videos are meant, about how long they are, and which go together."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from std_decode.app.batch.videos import SPREAD, batches, estimate, find_videos
from std_decode.errors import BadInput


def test_files_folders_and_lists_each_once(clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "Z.MKV").touch()
    (tmp_path / "list.txt").write_text(f"{clips}/1.mp4\n\n  there.mp4 \nbelow/Z.MKV\n")
    found = find_videos([Path("list.txt"), clips, tmp_path, Path("gone.mp4"), Path("./gone.mp4")])
    own = [tmp_path / "there.mp4", tmp_path / "below" / "Z.MKV"]
    inside = [clips / f"{name}.mp4" for name in (0, 2, 3, 4, 5, "bad")]
    assert found == list(map(str, [clips / "1.mp4", *own, *inside, tmp_path / "gone.mp4"]))


def test_nothing_to_ask_about(tmp_path):
    with pytest.raises(BadInput, match="no videos in .*end in .3gp .avi"):
        find_videos([tmp_path])
    with pytest.raises(BadInput, match="list.txt: not a list of videos"):
        find_videos([tmp_path / "list.txt"])


def test_lengths_are_told_by_the_header(clips):
    seconds = [estimate(str(clips / f"{i}.mp4"), None) for i in range(6)]
    assert seconds == pytest.approx([24, 6, 15, 9, 30, 12], abs=0.6)
    frames = [estimate(str(clips / f"{i}.mp4"), 20) for i in range(6)]
    assert frames == [224 * 224 * count for count in (20, 12, 20, 18, 20, 20)]
    for bad in ("bad.mp4", "notes.md", "gone.mp4"):
        assert estimate(str(clips / bad), None) == 0


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), max_size=40), st.integers(1, 9))
def test_batches_are_of_similar_length_and_hold_each_once(lengths, size):
    names = [str(i) for i in range(len(lengths))]
    made = batches(names, lengths, size)
    assert sorted(sum(made, [])) == sorted(names)
    of = dict(zip(names, lengths))
    assert all(1 <= len(batch) <= size for batch in made)
    assert all(of[batch[-1]] * SPREAD >= of[batch[0]] for batch in made)
    in_order = [of[name] for batch in made for name in batch]
    assert in_order == sorted(lengths, reverse=True)
    for batch, following in zip(made, made[1:]):  # none ends without a reason
        assert len(batch) == size or of[following[0]] * SPREAD < of[batch[0]]

import numpy as np
import pytest

from std_decode.demo import camera, video

SECONDS = (24, 6, 15, 9, 30, 12)


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder of camera clips that are not equally long, and what is no video among them."""
    folder = tmp_path_factory.mktemp("clips")
    for seed, seconds in enumerate(SECONDS):
        rng = np.random.default_rng(seed)
        video.render(camera.random_clip(seconds, 3, rng), folder / f"{seed}.mp4", rng)
    (folder / "bad.mp4").write_bytes(b"no video")
    (folder / "notes.md").write_text("not even by name")
    return folder

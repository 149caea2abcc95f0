import pytest

from tests.app import tiny
from tests.demo import tiny_qwen


@pytest.fixture(scope="session")
def filmed(tmp_path_factory):
    """A file that shows a clip of 20 s with 4 events."""
    return tiny.film(tmp_path_factory.mktemp("filmed") / "clip.mp4")


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A folder with a text model and its tokenizer."""
    return tiny.save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders with a Qwen2-VL and a LLaVA-OneVision, and their real processors."""
    folder = tmp_path_factory.mktemp("checkpoints")
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.app import tiny\n"
        "tiny_qwen.save(Path(sys.argv[1]) / 'qwen2_vl')\n"
        "tiny.save_llava(Path(sys.argv[1]) / 'llava_onevision')"
    )
    done = tiny_qwen.run(code, folder, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder

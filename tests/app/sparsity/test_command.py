"""`std-decode sparsity` and the demo's picture, as a user meets them."""

import json
import sys

import numpy as np
import pytest
import torch

from std_decode.app import main as cli
from std_decode.app import picture
from std_decode.demo import camera, video
from std_decode.demo.model import VIDEO_TOKEN, generate_inputs, load_model, load_tokenizer
from tests.demo import tiny_qwen

PIL_Image = pytest.importorskip("PIL.Image")
QUICK = ["--seconds", "20", "--events", "4"]


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    """A file that shows a clip, its frames, and the clip."""
    path, rng = tmp_path_factory.mktemp("filmed") / "clip.mp4", np.random.default_rng(1)
    video.render(camera.random_clip(20, 4, rng), path, rng)
    return path, *video.read(path)


def size(path):
    with PIL_Image.open(path) as image:
        assert image.format == "PNG" and len(image.getcolors(256)) > 4
        return image.size


def test_sparsity_measures_the_demo_model(tmp_path, capsys):
    page = tmp_path / "page.png"
    arguments = [*QUICK, "--picture", page, "--top-k-keys", 8, 24, 500, "--draft-lengths", 2, 5]
    assert cli.main(["sparsity", *map(str, arguments)]) == 0
    assert min(size(page)) > 600
    found = json.loads((tmp_path / "page.json").read_text())
    assert [point["top_k_keys"] for point in found["keys"]] == [8, 24, found["candidates"]]
    assert found["candidates"] < 80 < found["prompt_tokens"]
    for point in found["keys"]:
        assert set(point["attention_kept"]) == {"0", "1", "2", "3"}
        assert np.all(np.less_equal(list(point["attention_kept"].values()), 1 + 1e-5))
        assert 0 <= point["agreed"] <= point["drafted"] < found["answer_tokens"]
    assert [point["draft_length"] for point in found["draft_lengths"]] == [0, 2, 5]
    assert list(found["speedup_by_draft_length"]) == list("012345")
    suggestion = found["suggestion"]
    assert suggestion["top_k_keys"] in (8, 24) and 0 <= suggestion["draft_length"] <= 5
    told = " ".join(capsys.readouterr().out.split())
    assert f"suggested: top_k_keys={suggestion['top_k_keys']}" in told
    assert suggestion["why"].replace(" ", "") in told.replace(" ", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.json", "page.png"]


COMMAND = "import sys\nfrom std_decode.app import main as cli\nsys.exit(cli.main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny Qwen2-VL."""
    folder = tmp_path_factory.mktemp("model")
    code = "import sys\nfrom pathlib import Path\ntiny_qwen.save(Path(sys.argv[1]))"
    done = tiny_qwen.run(code, folder, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.torchvision
def test_sparsity_measures_a_model_from_a_folder(tmp_path, filmed, saved):
    arguments = ["--model", saved, "--video", filmed[0], "--frames", 8, "--prompt", "Why?",
                 "--max-new-tokens", 12, "--picture", "a.png", "--json", "b.json",
                 "--top-k-keys", 4, "--draft-lengths", 3]  # fmt: skip
    done = tiny_qwen.run(COMMAND, "sparsity", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["answer_tokens"] == 12 and "8 frames" in found["about"]
    assert found["keys"][-1]["agreement"] == 1 and found["dtype"] == "float32"
    assert min(size(tmp_path / "a.png")) > 600


def test_sparsity_measures_a_text_model_on_a_long_text(tmp_path, llama, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asked.txt").write_text("Why is it so, and what comes of it? " * 20)
    arguments = ["--model", str(llama), "--prompt-file", "asked.txt", "--max-new-tokens", "8"]
    arguments += ["--picture", "a.png", "--json", "b.json", "--top-k-keys", "16"]
    assert cli.main(["sparsity", *arguments, "--draft-lengths", "2"]) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["candidates"] > 100 and "text only" in found["about"]
    assert found["keys"][-1]["agreement"] == 1
    assert min(size(tmp_path / "a.png")) > 600


HANDED_ON = """
import json, sys
from pathlib import Path
from std_decode.frames import read_video
from std_decode.inputs import load_model, load_processor, make_inputs

processor = load_processor(sys.argv[1])
clip = read_video(Path(sys.argv[2]), 8)
seen, kind = {}, type(processor.video_processor)
plain = kind.preprocess

def preprocess(self, videos, **options):
    seen.update(options)
    return plain(self, videos, **options)

kind.preprocess = preprocess
inputs = make_inputs(processor, clip, "Why?")
told = seen["video_metadata"][0]
answer = load_model(sys.argv[1]).generate(**inputs, max_new_tokens=3)
print(json.dumps({
    "asked": processor.tokenizer.decode(inputs["input_ids"][0]),
    "grid": inputs["video_grid_thw"][0].tolist(),
    "told": [told["frames_indices"], told["total_num_frames"], told["fps"]],
    "sampled": clip.indices,
    "samples_again": seen["do_sample_frames"],
    "new": answer.shape[1] - inputs["input_ids"].shape[1],
}))
"""


@pytest.mark.torchvision
def test_the_processor_gets_the_frames_and_when_they_are(tmp_path, filmed, saved):
    done = tiny_qwen.run(HANDED_ON, saved, filmed[0], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "Why?" in found["asked"] and found["asked"].endswith("assistant\n")
    assert found["grid"][0] == 4 and found["new"] == 3  # two frames a step
    assert found["told"] == [found["sampled"], 40, 2] and found["samples_again"] is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "m"], "--model needs something to be asked"),
        (["--prompt", "Why?"], "--prompt is for a model of yours"),
        (["--trust-remote-code"], "--trust-remote-code is for a model of yours"),
        (["--video", "nothing.mp4", "--seed", "0"], "--seed is for a rendered clip"),
        (["--video", "nothing.mp4"], "nothing.mp4: no such file"),
        (["--seconds", "5"], "--events is 12, expected at most one a second, 5"),
        (["--picture", "a.jpg"], "a.jpg is no PNG"),
        (["--picture", "no/such/folder/a.png"], "--picture: no/such/folder/a.png cannot be"),
        (["--json", "."], "--json: . cannot be a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sparsity", *arguments]) == 2
    told = capsys.readouterr()
    assert words in told.err and told.err.count("\n") == 1 and not told.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["sparsity", "demo"])
def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch, capsys, command):
    from std_decode.app import output

    monkeypatch.setattr(output, "find_spec", lambda name: None)
    assert cli.main([command, "--picture", str(tmp_path / "a.png")]) == 2
    assert capsys.readouterr().err.endswith('pip install "sparse-to-dense[bench]"\n')


@pytest.mark.parametrize(
    ("missing", "words"),
    [("torchvision", "needs torchvision: pip install"), ("jinja2", "needs jinja2: pip install")],
)
def test_without_a_processor_s_packages_it_says_what_to_install(
    tmp_path, filmed, monkeypatch, capsys, missing, words
):
    for name in ("torchvision", "jinja2"):  # as if there, so that the other one is what is missing
        monkeypatch.setitem(sys.modules, name, None if name == missing else sys)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sparsity", "--model", "m", "--video", str(filmed[0])]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1


@pytest.mark.torchvision
@pytest.mark.parametrize("config", [None, "{}", '{"model_type": "qwen2_vl"}', "no JSON"])
def test_a_bad_model_is_one_line_and_status_2(tmp_path, filmed, config):
    if config is not None:
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "config.json").write_text(config)
    done = tiny_qwen.run(COMMAND, "sparsity", "--model", "./m", "--video", filmed[0], cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("std-decode: ./m: ") and done.stderr.count("\n") == 1


def test_the_share_of_a_second_is_counted_over_layers_and_heads():
    selected = torch.tensor([[[0, 2, 3, 6, 13], [2, 3, 4, 5, -1]]], dtype=torch.int32)
    # first video token at 2: keys 2..5 are second 0, 6..9 second 1, 10..13 second 2
    shares = picture.second_shares(selected, 2, 3)
    assert shares.tolist() == [6 / 8, 1 / 8, 1 / 8]


def test_a_round_speaks_of_the_events_whose_lines_it_adds_to():
    clip = camera.Clip(9, tuple(camera.Event(2 * i, 8 + i, i, 0) for i in range(3)))
    tokenizer = load_tokenizer()
    text = "\n#10 red checks\n#12 blue ring\n#77 red ring<eos>"
    answer = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    assert len(answer) == 16  # five a line, and the end
    told = [picture._told(tokenizer, answer, *span, clip) for span in ((1, 5), (3, 6), (5, 11))]
    assert told == [[0], [0, 4], [4]]  # tag 12 is that of the third event, 77 of none
    assert picture._told(tokenizer, answer, 1, 5, None) == []


@pytest.mark.parametrize("sample", [False, True])
def test_the_walk_is_what_the_drafts_of_the_narration_read(filmed, sample):
    _, frames, clip = filmed
    model, tokenizer = load_model(), load_tokenizer()
    inputs = generate_inputs(frames, clip.first_tag, tokenizer)
    sampling = dict(do_sample=True, top_k=0) if sample else dict(do_sample=False)
    torch.manual_seed(3)
    sequences = model.generate(**inputs, **sampling, max_new_tokens=328)
    told = sequences[0, inputs["input_ids"].shape[1] :]
    options = dict(sampling=sampling, top_k_keys=8, draft_length=4)
    torch.manual_seed(3)
    walk = picture.record(model, tokenizer, inputs, clip, **options)
    # The first token is prefill's, and so is what the first round reads.
    assert "".join(walk.texts) == tokenizer.decode(told[1:]) and len(walk.texts) > 2
    torch.manual_seed(3)
    static = picture.record(model, tokenizer, inputs, clip, **options, reselect=False)
    assert (static.share == walk.share[0]).all() and (walk.share[1] != walk.share[0]).any()
    first = int((inputs["input_ids"][0] == VIDEO_TOKEN).int().argmax())
    kept = max(0, 4 - first)  # video tokens among the first four, which are always read
    for share in walk.share:
        assert share.sum() * camera.TOKENS_PER_SECOND == pytest.approx(8 + kept)
    for known in (clip, None):
        figure = picture.draw(walk, frames, known, "here")
        assert "here" in figure._suptitle.get_text()


def test_demo_draws_the_picture(tmp_path, capsys):
    drawn = tmp_path / "walk.png"
    assert cli.main(["demo", *QUICK, "--picture", str(drawn)]) == 0
    assert size(drawn)[0] == 1200
    assert [path.name for path in tmp_path.iterdir()] == ["walk.png"]
    assert cli.main(["demo", *QUICK, "--draft-length", "0", "--picture", str(drawn)]) == 2
    assert "no drafts" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sparsity", "--help"])
    told = capsys.readouterr().out
    for word in ("attention kept", "in hindsight", "[hub]", "--model", "examples:", "--frames"):
        assert word in told

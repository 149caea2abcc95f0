"""`std-decode generate`, as a user meets it: the unpatched model's answer, and nothing else."""

import inspect
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import std_decode
from std_decode import inputs
from std_decode.app import answer, question
from std_decode.app import main as cli
from std_decode.demo import model as demo
from std_decode.demo import video
from tests.app import tiny
from tests.demo import tiny_qwen

DRAFTS = ["--draft-length", "3", "--top-k-keys", "8"]


def plain_answer(folder, prompt, **options):
    """What the unpatched text model says."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = words(prompt, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(7)
    output = model.generate(**ids, max_new_tokens=40, **options)
    return words.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_demo_model_narrates_a_file(filmed, capsys):
    frames, clip = video.read(filmed)
    tokenizer = demo.load_tokenizer()
    ids = demo.generate_inputs(frames, clip.first_tag, tokenizer)
    output = demo.load_model().generate(**ids, max_new_tokens=328)
    expected = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert cli.main(["generate", "--video", str(filmed), "--stats", *DRAFTS]) == 0
    told = capsys.readouterr()
    assert told.out == expected + "\n" and expected.count("#") == 4
    assert "acceptance rate" in told.err and "KV cache" in told.err


@pytest.mark.parametrize("sample", [False, True])
def test_a_text_model_answers(llama, capsys, sample):
    asked = "<|im_start|>user\nWhy so?<|im_end|>\n<|im_start|>assistant\n"
    options = dict(do_sample=True, temperature=1.5, top_p=0.9) if sample else {}
    expected = plain_answer(llama, asked, **options)
    more = ["--sample", "--temperature", "1.5", "--top-p", "0.9"] if sample else []
    arguments = ["--model", str(llama), "--prompt", "Why so?", "--max-new-tokens", "40"]
    assert cli.main(["generate", *arguments, "--seed", "7", *DRAFTS, *more, "--stats"]) == 0
    told = capsys.readouterr()
    assert told.out == expected + "\n" and len(expected) > 30
    assert "ragged" in told.err  # a streamer of our own would force lockstep when sampling


@pytest.mark.parametrize("where", ["file", "stdin"])
def test_a_prompt_of_any_length_comes_from_a_file(llama, capsys, monkeypatch, tmp_path, where):
    text = "Why, é so? " * 30
    (tmp_path / "asked.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    name = str(tmp_path / "asked.txt") if where == "file" else "-"
    told = []
    for asked in (["--prompt", text], ["--prompt-file", name]):
        arguments = ["--model", str(llama), *asked, "--max-new-tokens", "12", *DRAFTS]
        assert cli.main(["generate", *arguments]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] and len(told[0]) > 10


def test_without_a_chat_template_the_prompt_is_given_as_it_is(tmp_path, capsys):
    tiny.save_llama(tmp_path, template=None)
    arguments = ["--model", str(tmp_path), "--prompt", "Once upon", "--max-new-tokens", "40"]
    assert cli.main(["generate", *arguments, *DRAFTS]) == 0
    assert capsys.readouterr().out == plain_answer(tmp_path, "Once upon") + "\n"


def test_a_template_that_begins_with_the_bos_token_gets_no_second_one():
    from tokenizers.processors import TemplateProcessing

    words = tiny_qwen.tokenizer(tiny.SPECIAL)
    words.bos_token = "<|endoftext|>"
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    for template, asked in ((None, "Why?"), ("<|endoftext|>{{ messages[0].content }}", "Why?")):
        words.chat_template = template
        ids = inputs.make_inputs(words, None, asked)["input_ids"][0].tolist()
        assert ids.count(0) == 1 and ids[0] == 0 and len(ids) == 5


def test_every_option_of_the_patch_comes_through():
    given = [*DRAFTS, "--draft-weights", "int4", "--draft-weights-cache", "a", "--no-reselect"]
    given += ["--compile", "--reproducible", "16", "--prompt-lookup", "yes"]
    given += ["--kv-cache", "offloaded"]
    options = cli._parser().parse_args(["generate", *given])
    patch = answer.patch_options(options)
    assert patch.pop("draft_weights_cache").name == "a"
    assert patch == dict(top_k_keys=8, draft_length=3, prompt_lookup=True, reselect=False,
                         draft_weights="int4", kv_cache="offloaded", compile=True,
                         reproducible=16)  # fmt: skip
    defaults = answer.patch_options(cli._parser().parse_args(["generate"]))
    known = inspect.signature(std_decode.patch).parameters
    assert all(known[name].default == value for name, value in defaults.items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "Why?"], "--prompt is for a model of yours; give --model too"),
        (["--prompt-lookup", "True"], "--prompt-lookup: 'True', expected auto, yes or no"),
        (["--image", "a.jpg"], "--image is for a model of yours"),
        (["--model", "m"], "--model needs a question; give --prompt TEXT, --video or --image"),
        (["--model", "m", "--prompt", "a", "--frames", "3"], "--frames is for a video"),
        (["--temperature", "1"], "--temperature is of sampling; give --sample too"),
        (["--sample", "--temperature", "0"], "--temperature: is 0, expected more than 0"),
        (["--sample", "--top-p", "1.5"], "--top-p: is 1.5, expected more than 0, at most 1"),
        (["--draft-weights-cache", "a"], "give --draft-weights int4 too"),
        (["--kv-cache", "host"], "invalid choice: 'host'"),
        (["--draft-length", "64"], "--draft-length: is 64, expected 0 to 63"),
        (["--video", "nothing.mp4"], "nothing.mp4: no such file"),
        (["--video", "https://a.b/c.mp4"], "an address, and only files are read"),
        (["--model", "./m", "--prompt", "a"], "./m: no such folder"),
        (["--model", "a/b/c", "--prompt", "a"], "a/b/c: no such folder"),
        (["--model", __file__, "--prompt", "a"], "a file, expected a model's folder or hub id"),
        (["--model", ".", "--prompt", "a"], ".: has no config.json"),
        (["--prompt", ""], "--prompt: is empty, expected a question"),
        (["--model", "m", "--prompt", "\udcff"], "is no UTF-8, expected a question"),
        (
            ["--prompt-file", "no.txt"],
            "--prompt-file: no.txt: No such file or directory, expected",
        ),
        (["--prompt-file", "."], "--prompt-file: .: Is a directory, expected a file of text"),
        (["--prompt-file", "/dev/null"], "/dev/null is empty, expected a file with a question"),
        (["--prompt", "a", "--prompt-file", __file__], "not allowed with argument --prompt"),
        (["--seed", "9223372036854775808"], "--seed: is 9223372036854775808, expected 0 to"),
        (["--draft-weights", "int4", "--draft-weights-cache", "no/a"], "no/a cannot be a file"),
        (["--model", "./m", "--prompt", "a", "--device", "toaster"], "'toaster' cannot be used"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("command", ["generate", "compare"])
def test_bad_input_is_one_line_and_status_2(
    tmp_path, monkeypatch, capsys, command, arguments, words
):
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main([command, *arguments])
    except SystemExit as exit:  # of argparse
        status = exit.code
    told = capsys.readouterr()
    assert status == 2 and words in told.err and told.err.count("\n") == 1 and not told.out
    assert list(tmp_path.iterdir()) == []


def test_a_text_model_takes_no_video(llama, filmed, monkeypatch, capsys):
    monkeypatch.setattr(inputs, "check_packages", lambda *names: None)
    arguments = ["--model", str(llama), "--video", str(filmed), "--prompt", "a"]
    monkeypatch.setattr("std_decode.app.question.check_packages", lambda *names: None)
    assert cli.main(["generate", *arguments]) == 2
    assert "takes no video (llama)" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["torchvision", "PIL", "jinja2"])
def test_without_a_processor_s_packages_it_says_what_to_install(
    filmed, monkeypatch, capsys, missing
):
    for name in ("torchvision", "PIL", "jinja2"):
        monkeypatch.setitem(sys.modules, name, None if name == missing else sys)
    assert cli.main(["generate", "--model", "m", "--video", str(filmed)]) == 2
    assert capsys.readouterr().err == (
        f'std-decode: a model\'s processor needs {missing}: pip install "sparse-to-dense[hub]"\n'
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "give fewer --frames"),
        (NotImplementedError("patch: X has ALiBi\nno"), "patch: X has ALiBi no"),
        (MemoryError("copies take 9 GB"), "copies take 9 GB"),
        (ValueError("patch: draft_weights_cache is 'a', no"), "draft_weights_cache is 'a'"),
        (RuntimeError("probability tensor contains"), "raise --temperature"),
    ],
)
def test_what_a_user_can_do_something_about_is_one_line(filmed, monkeypatch, capsys, error, words):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(std_decode, "patched", fail)
    assert cli.main(["generate", "--video", str(filmed)]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1


def test_a_prompt_must_not_hold_the_place_of_a_video():
    processor = SimpleNamespace(video_token="<|video_pad|>", image_token=None)
    with pytest.raises(inputs.InputError, match="the prompt has <.video_pad.> in it"):
        inputs.make_inputs(processor, None, "What is <|video_pad|>?")


@pytest.mark.parametrize("quiet", [False, True])
def test_a_download_shows_its_progress(tmp_path, monkeypatch, quiet):
    from huggingface_hub.utils import are_progress_bars_disabled

    console = Console(stderr=True, quiet=quiet)
    question.disable_progress_bar()
    with question.said_of_loading("Qwen/Qwen2-VL-2B-Instruct", console):
        assert are_progress_bars_disabled() == quiet
    with question.said_of_loading(str(tmp_path), console):
        assert are_progress_bars_disabled()


def test_a_reader_that_has_had_enough_is_no_error(filmed):
    command = [sys.executable, "-m", "std_decode", "generate", "--video", str(filmed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0


@pytest.mark.parametrize("spoil", [None, b"no image", 300])
def test_images_are_read_or_named_in_one_line(tmp_path, spoil):
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "a.jpg"
    exif = image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    image.fromarray(noise).save(path, exif=exif)
    if spoil is None:
        assert inputs.read_image(path).size == (40, 60)
        return
    path.write_bytes(path.read_bytes()[:spoil] if isinstance(spoil, int) else spoil)
    with pytest.raises(inputs.InputError, match="a.jpg: not a readable image"):
        inputs.read_image(path)


def test_help_teaches(capsys):
    for command in ("generate", "compare"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        told = capsys.readouterr().out
        for word in ("examples:", "--image", "--draft-weights", "--temperature", "demo model"):
            assert word in told


# In a process that torchvision works in: the prompt is that of transformers' own way to ask, and
# what the command wrote is what the unpatched model says.
CHECK = """
import contextlib, io, json, sys
from pathlib import Path
from PIL import Image
from std_decode.app import main as cli
from std_decode.frames import read_video
from std_decode.inputs import load_model, load_processor, make_inputs

folder, clip_file, picture_file = sys.argv[1:4]
picture = Image.new("RGB", (64, 48), (200, 30, 90))
picture.save(picture_file)
clip = read_video(Path(clip_file), 8)
processor = load_processor(folder, takes=("video", "image"))
model = load_model(folder)
found = {}
for name, given in {
    "video": ["--video", clip_file, "--frames", "8"],
    "image": ["--image", picture_file],
    "text": [],
}.items():
    seen = {"video": {"type": "video", "video": clip.frames}, "image": {"type": "image",
            "image": picture}}
    content = [seen[name]] if name in seen else []
    more = dict(do_sample_frames=False, video_metadata=[dict(total_num_frames=clip.total,
                fps=clip.fps, frames_indices=clip.indices)]) if name == "video" else {}
    asked = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": "Why?"}]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs=more)
    ours = make_inputs(processor, clip if name == "video" else None, "Why?",
                       image=picture if name == "image" else None)
    tokens = model.generate(**asked, max_new_tokens=24, do_sample=False)
    plain = processor.tokenizer.decode(tokens[0, asked["input_ids"].shape[1]:],
                                       skip_special_tokens=True)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = cli.main(["generate", "--model", folder, *given, "--prompt", "Why?",
                           "--max-new-tokens", "24", "--draft-length", "3", "--top-k-keys", "8"])
    found[name] = dict(status=status, told=out.getvalue(), plain=plain, length=len(plain),
                       same={k: bool((v == ours[k]).all()) for k, v in asked.items()})
print(json.dumps(found))
"""


@pytest.mark.torchvision
@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_a_model_from_a_folder_answers_as_unpatched(tmp_path, filmed, checkpoints, family):
    done = tiny_qwen.run(CHECK, checkpoints / family, filmed, tmp_path / "a.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    by_question = json.loads(done.stdout.splitlines()[-1])
    assert "pixel_values_videos" in by_question["video"]["same"]
    assert "pixel_values" in by_question["image"]["same"]
    for name, found in by_question.items():
        assert found["status"] == 0 and all(found["same"].values()), (name, found)
        assert found["told"] == found["plain"] + "\n" and found["length"] >= 20, (name, found)

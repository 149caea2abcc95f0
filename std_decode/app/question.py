"""What a command asks of which model: one of the user's, or the demo model."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from torch import Tensor
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

import std_decode
from std_decode import parallel
from std_decode.errors import BadInput
from std_decode.frames import read_video
from std_decode.inputs import (
    check_device,
    check_packages,
    load_model,
    load_processor,
    make_inputs,
    read_image,
    to_model,
)
from std_decode.parallel import Place

FRAMES = 32  # of a video, where the user does not say
_OWN = ("prompt", "image", "frames", "dtype", "device", "trust_remote_code", "tp")


@dataclass(frozen=True)
class Question:
    """A model, unpatched, and one prompt for it.

    Attributes:
        inputs: as generate takes them, one row, on the model's device.
        tokenizer: token ids to text.
        most_tokens: of the answer.
        about: what was asked of what, for the title.
    """

    model: Any
    inputs: dict[str, Tensor]
    tokenizer: Any
    most_tokens: int
    about: str

    @property
    def prompt_tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]

    @property
    def decode(self) -> Callable[[Tensor], str]:
        return self.tokenizer.decode

    def conditions(self) -> dict[str, Any]:
        """What figures of this model on this machine depend on, for a JSON file."""
        device = self.model.device
        if device.type == "cuda":
            hardware = torch.cuda.get_device_name(device)
        else:
            hardware = f"{device.type.upper()}, {torch.get_num_threads()} thread(s)"
        return {
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "hardware": hardware,
            "versions": {
                "std_decode": std_decode.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


def refuse(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Refuse those of `names` that were given."""
    for name in names:
        given = getattr(options, name, None)
        if given is not None and given is not False:
            raise BadInput(f"--{name.replace('_', '-')} {why}")


def check_question(options: argparse.Namespace) -> None:
    """Refuse what does not go together, before any work."""
    image = getattr(options, "image", None)
    if options.model is None:
        refuse(options, _OWN, "is for a model of yours; give --model too")
        return
    if getattr(options, "tp", False):
        refuse(options, ("device",), "is for one process; with --tp each takes a GPU of its own")
    if options.video is None:
        refuse(options, ("frames",), "is for a video; give --video too")
    if options.video is None and image is None and options.prompt is None:
        raise BadInput("--model needs a question; give --prompt TEXT, --video or --image FILE")


@contextmanager
def said_of_loading(name: str, console: Console) -> Iterator[None]:
    """Tell that a model is loaded, and how far its download is."""
    if Path(name).is_dir():
        with console.status(f"loading {name}"):
            yield
        return
    console.print(f"[dim]loading {name}; what is not in the cache is downloaded[/dim]")
    if not console.quiet:
        enable_progress_bar()  # the hub's own, which a status line of ours would break
    try:
        yield
    finally:
        disable_progress_bar()


def ask(options: argparse.Namespace, console: Console, place: Place | None = None) -> Question:
    """Read the video, make the prompt, load the model.

    Args:
        place: of this process, to load its share of the model; None: the whole one.

    Raises:
        InputError: something is missing or no good; the message is one line.
    """
    if options.model is None:
        return _of_the_demo_model(options, console)
    image_file = getattr(options, "image", None)
    takes = [kind for kind in ("video", "image") if getattr(options, kind, None) is not None]
    if takes:
        check_packages()
    if options.device is not None:
        check_device(options.device)
    trust = options.trust_remote_code
    clip = image = None
    with console.status("reading") as status:
        if options.video is not None:
            status.update(f"reading {options.video}")
            clip = read_video(options.video, options.frames or FRAMES)
        if image_file is not None:
            image = read_image(image_file)
        status.update("loading the processor")
        processor = load_processor(options.model, takes=takes, trust_remote_code=trust)
        prompt = options.prompt or f"Describe the {' and the '.join(takes)} in detail."
        inputs = make_inputs(processor, clip, prompt, image=image)
    loading: dict[str, Any] = dict(dtype=options.dtype or "auto", trust_remote_code=trust)
    with said_of_loading(options.model, console):
        if place is None:
            model = load_model(options.model, device=options.device, **loading)
        else:
            model = parallel.load_model(options.model, place, **loading)
    about = [options.model.rstrip("/").rpartition("/")[2]]
    if clip is not None:
        about += [options.video.name, f"{len(clip.frames)} frames"]
    if image_file is not None:
        about.append(image_file.name)
    return Question(
        model,
        to_model(inputs, model),
        getattr(processor, "tokenizer", processor),
        options.max_new_tokens or 128,
        ", ".join(about if takes else [*about, "text only"]),
    )


def _of_the_demo_model(options: argparse.Namespace, console: Console) -> Question:
    from std_decode.demo import camera, video
    from std_decode.demo import model as demo

    seconds, events = (getattr(options, name, None) for name in ("seconds", "events"))
    seconds, events, seed = seconds or 256, events or 12, options.seed or 0
    if options.video is not None:
        frames, clip = video.read(options.video)
        shown = options.video.name
    else:
        rng = np.random.default_rng(seed)
        clip = camera.random_clip(seconds, events, rng)
        shown = f"clip of {seconds} s, {events} events, seed {seed}"
        with (
            tempfile.TemporaryDirectory() as folder,
            console.status(f"filming {seconds} s with {events} events"),
        ):
            video.render(clip, Path(folder) / "clip.mp4", rng)
            frames, clip = video.read(Path(folder) / "clip.mp4")
    tokenizer = demo.load_tokenizer()
    inputs = demo.generate_inputs(frames, clip.first_tag if clip is not None else 0, tokenizer)
    most = options.max_new_tokens or 5 * camera.TAGS + 8
    return Question(demo.load_model(), inputs, tokenizer, most, f"demo model, {shown}")

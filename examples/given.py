"""What the examples begin with: a model, and a way to ask it about one video.

By default the demo model and a rendered clip; with ``--model M --video FILE`` yours.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np


def model_and_questions():
    """A model, its tokenizer, and inputs for generate of two questions about the same video."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; none: the demo model")
    parser.add_argument("--video", type=Path, help="needs --model; none: a rendered clip")
    parser.add_argument("--prompt", default="Describe the video in detail.")
    parser.add_argument("--second-prompt", default="What happens last?")
    options = parser.parse_args()
    if (options.model is None) != (options.video is None):
        parser.error("--model and --video go together")
    return of_the_demo() if options.model is None else of_yours(options)


def of_yours(options):
    from std_decode.frames import read_video
    from std_decode.inputs import load_model, load_processor, make_inputs, to_model

    processor = load_processor(options.model)
    model = load_model(options.model)
    clip = read_video(options.video, frames=32)
    prompts = (options.prompt, options.second_prompt)
    inputs = [to_model(make_inputs(processor, clip, prompt), model) for prompt in prompts]
    return model, processor.tokenizer, *inputs


def of_the_demo():
    from std_decode.demo import camera, video
    from std_decode.demo.model import generate_inputs, load_model, load_tokenizer

    rng = np.random.default_rng(0)
    clip = camera.random_clip(64, 8, rng)
    with tempfile.TemporaryDirectory() as folder:
        video.render(clip, Path(folder) / "clip.mp4", rng)
        frames, _ = video.read(Path(folder) / "clip.mp4")
    tokenizer = load_tokenizer()
    # The model narrates the events of the video from a tag on: from the first, from the fifth.
    tags = clip.first_tag, clip.first_tag + 4
    return load_model(), tokenizer, *(generate_inputs(frames, tag, tokenizer) for tag in tags)

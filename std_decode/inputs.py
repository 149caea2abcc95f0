"""A model of the user's and what it needs to answer a question about a video file.

>>> clip = read_video(Path("clip.mp4"), frames=64)
>>> processor = load_processor("Qwen/Qwen2-VL-2B-Instruct")
>>> inputs = make_inputs(processor, clip, "What happens?")
>>> model = load_model("Qwen/Qwen2-VL-2B-Instruct")
>>> model.generate(**to_model(inputs, model))
"""

from __future__ import annotations

import bisect
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from std_decode.media import MOST_PACKETS, Deadline, InputError, open_video

# Decoded frames in memory come to 192 MiB at most, however long and large the video is.
MOST_PIXELS = 2**26
MOST_FRAMES = 4096
_HUB = 'pip install "sparse-to-dense[hub]"'


@dataclass(frozen=True)
class Video:
    """Frames of a video, at even distances in time.

    Attributes:
        frames: RGB, uint8 ``[F, H, W, 3]``.
        indices: of these frames among the `total` ones, ascending.
        total: frames in the file.
        fps: of the file, on average.
    """

    frames: np.ndarray
    indices: list[int]
    total: int
    fps: float

    @property
    def seconds(self) -> float:
        return self.total / self.fps


def read_video(path: Path, frames: int) -> Video:
    """Decode at most `frames` frames (1 to 4096) of any video file, evenly over its length.

    Seeks to what it needs. Frames are made smaller where all of them would have more than 2^26
    pixels, and turned upright as the file says.

    Raises:
        InputError: missing, a folder, empty, no video, cut off, without time stamps, or too large
            (see media.py).
    """
    deadline = Deadline(path)
    with open_video(path) as (container, stream):
        stamps, keys = _time_stamps(container, stream, path, deadline)
        wanted = _evenly(stamps, frames)
        pictures = _decode(container, stream, stamps[wanted].tolist(), keys, deadline)
        time_base = stream.time_base or Fraction(1)
    if len(pictures) < len(wanted):
        raise InputError(f"{path}: truncated: some frames cannot be decoded")
    since = [float((int(stamps[i]) - int(stamps[0])) * time_base) for i in (*wanted, -1)]
    length = since.pop()
    fps = (len(stamps) - 1) / length if length else 1.0
    return Video(np.stack(pictures), [round(x * fps) for x in since], len(stamps), fps)


def _time_stamps(
    container: Any, stream: Any, path: Path, deadline: Deadline
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Of all frames, int64, and of those that decoding can start at, with their decoding times."""
    stamps, keys = array("q"), []
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.pts is None:
            raise InputError(
                f"{path}: has no time stamps; put it into a container: ffmpeg -i {path.name} "
                "-c copy new.mp4"
            )
        if len(stamps) == MOST_PACKETS:
            raise InputError(f"{path}: more than {MOST_PACKETS:,} frames; cut it")
        stamps.append(packet.pts)
        if packet.is_keyframe:
            keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        deadline.check()
    if not stamps:
        raise InputError(f"{path}: has no frames, or is truncated")
    if len(stamps) < stream.frames:
        raise InputError(f"{path}: truncated: {len(stamps)} of {stream.frames} frames are there")
    return np.unique(np.array(stamps)), sorted(keys)


def _evenly(stamps: np.ndarray, frames: int) -> list[int]:
    """Indices of the frames nearest to evenly spread times, each once."""
    if len(stamps) <= frames:
        return list(range(len(stamps)))
    stamps = stamps.astype(np.float64)  # differences may be beyond int64
    times = np.linspace(stamps[0], stamps[-1], frames)
    at = np.searchsorted(stamps, times).clip(1, len(stamps) - 1)
    before = stamps[at - 1], stamps[at]
    return sorted(set((at - (times - before[0] < before[1] - times)).tolist()))


def _decode(
    container: Any,
    stream: Any,
    wanted: list[int],
    keys: list[tuple[int, int]],
    deadline: Deadline,
) -> list[np.ndarray]:
    """The pictures at these time stamps, as far as they are there, all of the first one's size."""
    pictures: list[np.ndarray] = []
    source, at = None, -math.inf  # where decoding has come to
    shape: tuple[int, int] | None = None
    turns = 0
    for stamp in wanted:
        key = bisect.bisect_right(keys, (stamp, math.inf)) - 1
        if source is None or (key >= 0 and keys[key][0] > at):
            source = _frames_from(container, stream, stamp, keys[max(0, key - 2) : key + 1])
        for frame in source:
            deadline.check()
            at = frame.pts if frame.pts is not None else at
            if at >= stamp:
                if shape is None:
                    shape, turns = _size(frame, len(wanted)), round(frame.rotation / 90) % 4
                pictures.append(_picture(frame, *shape, turns))
                break
    return pictures


def _frames_from(
    container: Any, stream: Any, stamp: int, keys: list[tuple[int, int]]
) -> Iterator[Any]:
    """Frames in order, from one on that is not after `stamp`, as near as can be."""
    # Some formats are sought by showing times, some by decoding times, which are earlier; where
    # both come out too late, further back.
    for place in (*(time for key in reversed(keys) for time in key), -(2**62)):
        container.seek(place, stream=stream, backward=True)
        frames = container.decode(stream)
        first = next(frames, None)
        if first is not None and (first.pts is None or first.pts <= stamp):
            break
    return chain([] if first is None else [first], frames)


def _size(frame: Any, frames: int) -> tuple[int, int]:
    """Width and height that so many such frames are kept in."""
    shrink = min(1.0, math.sqrt(MOST_PIXELS / frames / (frame.width * frame.height)))
    # No less than a pixel, but of a frame that is long and thin not more than all may have.
    width, height = (max(1, int(side * shrink)) for side in (frame.width, frame.height))
    most = MOST_PIXELS // frames
    return min(width, most // height or 1), min(height, most // width or 1)


def _picture(frame: Any, width: int, height: int, turns: int) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA")
    return np.rot90(pixels, turns)


def read_image(path: Path) -> Any:
    """A PIL image, RGB, turned upright as the file says.

    Raises:
        InputError: missing, a folder, or no image; Pillow is missing.
    """
    check_packages("PIL")
    from PIL import Image, ImageOps

    if not path.is_file():
        what = (
            "not a file; expected an image such as photo.jpg" if path.exists() else "no such file"
        )
        raise InputError(f"{path}: {what}")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image, or a truncated one") from error


def check_packages(*names: str) -> None:
    """Raise InputError where a package that a model's processor needs is missing or broken.

    Args:
        names: of packages; none: all that a video needs.
    """
    for name in names or ("torchvision", "PIL", "jinja2"):
        try:
            __import__(name)
        except ImportError:
            raise InputError(f"a model's processor needs {name}: {_HUB}") from None
        except Exception as error:  # a build of torchvision for another torch
            line = str(error).splitlines()[0]
            raise InputError(f"{name} does not work with this torch ({line}): {_HUB}") from None


def load_processor(
    name: str, *, takes: Sequence[str] = ("video",), trust_remote_code: bool = False
) -> Any:
    """The processor of a folder or hub id; of a text model its tokenizer.

    Args:
        takes: what the question is about, of "video" and "image"; () for text.

    Raises:
        InputError: there is none, it does not take that, or a package is missing.
    """
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    if takes:
        check_packages()
    with one_line(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    if not _sees(config):
        if takes:
            raise InputError(
                f"{name}: takes no {takes[0]} ({config.model_type}); expected an "
                "image-text-to-text model"
            )
        check_packages("jinja2")
        with one_line(name):
            return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    check_packages()
    with one_line(name):
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    for kind in takes:
        if getattr(processor, f"{kind}_processor", None) is None:
            raise InputError(f"{name}: its processor takes no {kind} ({type(processor).__name__})")
    if not getattr(processor, "chat_template", None):
        raise InputError(f"{name}: has no chat template, so it is unknown how to ask it")
    return processor


def load_model(
    name: str, *, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The model of a folder or hub id, ready to generate.

    Args:
        dtype: "auto" (as it was saved), "float32", "bfloat16", "float16".
        device: None: the first CUDA device, else the CPU.

    Raises:
        InputError: there is none that generates text, or no such device.
    """
    import torch
    from transformers import AutoConfig

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    with one_line(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = auto_class(config).from_pretrained(
            name, dtype=dtype, trust_remote_code=trust_remote_code
        )
    return model.to(device).eval()


def auto_class(config: Any) -> Any:
    """What loads a model of this configuration: one that sees where it can, else a text model."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if _sees(config) else AutoModelForCausalLM


def check_device(device: str) -> None:
    """Raise InputError where tensors cannot be put on `device`, such as "cuda:1"."""
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        line = str(error).strip().splitlines()[0]
        raise InputError(f"device {device!r} cannot be used: {line}") from error


def _sees(config: Any) -> bool:
    """Whether a model of this configuration takes images or videos."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    remote = getattr(config, "auto_map", None) or {}
    known = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return known or "AutoModelForImageTextToText" in remote


class one_line:
    """Turns what `from_pretrained` says of a bad model into one line."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if not isinstance(error, (OSError, ValueError, ImportError, KeyError)):
            return
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "trust_remote_code" in str(error):
            line = "runs code of its own; read it, then give --trust-remote-code"
        raise InputError(f"{self.name}: {line}") from error


def make_inputs(processor: Any, clip: Video | None, prompt: str, *, image: Any = None) -> Any:
    """What `model.generate` needs to answer `prompt` about a video, an image, both or none.

    Args:
        processor: of `load_processor`.
        clip: of `read_video`.
        image: of `read_image`.

    Returns:
        transformers' BatchFeature, on the CPU: `input_ids` ``[1, S]`` and what goes with them.

    Raises:
        InputError: the processor cannot make anything of it.
    """
    from jinja2 import TemplateError

    seen: list[dict[str, str]] = []
    options: dict[str, Any] = {}
    if clip is not None:
        seen.append({"type": "video"})
        options |= {
            "videos": [clip.frames],
            "video_metadata": [_metadata(clip)],
            "do_sample_frames": False,  # read_video has
        }
    if image is not None:
        seen.append({"type": "image"})
        options["images"] = [image]
    tokenizer = getattr(processor, "tokenizer", processor)
    if processor is tokenizer:
        options["return_token_type_ids"] = False  # which no decoder takes
    try:
        text = prompt
        if getattr(processor, "chat_template", None):
            content: Any = prompt
            if processor is not tokenizer:
                content = [*seen, {"type": "text", "text": prompt}]
            text = processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
                options["add_special_tokens"] = False  # or it would be there twice
        return processor(text=[text], return_tensors="pt", **options)
    except (ValueError, RuntimeError, TypeError, LookupError, TemplateError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{type(processor).__name__} cannot take this: {line}") from error


def _metadata(clip: Video) -> Any:
    from transformers.video_utils import VideoMetadata

    height, width = clip.frames.shape[1:3]
    return VideoMetadata(
        total_num_frames=clip.total,
        fps=clip.fps,
        width=width,
        height=height,
        duration=clip.seconds,
        video_backend="pyav",
        frames_indices=clip.indices,
    )


def to_model(inputs: Any, model: Any) -> dict[str, Any]:
    """What `make_inputs` made, on the device of `model`, pixels in its dtype.

    Other floats keep theirs: Qwen2.5-VL makes positions from the seconds of a grid's step.
    """

    def moved(name: str, value: Any) -> Any:
        if not hasattr(value, "to"):
            return value
        return value.to(model.device, model.dtype if name.startswith("pixel_values") else None)

    return {name: moved(name, value) for name, value in inputs.items()}

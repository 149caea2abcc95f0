"""A model of the user's and what it needs to answer a question about a video file.

>>> clip = frames.read_video(Path("clip.mp4"), frames=64)
>>> processor = load_processor("Qwen/Qwen2-VL-2B-Instruct")
>>> inputs = make_inputs(processor, clip, "What happens?")
>>> model = load_model("Qwen/Qwen2-VL-2B-Instruct")
>>> model.generate(**to_model(inputs, model))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from std_decode.errors import InputError
from std_decode.frames import Video

_HUB = 'pip install "sparse-to-dense[hub]"'


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


def check_name(name: str) -> None:
    """Raise InputError where a model's name is that of no folder, and of nothing on the hub."""
    path = Path(name)
    if path.is_file():
        raise InputError(f"{name}: a file, expected a model's folder or hub id")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"{name}: has no config.json, expected a folder that save_pretrained has written"
            )
    elif name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or name.endswith("/"):
        raise InputError(f"{name}: no such folder; a hub id is like Qwen/Qwen2-VL-2B-Instruct")


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

    check_name(name)
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
    for token in (getattr(processor, f"{kind}_token", None) for kind in ("video", "image")):
        if isinstance(token, str) and token in prompt:
            raise InputError(
                f"the prompt has {token} in it, where the model's template puts what is shown; "
                "leave it out"
            )
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

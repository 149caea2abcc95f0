"""Files that commands write: checked before the work, replaced in one step after it."""

from __future__ import annotations

import io
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from std_decode.errors import BadInput


class NotWritten(BadInput, OSError):
    """A file that was to be written is not."""


def check_file(option: str, path: Path) -> None:
    """Refuse a path that cannot be written as a file.

    Raises:
        BadInput: it is a folder, in no folder, or in one that takes no files.
    """
    parent = path.resolve().parent
    if path.is_dir() or not (parent.is_dir() or _is_special(path)):
        raise BadInput(f"{option}: {path} cannot be a file: a folder, or in no folder")
    place = path if _is_special(path) else parent
    if not os.access(place, os.W_OK):
        raise BadInput(f"{option}: {path} cannot be written: no permission, or read-only")


def check_picture(option: str, path: Path) -> None:
    """Refuse a picture that cannot be drawn or written.

    Raises:
        BadInput: no PNG, no place for a file, or matplotlib is missing.
    """
    if path.suffix.lower() != ".png":
        raise BadInput(f"{option}: {path} is no PNG, expected a name that ends in .png")
    check_file(option, path)
    if find_spec("matplotlib") is None:
        raise BadInput(
            f'{option} needs matplotlib, which is not installed: pip install "sparse-to-dense'
            '[bench]"'
        )


def replace_file(path: Path, content: bytes) -> None:
    """Replace the file in one step, so that a failure leaves the old one.

    What a link points to is replaced, not the link. A device or a pipe, such as /dev/stdout, is
    written to: to put a file in its place would break it for everybody.

    Raises:
        NotWritten: the disk is full, for example.
    """
    try:
        if _is_special(path):
            path.write_bytes(content)
            return
        place = path.resolve()
        part = place.with_name(f"{place.name}.{os.getpid()}.part")
        try:
            part.write_bytes(content)
            os.replace(part, place)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise NotWritten(f"{path} cannot be written: {error.strerror or error}") from error


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()


def new_figure(width: float, height: float, dpi: int = 100) -> Any:
    """A matplotlib figure of so many inches, without matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    import numpy as np
    from PIL import Image

    figure.canvas.draw()
    # 256 colours do, and the file is a third. matplotlib brings Pillow with it.
    pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB").quantize(256)
    file = io.BytesIO()
    pixels.save(file, "PNG", optimize=True)
    return file.getvalue()

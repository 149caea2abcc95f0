"""4-bit weights in a file, so that a large model need not be quantised at each start.

A safetensors file with the two tensors of each layer, as any device takes them. It is bound to the
weights it was made of by a fingerprint: a hash over a sample of each layer's.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from errno import ENOSPC
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from std_decode.costs.memory import gigabytes
from std_decode.weights.quantize import Quantized
from std_decode.weights.twins import Twins

FORMAT = "std_decode 4-bit weights, 3"
OLDER = tuple(
    f"std_decode 4-bit weights, {number}" for number in (1, 2)
)  # rounded less well; replaced
SAMPLE = 1024  # weights of a layer


def make(model: Any, twins: Twins, path: Path) -> None:
    """Make twins of what the file holds; where it is of other weights or older it is made anew.

    Raises:
        ValueError: the file is damaged or of another kind; it is left as it is.
        MemoryError: see `Twins.make`.
        OSError: it cannot be written; a file that was there is left as it is.
    """
    told = fingerprint(twins)
    if path.exists():
        try:
            with safe_open(path, "pt") as file:
                found = file.metadata() or {}
                if found.get("format") not in (FORMAT, *OLDER):
                    raise ValueError(_unusable(path, "it is of another kind"))
                if found["format"] == FORMAT and found["fingerprint"] == told:
                    twins.make(model, read=lambda name: _read(file, name))
                    return
        except SafetensorError as error:
            raise ValueError(_unusable(path, str(error))) from error
    _check_room(path, twins)
    made: dict[str, Tensor] = {}

    def keep(name: str, quantized: Quantized) -> None:
        made.update(zip(_keys(name), (part.cpu() for part in quantized)))

    twins.make(model, keep=keep)
    _write(path, made, {"format": FORMAT, "fingerprint": told})


def fingerprint(twins: Twins) -> str:
    """Of the weights that twins are made of: names, shapes and a sample of each layer's values."""
    digest = hashlib.sha256()
    for twin in twins.twins:
        weight = twin.whole().detach()
        sample = weight.flatten()[:: max(1, weight.numel() // SAMPLE)].float().cpu()
        digest.update(f"{twin.name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _keys(name: str) -> tuple[str, str]:
    return f"{name}.values", f"{name}.scales"


def _read(file: Any, name: str) -> Quantized:
    values, scales = (file.get_tensor(key) for key in _keys(name))
    return Quantized(values, scales.clone())  # not a view of the file


def _unusable(path: Path, why: str) -> str:
    return (
        f"patch: draft_weights_cache is {str(path)!r}, no file of 4-bit weights ({why}), expected "
        "one that patch has written, or none yet; delete it or name another"
    )


def _check_room(path: Path, twins: Twins) -> None:
    """Raises OSError where the disk is too full, before copies are made for minutes."""
    free = shutil.disk_usage(path.absolute().parent).free
    if twins.planned_bytes > free:
        raise OSError(
            ENOSPC,
            f"patch: draft_weights_cache is {str(path)!r}, a file of "
            f"{gigabytes(twins.planned_bytes)}, expected at most the {gigabytes(free)} free on "
            "its disk; free some, name a file elsewhere, or leave it out",
        )


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Put the file in its place in one step, so that nobody ever reads half of one."""
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".std_decode-") as folder:
        part = Path(folder) / path.name
        try:
            save_file(tensors, part, metadata)
        except SafetensorError as error:  # what writing has run into
            raise OSError(
                f"patch: draft_weights_cache is {str(path)!r}, which could not be written "
                f"({error}); name a file elsewhere, or leave it out"
            ) from error
        os.replace(part, path)

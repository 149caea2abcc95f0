"""Make this process believe in a GPU, for good."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from tests.pretend_gpu.ledger import ROOT, ledger

GUARD = Path(__file__).parent / "guard.cpp"


@cache
def missing() -> str | None:
    """What a pretend GPU needs and this machine lacks, or None."""
    if torch.cuda.is_available():
        return "there is a real GPU"
    if not torch.backends.cuda.is_built() and shutil.which("g++") is None:
        return "a build of torch without CUDA needs g++ for a device guard"
    return None


def _set_guard() -> None:
    if torch.backends.cuda.is_built():
        torch._C._ensureCUDADeviceGuardSet()
        return
    folder = Path(torch.__file__).parent
    library = (
        Path(tempfile.gettempdir()) / f"std-pretend-guard-{torch.__version__}-{os.getuid()}.so"
    )
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{folder / 'include'}", str(GUARD)]
        subprocess.run([*command, f"-L{folder / 'lib'}", "-lc10", "-o", str(part)], check=True)
        part.replace(library)
    ctypes.CDLL(str(library))


def surroundings() -> dict[str, str]:
    """The environment of a process that runs on the pretend GPU, and those that it starts."""
    paths = [str(ROOT), str(Path(__file__).parent / "site"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def install() -> None:
    """Until the process ends. Each variant of a Triton kernel is compiled when it is launched."""
    import torch._dynamo  # knows each function of torch.cuda by name, and no stand-ins

    from std_decode.model import packed
    from tests.pretend_gpu import cuda, driver, tensors

    _set_guard()
    for name, stand_in in cuda.stand_ins().items():
        setattr(torch.cuda, name, stand_in)
    torch.cuda.graphs.graph, torch.profiler.profile = cuda.Capture, cuda.Profile
    for name in ("_cuda_init", "_cuda_endAllocateToPool", "_cuda_releasePool"):
        setattr(torch._C, name, lambda *_: None)
    torch.Generator, torch.Stream = cuda.Generator, cuda.Stream  # of no device
    torch.tensor, torch.as_tensor = tensors.make_tensor, tensors.as_tensor
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    tensors.Mode().__enter__()
    packed.PLAIN.add(tensors.PretendTensor)
    ledger.installed = True
    driver.install()

"""A driver for Triton that binds, specialises and compiles for an H100, and launches nothing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from tests.pretend_gpu import tensors
from tests.pretend_gpu.ledger import ledger

OPS = (
    *("verify_attention", "sparse_attention", "score_keys", "select_topk", "int4_linear"),
    *("add_rms_norm", "rope_write", "silu_mul", "renew_importance"),
)


class Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        sizes = dict(max_shared_mem=232448, multiprocessor_count=132, warpSize=32)
        rates = dict(max_num_regs=65536, sm_clock_rate=1, mem_clock_rate=1, mem_bus_width=1)
        return {**sizes, **rates}

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024


class Launcher:
    """Refuses grids that a GPU would."""

    def __init__(self, source: Any, metadata: Any):
        self.name, self.global_scratch_size = metadata.name, metadata.global_scratch_size
        self.shared = metadata.shared

    def __call__(self, x: int, y: int, z: int, *_: Any) -> None:
        if not (0 < x < 2**31 and 0 < y <= 65535 and 0 < z <= 65535):
            raise RuntimeError(f"CUDA error: invalid argument (grid of {self.name}: {x, y, z})")
        ledger.kernels[self.name] += 1
        ledger.launch(self.name)


class Driver:
    launcher_cls, utils = Launcher, Utils()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda


def install() -> None:
    """Have the ops of std_kernels run their launchers beside their CPU code."""
    import triton
    from triton import knobs

    from std_kernels import _tuning

    def note(*, key: str, fn: Any, **_: Any) -> None:
        if ledger.capturing is not None:
            raise RuntimeError(f"{fn.name} is compiled while a pass is captured")
        ledger.compilations.append((fn.name, key))

    triton.runtime.driver.set_active(Driver())
    knobs.runtime.jit_post_compile_hook = note
    modules = {name: import_module(f"std_kernels._{name}_kernels") for name in OPS}
    for module in (_tuning, *modules.values()):
        if hasattr(module, "arch_of"):
            module.arch_of = lambda device: "sm_90"  # its tensors are on the CPU here
        if hasattr(module, "launches_early"):
            module.launches_early = lambda device: True
    modules["verify_attention_with_scores"] = modules["verify_attention"]
    modules["int4_linear_partials"] = modules["pack_int4"] = modules["int4_linear"]
    tensors.ops.update({name: getattr(module, name) for name, module in modules.items()})

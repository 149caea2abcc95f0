"""Memory, bandwidth and throughput of GPUs, from the vendors' data sheets."""

from __future__ import annotations

from typing import NamedTuple

from std_decode.costs.workload import Device

GIB = 1 << 30


class Gpu(NamedTuple):
    """Peak figures; `device.flops` is dense bfloat16 with float32 accumulation.

    `device.cycles` is multiprocessors (AMD: compute units) times their boost clock.
    """

    memory: int  # in bytes; a data sheet's GB of memory are GiB
    device: Device
    source: str


GPUS = {
    "h200": Gpu(141 * GIB, Device(4.8e12, 989e12), "NVIDIA H200 data sheet, SXM"),
    "h100": Gpu(80 * GIB, Device(3.35e12, 989e12), "NVIDIA H100 data sheet, SXM"),
    "a100": Gpu(
        80 * GIB, Device(2.039e12, 312e12, 108 * 1.41e9), "NVIDIA A100 data sheet, 80 GB SXM"
    ),
    "b200": Gpu(
        180 * GIB, Device(8e12, 2250e12, 148 * 1.85e9), "NVIDIA DGX B200 data sheet, one of 8"
    ),
    "h100-pcie": Gpu(
        80 * GIB, Device(2e12, 756e12, 114 * 1.755e9), "NVIDIA H100 data sheet, PCIe"
    ),
    "h100-nvl": Gpu(94 * GIB, Device(3.9e12, 835e12, 132 * 1.785e9), "NVIDIA H100 NVL data sheet"),
    "l40s": Gpu(48 * GIB, Device(864e9, 362e12, 142 * 2.52e9), "NVIDIA L40S data sheet"),
    "rtx-4090": Gpu(
        24 * GIB, Device(1.008e12, 165e12, 128 * 2.52e9), "NVIDIA Ada architecture whitepaper"
    ),
    "mi300x": Gpu(
        192 * GIB, Device(5.3e12, 1307e12, 304 * 2.1e9), "AMD Instinct MI300X data sheet"
    ),
}


def named(device: str) -> Gpu | None:
    """The GPU that a driver calls ``NVIDIA H100 80GB HBM3``, ``AMD Instinct MI300X``."""
    words = device.lower().replace("-", " ").split()
    best = [name for name in GPUS if all(part in words for part in name.split("-"))]
    # A name alone is that of the SXM module: of the others the driver says what they are.
    special = {"pcie", "nvl", "mig"} & {*words}
    best = [name for name in best if special <= {*name.split("-")}]
    return GPUS[max(best, key=len)] if best else None

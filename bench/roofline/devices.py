"""Memory, bandwidth and throughput of GPUs, from the vendors' data sheets, and of their links."""

from __future__ import annotations

from dataclasses import replace
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
    pcie: int = 5  # generation of its 16 lanes


GPUS = {
    "h200": Gpu(141 * GIB, Device(4.8e12, 989e12), "NVIDIA H200 data sheet, SXM"),
    "h100": Gpu(80 * GIB, Device(3.35e12, 989e12), "NVIDIA H100 data sheet, SXM"),
    "a100": Gpu(
        80 * GIB, Device(2.039e12, 312e12, 108 * 1.41e9), "NVIDIA A100 data sheet, 80 GB SXM", 4
    ),
    "b200": Gpu(
        180 * GIB, Device(8e12, 2250e12, 148 * 1.85e9), "NVIDIA DGX B200 data sheet, one of 8"
    ),
    "h100-pcie": Gpu(
        80 * GIB, Device(2e12, 756e12, 114 * 1.755e9), "NVIDIA H100 data sheet, PCIe"
    ),
    "h100-nvl": Gpu(94 * GIB, Device(3.9e12, 835e12, 132 * 1.785e9), "NVIDIA H100 NVL data sheet"),
    "l40s": Gpu(48 * GIB, Device(864e9, 362e12, 142 * 2.52e9), "NVIDIA L40S data sheet", 4),
    "rtx-4090": Gpu(
        24 * GIB, Device(1.008e12, 165e12, 128 * 2.52e9), "NVIDIA Ada architecture whitepaper", 4
    ),
    "mi300x": Gpu(
        192 * GIB, Device(5.3e12, 1307e12, 304 * 2.1e9), "AMD Instinct MI300X data sheet"
    ),
}


class Link(NamedTuple):
    """How fast what lies outside a GPU comes to it, in bytes/s, as far as that is reached."""

    bandwidth: float
    source: str


LINKS = {
    # github.com/ZaidQureshi/bam/issues/54: of 32 GB/s.
    "pcie4": Link(25e9, "measured peak of an A100's 16 lanes, BaM, ASPLOS 2023"),
    # github.com/tinygrad/open-gpu-kernel-modules/issues/29; NVIDIA/nvbandwidth/issues/6: 57, H100.
    "pcie5": Link(50e9, "nvbandwidth on RTX 5090s: 56 GB/s, 51 while data go back as well"),
    # FlexLLMGen, which offloads to them, counts with 2 to 7 GB/s.
    "nvme": Link(6e9, "an SSD sold as 7.45 GB/s, Samsung 990 PRO, of which 80% are reached"),
}


def linked(gpu: Gpu, link: str, efficiency: float = 1.0) -> Device | None:
    """What bounds a GPU behind a link, an SSD's data too; None: its own PCIe is older."""
    own = f"pcie{gpu.pcie}"
    if link > own and link != "nvme":
        return None
    bandwidth = LINKS[own if link == "nvme" else link].bandwidth
    device = replace(gpu.device, bandwidth=efficiency * gpu.device.bandwidth)
    return replace(device, link=bandwidth)


def named(device: str) -> Gpu | None:
    """The GPU that a driver calls ``NVIDIA H100 80GB HBM3``, ``AMD Instinct MI300X``."""
    words = device.lower().replace("-", " ").split()
    best = [name for name in GPUS if all(part in words for part in name.split("-"))]
    # A name alone is that of the SXM module: of the others the driver says what they are.
    special = {"pcie", "nvl", "mig"} & {*words}
    best = [name for name in best if special <= {*name.split("-")}]
    return GPUS[max(best, key=len)] if best else None

"""Memory, bandwidth and throughput of GPUs, from the vendors' data sheets."""

from __future__ import annotations

from typing import NamedTuple

from std_decode.cost import Device

GIB = 1 << 30


class Gpu(NamedTuple):
    """Peak figures; `device.flops` is dense bfloat16 with float32 accumulation."""

    memory: int  # in bytes; a data sheet's GB of memory are GiB
    device: Device
    source: str


GPUS = {
    "h200": Gpu(141 * GIB, Device(4.8e12, 989e12), "NVIDIA H200 data sheet, SXM"),
    "h100": Gpu(80 * GIB, Device(3.35e12, 989e12), "NVIDIA H100 data sheet, SXM"),
    "a100": Gpu(80 * GIB, Device(2.039e12, 312e12), "NVIDIA A100 data sheet, 80 GB SXM"),
    "b200": Gpu(180 * GIB, Device(8e12, 2250e12), "NVIDIA DGX B200 data sheet, one of 8"),
    "l40s": Gpu(48 * GIB, Device(864e9, 362e12), "NVIDIA L40S data sheet"),
    "rtx-4090": Gpu(24 * GIB, Device(1.008e12, 165e12), "NVIDIA Ada architecture whitepaper"),
    "mi300x": Gpu(192 * GIB, Device(5.3e12, 1307e12), "AMD Instinct MI300X data sheet"),
}

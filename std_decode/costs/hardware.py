"""What bounds a step on the GPU that is there."""

from __future__ import annotations

import math

import torch

from std_decode.costs.workload import Device

# Where the driver does not say, or says it of another kind of memory: an H100's (SXM).
H100 = Device(3.35e12, 989e12)


def gpu(device: torch.device) -> Device:
    """Peak bandwidth and cycles of a CUDA device, by its driver: all that batch 1 asks for."""
    found = torch.cuda.get_device_properties(device)
    clocks = [getattr(found, name, 0) for name in ("memory_clock_rate", "clock_rate")]  # kHz
    width = getattr(found, "memory_bus_width", 0)
    if torch.version.hip is not None or not all((*clocks, width)):
        return H100
    memory, core = (1e3 * clock for clock in clocks)
    # Two bits a cycle and line.
    return Device(2 * memory * width / 8, math.inf, found.multi_processor_count * core)

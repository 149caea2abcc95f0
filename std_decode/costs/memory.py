"""How much memory there is to be had."""

from __future__ import annotations

import os

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device, those that PyTorch holds unused included."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):  # macOS, Windows: what is there stands in for what is free
        pages = getattr(os, "sysconf", lambda name: 1 << 20)
        return pages("SC_PHYS_PAGES") * pages("SC_PAGE_SIZE")


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"

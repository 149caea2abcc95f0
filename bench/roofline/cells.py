"""The cells that were asked of `bench roofline`."""

from __future__ import annotations

import argparse
from dataclasses import replace

from bench.models.dimensions import SHAPES
from bench.roofline.devices import GPUS
from bench.roofline.predictions import Cell, fewest_gpus
from std_decode.costs.workload import Device


def make_cell(options: argparse.Namespace, model: str, gpu: str, batch: int, context: int) -> Cell:
    """Of so many GPUs as were asked for, or as it takes."""
    peak = GPUS[gpu].device
    device = Device(options.efficiency * peak.bandwidth, peak.flops, peak.cycles)
    cell = Cell(SHAPES[model], device, 1, batch, context, options.top_k_keys)
    return replace(cell, gpus=options.tensor_parallel or fewest_gpus(cell, GPUS[gpu]))

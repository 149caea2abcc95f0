"""How long 4-bit copies take to make, beside plain rounding between the ends of a range."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any

from bench.arguments import between, new_parser

_HELP = """\
Times quantising on the CPU, in seconds of CPU time on one thread: the plain way, whose scale and
zero come from the least and the greatest weight of a group, and the library's, by turns in one
process. Then a whole model, of which the library also takes the moments of the layers' inputs: the
pretrained one of bench real where it is installed, else the demo model. A ratio is the median of
the turns' ratios.

Run it where nothing else runs: a shared cache makes both slower, and not alike.
Exit status: 0."""
_EXAMPLES = """\
examples:
  python -m bench quantizing                     a minute on one core
  python -m bench quantizing --turns 5"""
SIZES = ((4096, 4096), (1536, 576), (576, 1536))


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands, "quantizing", "how long 4-bit copies take to make", _HELP, _EXAMPLES
    )
    turns = between(int, 1, 1000)
    parser.add_argument(
        "--turns", type=turns, default=9, metavar="N", help="each way is timed (default 9)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.table import Table

    from std_decode.weights.quantize import quantize

    torch.set_num_threads(1)
    table = Table("what", "plain, ms", "ours, ms", "ours / plain")
    for rows, columns in SIZES:
        torch.manual_seed(0)
        weight, squares = torch.randn(rows, columns), torch.rand(columns) + 0.5
        squares /= squares.mean()
        about = squares, 0.3 * torch.randn(columns)
        found = _by_turns(
            options.turns, lambda: plain(weight), lambda: quantize(weight, *about)
        )  # fmt: skip
        table.add_row(f"[{rows}, {columns}]", *found)
    name, model = _model()
    with torch.no_grad():
        found = _by_turns(max(1, options.turns // 3), *_whole(model))
    table.add_row(f"{name}, moments included", *found)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


def plain(weight: Any) -> Any:
    """Values and scales of a weight ``[N, K]``, as `std_decode.weights.quantize.Quantized`."""
    import torch

    from std_decode.weights.quantize import Quantized, group_size

    group = group_size(weight.shape[1])
    assert group is not None
    groups = weight.detach().float().unflatten(1, (-1, group))
    least, most = groups.aminmax(dim=-1)
    scale = ((most - least) / 15).clamp(min=1e-8).bfloat16()
    zero = (least + 8 * scale.float()).bfloat16()
    q = (groups - zero.float()[..., None]).div_(scale.float()[..., None]).add_(8)
    q = q.round_().clamp_(0, 15).to(torch.uint8).flatten(1)
    values = q[:, ::2] << 4 | q[:, 1::2]
    return Quantized(values, torch.stack((scale, zero), -1).transpose(0, 1).contiguous())


def _whole(model: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    from std_decode.weights.moments import input_moments
    from std_decode.weights.quantize import quantize
    from std_decode.weights.twins import Twins

    twins = Twins(model).twins

    def ours() -> None:
        moments = input_moments(model, [twin.layer for twin in twins])
        for twin in twins:
            quantize(twin.weight, *moments[twin.layer], twin.group)

    return lambda: [plain(twin.weight) for twin in twins], ours


def _model() -> tuple[str, Any]:
    import torch

    from bench.models import pretrained
    from std_decode.demo.model import FOLDER, load_model

    if pretrained.installed():
        return pretrained.NAME, pretrained.load(torch.float32)[1]
    return "the demo model", load_model(FOLDER)


def _by_turns(turns: int, *ways: Callable[[], Any]) -> list[str]:
    """Milliseconds of each of two ways, and the ratio of the second to the first."""
    times: list[list[float]] = []
    for way in ways:
        way()  # what is done once only
    for _ in range(turns):
        times.append([])
        for way in ways:
            start = process_time()
            way()
            times[-1].append(1e3 * (process_time() - start))
    first, second = zip(*times)
    ratio = median(b / a for a, b in times)
    return [f"{median(first):.1f}", f"{median(second):.1f}", f"{ratio:.2f}"]

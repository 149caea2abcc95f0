"""`bench quantizing`: that it times the rounding it says, in turns. No time is checked."""

import torch

from bench import quantizing
from bench.__main__ import main
from bench.models import pretrained
from std_decode.weights import quantize


def test_every_size_and_a_whole_model(monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "installed", lambda: False)
    monkeypatch.setattr(quantizing, "SIZES", ((48, 128), (16, 64)))
    assert main(["quantizing", "--turns", "2"]) == 0
    told = capsys.readouterr().out
    assert "[48, 128]" in told and "[16, 64]" in told
    assert "the demo model, moments included" in told


def test_the_plain_way_is_between_the_ends_of_a_range():
    torch.manual_seed(0)
    weight = torch.randn(48, 384)
    found = quantizing.plain(weight)
    groups = weight.unflatten(1, (-1, found.group))
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (quantize.dequantize(found) - weight).unflatten(1, (-1, found.group)).abs()
    assert (error <= (0.5 * step + 2**-7 * groups.abs().amax(-1))[..., None]).all()
    ours = quantize.dequantize(quantize.quantize(weight)) - weight
    assert ours.square().mean() < 0.95 * error.square().mean()


def test_ratios_are_of_turns(monkeypatch):
    clock = iter([0, 1, 1, 3, 3, 5, 5, 6, 6, 7, 7, 10])  # 1 and 2, 2 and 1, 1 and 3 seconds
    monkeypatch.setattr(quantizing, "process_time", lambda: next(clock))
    calls = []
    found = quantizing._by_turns(3, lambda: calls.append("a"), lambda: calls.append("b"))
    assert found == ["1000.0", "2000.0", "2.00"] and calls == list("abababab")

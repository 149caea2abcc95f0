"""`bench roofline`: figures against arithmetic by hand, weights against the models themselves."""

import io
import itertools
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.models import build
from bench.models.dimensions import FOUR_BIT_BYTES, SHAPES, Shape
from bench.roofline import expected, sweep
from bench.roofline.devices import GIB, GPUS, named
from bench.roofline.measured import efficiency
from bench.roofline.predictions import Cell
from std_decode.costs.expected import EXPECTED, UNFUSED, most_four_bit_rows
from std_decode.costs.workload import Device
from std_decode.rounds.policy import COMPILED_LENGTHS, LENGTHS
from std_decode.weights.draft_weights import MOST_ROWS, workload_of

RESULTS = Path(__file__).parents[2] / "bench" / "results"
# Qwen2-VL-7B: what a step reads of the weights, a 4-bit draft of them, a cached token.
QUANTIZED = 28 * (3584 * (2 * 3584 + 2 * 512) + 3 * 3584 * 18944) + 3584 * 152064
SMALL = 28 * (2 * 3584 + 3584 + 2 * 512) + 3584
WEIGHTS = 2 * (QUANTIZED + SMALL)
FOUR_BIT = QUANTIZED * (0.5 + 4 / 128) + 2 * SMALL
KV = 57344
H200 = 4.8e12


@pytest.fixture
def predict(tmp_path):
    """``predict("--batch", "8")``: the records by model, batch, context and way to decode."""

    def call(*arguments):
        path = tmp_path / "figures.json"
        assert main(["roofline", *arguments, "--json", str(path)]) == 0
        found = json.loads(path.read_text())
        assert found["status"] == "PREDICTED, not measured"
        names = ("model", "batch", "context", "what")
        return {tuple(one[name] for name in names): one for one in found["predictions"]}

    return call


def of(found, what, model="qwen2-vl-7b", batch=1, context=25000):
    return found[model, batch, context, what]


def test_a_step_and_a_round_in_bytes(predict, capsys):
    found = predict("--batch", "8", "--draft-length", "3", "--gpu", "h200")
    dense, bf16, four = (of(found, what, batch=8) for what in ("dense", *sweep.WAYS.values()))
    step = (WEIGHTS + 8 * 25000 * KV) / H200
    assert dense["ms_per_step"] == pytest.approx(1e3 * step)
    assert dense["tokens_per_s"] == pytest.approx(8 / step)
    for record, weights in ((bf16, WEIGHTS), (four, FOUR_BIT)):
        seconds = 3 * (weights + 8 * 1024 * KV) / H200 + step
        assert record["ms_per_step"] == pytest.approx(1e3 * seconds)
        assert record["tokens_per_step"] == pytest.approx(1 + 0.9 + 0.81 + 0.729)
        assert record["tokens_per_s"] == pytest.approx(8 * 3.439 / seconds)
        assert record["speedup"] == pytest.approx(3.439 * step / seconds)
    shown = capsys.readouterr().out
    assert "PREDICTED, not measured" in shown and "1.27x" in shown and "4.8 TB/s" in shown


def test_the_best_draft_length_is_the_best(predict):
    best = predict("--acceptance", "0.8", "--batch", "8", "32")
    for length in (*range(1, 20), 63):
        one = predict("--acceptance", "0.8", "--batch", "8", "32", "--draft-length", str(length))
        for key, record in one.items():
            if key[-1] != "dense":
                assert record["draft_length"] == length
                assert record["speedup"] <= best[key]["speedup"]
                if length == best[key]["draft_length"]:
                    assert record["speedup"] == best[key]["speedup"] > 1


def test_no_drafts_are_better_than_drafts_that_lose(predict, capsys):
    record = of(predict(), "bf16 drafts")
    assert record["draft_length"] == 0 and record["speedup"] == 1
    assert record["drafting_length"] == 1 and 0.99 < record["drafting_speedup"] < 1
    assert "do not draft: 1 would be 0.99x" in capsys.readouterr().out
    forced = of(predict("--draft-length", "1"), "bf16 drafts")
    assert forced["draft_length"] == 1 and forced["speedup"] == record["drafting_speedup"]


def qwen(rows, context, gpu="h200", shape="qwen2-vl-7b"):
    return Cell(SHAPES[shape], GPUS[gpu].device, 1, rows, context, 1024)


CELLS = ((1, 25000), (8, 25000), (32, 25000), (1, 131072))
# Of a sum over every kernel of Qwen2-VL-7B, 4-bit drafts, by GPU and acceptance.
GAINS = {
    ("h200", 0.9): (1.44, 1.50, 2.03, 1.70),
    ("h100", 0.9): (1.71, 1.79, 2.33, 2.03),
    ("h200", 0.8): (1.26, 1.29, 1.65, 1.43),
    ("h200", 0.6): (1.07, 1.09, 1.27, 1.16),
}


@pytest.mark.parametrize(("gpu", "acceptance"), GAINS)
def test_what_is_expected_is_what_a_longer_sum_comes_to(gpu, acceptance):
    for cell, gain in zip(CELLS, GAINS[gpu, acceptance], strict=True):
        found = expected.drafting(qwen(*cell, gpu), True, acceptance)
        assert found.speedup == pytest.approx(gain, rel=0.025), cell


def test_expected_tokens_a_second_and_steps():
    for (rows, context), speed in zip(CELLS, (297, 1606, 3975, 266), strict=True):
        found = expected.drafting(qwen(rows, context), True, 0.9)
        assert rows * found.tokens / found.seconds == pytest.approx(speed, rel=0.025)
    for gpu, rows, dense, verify, draft in (
        ("h200", 1, 4.80, 4.86, 2.14),
        ("h100", 1, 6.58, 6.64, 2.22),
        ("h200", 8, 7.42, 7.68, 3.07),
        ("h200", 32, 16.30, 17.45, 3.82),
    ):
        cell = qwen(rows, 25000, gpu)
        assert expected.dense_seconds(cell) == pytest.approx(1e-3 * dense, rel=0.03)
        assert expected.dense_seconds(cell, 5) == pytest.approx(1e-3 * verify, rel=0.03)
        assert expected.draft_seconds(cell, True) == pytest.approx(1e-3 * draft, rel=0.03)


@pytest.mark.parametrize(
    ("cell", "gain", "tokens_per_s"),
    [*zip(CELLS, (1.00, 1.12, 1.20, 1.07), (149, 946, 2067, 130), strict=True)],
)
def test_layers_as_transformers_has_them_are_expected_to_gain_less(cell, gain, tokens_per_s):
    """And PyTorch's 4-bit product: the same longer sum of those."""
    found = expected.drafting(qwen(*cell), True, 0.9, by=UNFUSED)
    assert found.speedup == pytest.approx(gain, abs=0.025)
    assert cell[0] * found.tokens / found.seconds == pytest.approx(tokens_per_s, rel=0.06)
    if cell == (1, 25000):
        assert found.drafts == 0
        for gpu, draft in (("h200", 5.64e-3), ("h100", 5.66e-3)):
            took = expected.draft_seconds(qwen(*cell, gpu), True, UNFUSED)
            assert took == pytest.approx(draft, rel=0.01)


def test_32_rows_draft_with_whole_weights_only_where_4_bit_ones_are_read_twice():
    for by, better in ((UNFUSED, False), (EXPECTED, True)):
        whole, four_bit = (expected.drafting(qwen(32, 25000), x, 0.9, by=by) for x in (0, 1))
        assert (four_bit.speedup > 1.1 * whole.speedup) == better
        assert (whole.speedup > 1.1 * four_bit.speedup) != better
    assert most_four_bit_rows(GPUS["h200"].device, UNFUSED) == 16
    assert most_four_bit_rows(GPUS["h200"].device) == MOST_ROWS["cuda"] == 32
    # Above that a draft multiplies whole weights, and is as long.
    assert expected.draft_seconds(qwen(33, 25000), True) == pytest.approx(
        expected.draft_seconds(qwen(33, 25000), False)
    )


def test_the_two_lengths_that_are_compiled():
    """Of all pairs the best at worst, and within 0.2% of the best on average."""
    shares = {pair: [] for pair in itertools.combinations(LENGTHS, 2)}
    cells = [*CELLS, (8, 100_000)]
    chances = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    for (rows, context), gpu, shape, chance, four_bit in itertools.product(
        cells, ("h200", "h100", "a100"), ("qwen2-vl-7b", "qwen3-vl-8b"), chances, (False, True)
    ):
        cell = qwen(rows, context, gpu, shape)
        gains = {n: expected.drafting(cell, four_bit, chance, n).speedup for n in range(1, 33)}
        most = max(1.0, *gains.values())
        for pair, found in shares.items():
            found.append(max(1.0, *(gains[n] for n in pair)) / most)
    worst = {pair: min(found) for pair, found in shares.items()}
    means = {pair: sum(found) / len(found) for pair, found in shares.items()}
    assert worst[COMPILED_LENGTHS] == max(worst.values()) > 0.88
    assert means[COMPILED_LENGTHS] > max(means.values()) - 0.002


def kernel_records(ms):
    """As `bench kernels` has them of Qwen2-VL-7B on an H200 that copies 4 TB/s."""

    def record(op, what, ms, size="", **given):
        return dict(
            kind="kernel", op=op, what=what, shape="qwen2-vl-7b", status="ok", cold_ms=ms,
            size=size, **{"batch": 1, "context": 0, "bytes": 1, "of_copy": 0.5, **given},
        )  # fmt: skip

    yield record("copy", "copy", 1.0, gb_per_s=4000.0)
    yield record("verify_attention", "ours", 1.0, bytes=9, of_copy=0.8)
    yield record("verify_attention", "ours", 1.0, bytes=8, of_copy=0.1)
    yield record("verify_attention", "sdpa-flash", 1.0, bytes=99, of_copy=0.95)
    yield record("int4_linear", "dense-weights", ms["whole"], "1 x [1000, 8000]")
    yield record("int4_linear", "ours", ms["one"], "1 x [1000, 8000]")
    yield record("int4_linear", "ours", ms["tile"], "32 x [1000, 8000]", batch=32)
    yield record("select_topk", "ours", 0.1, context=100_000)
    yield record("sparse_attention", "ours", 1.0) | {"status": "failed: no such kernel"}


def test_what_a_gpu_measured_takes_the_place_of_what_was_predicted(tmp_path):
    about = {"kind": "environment", "device": "NVIDIA H200", "driver": "1", "dtype": "bfloat16"}
    launch = 1e3 * EXPECTED.launch
    ms = {"whole": 0.05 + launch, "one": 0.02 + launch, "tile": 0.04 + launch}
    passes = [
        dict(kind="pass", what="ours, dense", status="ok", kernels=308, layers=28, **{"pass": x})
        for x in ("dense", "step")
    ]
    for name, records in (("kernels-h200", [*kernel_records(ms)]), ("decode-h200", passes)):
        lines = map(json.dumps, [about, *records])
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = efficiency("h200", tmp_path)
    assert found.copy == pytest.approx(4000 / 4800)
    assert found.product == pytest.approx(2 * 8e6 / 50e-6 / 4e12)
    cycles = GPUS["h200"].device.cycles
    assert found.weight == pytest.approx(20e-6 / 8e6 * cycles)
    assert found.weight_tile == pytest.approx(40e-6 / 8e6 * cycles)
    assert found.attention == 0.8 and found.gather == EXPECTED.gather
    assert found.dense_launches == 11 and found.verify_launches == EXPECTED.verify_launches
    took = 100e-6 - EXPECTED.select_launches * EXPECTED.launch
    assert found.select_key == pytest.approx(took * cycles / (112 * 100_000))
    assert efficiency("h100", tmp_path) == EXPECTED  # of another GPU


def test_no_more_is_expected_than_the_roofline_allows(predict):
    for record in predict(
        "--model", "all", "--batch", "1", "32", "512", "--context", "8000"
    ).values():
        if record["what"] != "dense":
            assert record["expected_speedup"] <= record["speedup"] + 1e-9, record


class AsDesigned(Shape):
    """As the first table of ceilings counts: the embedding is read too, 4-bit weights are 28%."""

    def weight_bytes(self, tokens, four_bit=False):
        return 0.28 * 15.2e9 if four_bit else 15.2e9


def test_the_first_table_of_ceilings():
    given = SHAPES["qwen2-vl-7b"]
    fields = (given.family, given.hidden, given.layers, given.heads, given.kv_heads)
    shape = AsDesigned(*fields, given.intermediate, given.vocabulary)
    only_bytes = Device(H200, float("inf"))
    for batch, context, bf16, four_bit in [
        (1, 25000, 0.99, 2.04),
        (8, 25000, 1.25, 2.54),
        (8, 100000, 2.05, 3.88),
        (32, 25000, 1.95, 3.42),
        (32, 100000, 3.69, 5.58),
    ]:
        cell = Cell(shape, only_bytes, 1, batch, context, 1024)
        assert round(cell.drafting(False, 0.9).speedup, 2) == bf16
        assert round(cell.drafting(True, 0.9).speedup, 2) == four_bit


@pytest.mark.parametrize("arguments", [[], ["--draft-length", "6"], ["--gpu", "a100"]])
def test_where_it_starts_to_pay(predict, arguments):
    start = of(predict(*arguments, "--batch", "4"), "bf16 drafts", batch=4)
    context, batch = start["pays_from_context"], start["pays_from_batch"]
    around = predict(*arguments, "--batch", "4", "--context", str(context - 1), str(context))
    before, at = (
        of(around, "bf16 drafts", batch=4, context=context - i)["drafting_speedup"] for i in (1, 0)
    )
    assert before <= 1 < at
    around = predict(*arguments, "--batch", str(batch - 1), str(batch))
    before, at = (of(around, "bf16 drafts", batch=batch - i)["drafting_speedup"] for i in (1, 0))
    assert before <= 1 < at


def test_where_it_pays_anywhere_and_nowhere(predict, capsys):
    found = predict()
    assert of(found, "4-bit drafts")["pays_from_context"] == 1
    never = of(predict("--acceptance", "0"), "bf16 drafts")
    assert never["pays_from_context"] is None and never["pays_from_batch"] is None
    shown = capsys.readouterr().out
    assert " any " in shown and "not up to 4,194,304" in shown


def test_efficiency_is_of_the_bandwidth(predict):
    full, half = predict(), predict("--efficiency", "0.5")
    for key in full:
        assert half[key]["ms_per_step"] == pytest.approx(2 * full[key]["ms_per_step"])


def test_a_large_batch_waits_for_multiplications(predict):
    given = ["--batch", "256", "--context", "100", "--draft-length", "4"]
    found = predict(*given, "--gpu", "l40s")
    active = QUANTIZED + SMALL
    attention = 2 * 28 * 3584 * 100  # a key and a value of each of 100 tokens
    draft = 2 * 256 * (active + attention) / 362e12
    verify = 5 * draft
    record = of(found, "4-bit drafts", batch=256, context=100)
    assert record["ms_per_step"] == pytest.approx(1e3 * (4 * draft + verify))
    slower = predict(*given, "--gpu", "l40s", "--efficiency", "0.99")
    again = of(slower, "4-bit drafts", batch=256, context=100)
    assert again["ms_per_step"] == record["ms_per_step"]


def test_gpus_share(predict):
    one, four = predict(), predict("--tensor-parallel", "4")
    for key in one:
        assert four[key]["ms_per_step"] == pytest.approx(one[key]["ms_per_step"] / 4)
        assert four[key]["speedup"] == pytest.approx(one[key]["speedup"])
        assert four[key]["needed_bytes"] == one[key]["needed_bytes"] and four[key]["gpus"] == 4
    # More GPUs than KV heads keep copies of the cache.
    large = ["--model", "llava-onevision-72b", "--tensor-parallel"]
    eight, sixteen = (of(predict(*large, n), "dense", large[1]) for n in ("8", "16"))
    assert sixteen["needed_bytes"] - eight["needed_bytes"] == 25000 * 327680


def test_what_does_not_fit_is_said(predict, capsys):
    found = predict("--model", "qwen2-vl-72b", "--batch", "1", "64")
    assert not any(record["fits"] for record in found.values())
    assert "does not fit: 154 GB into 136 GB" in capsys.readouterr().out
    found = predict("--model", "qwen2-vl-72b", "--batch", "1", "64", "--tensor-parallel", "fit")
    assert of(found, "dense", "qwen2-vl-72b")["gpus"] == 2
    assert of(found, "dense", "qwen2-vl-72b", batch=64)["gpus"] == 8
    assert all(record["fits"] for record in found.values())
    # 28 heads cannot be shared by 8.
    given = ["--batch", "4096", "--tensor-parallel", "fit"]
    assert of(predict(*given), "dense", batch=4096)["gpus"] == 4
    # The 4-bit copy takes memory too.
    found = predict("--gpu", "rtx-4090", "--context", "100000")
    limit = 0.9 * 24 * GIB
    for what, needed in (("bf16 drafts", 15.23e9), ("4-bit drafts", 15.23e9 + FOUR_BIT)):
        record = of(found, what, context=100000)
        assert record["needed_bytes"] == pytest.approx(needed + 100000 * KV, rel=1e-3)
        assert record["fits"] == (needed + 100000 * KV <= limit)
    assert of(found, "bf16 drafts", context=100000)["fits"]


def built(shape):
    cls, config = build.model_class_and_config(shape)
    with torch.device("meta"):
        return cls._from_config(config, dtype=torch.bfloat16)


def text_parameters(model):
    named = {id(p): p for p in model.get_decoder().parameters()}
    head = model.get_output_embeddings().weight
    return list({**named, id(head): head}.values())


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_those_of_the_model(name):
    """Of two layers, or of four kinds of which one attends; the next test counts them all."""
    shape = replace(SHAPES[name], layers=2 if SHAPES[name].recurrent is None else 4)
    model = built(shape)
    weights = text_parameters(model)
    assert shape.parameters == sum(weight.numel() for weight in weights)
    table = model.get_input_embeddings().weight
    read = [weight for weight in weights if weight is not table]
    everything = 10**9  # so many tokens take every expert
    assert shape.weight_bytes(everything) == 2 * sum(weight.numel() for weight in read)
    small = [(shape.experts, shape.hidden), (1, shape.hidden)]  # a router, and a gate

    def is_large(weight):
        return weight.ndim > 1 and tuple(weight.shape) not in small and weight.shape[1] > 1

    large = [w for w in read if is_large(w)]
    four_bit = sum(w.numel() * (FOUR_BIT_BYTES if is_large(w) else 2) for w in read)
    assert large and shape.weight_bytes(everything, True) == pytest.approx(four_bit, rel=1e-12)
    copy = sum(w.numel() for w in large) * FOUR_BIT_BYTES
    assert shape.stored_bytes(True) - shape.stored_bytes(False) == pytest.approx(copy, rel=1e-12)
    config = model.config.get_text_config()
    heads, dim = config.num_key_value_heads, config.head_dim
    layers = model.get_decoder().layers
    attending = len(layers) - sum(hasattr(layer, "linear_attn") for layer in layers)
    assert shape.kv_values == attending * 2 * heads * dim
    assert heads * dim == layers[-1].self_attn.k_proj.out_features
    work, cell = workload_of(model, 1024), Cell(shape, Device(1, 1), 1, 1, 1, 1024).workload(0)
    for name in ("kv_bytes", "state_bytes", "layers", "kv_heads"):
        assert getattr(work, name) == getattr(cell, name)


@pytest.mark.parametrize(
    "name, billions",  # of the language models that they were made from, as their makers say
    [
        ("qwen2-vl-7b", 7.61), ("qwen2-vl-72b", 72.7), ("llava-onevision-7b", 7.61),
        ("llava-onevision-72b", 72.7), ("qwen2.5-vl-7b", 7.61), ("qwen2.5-vl-32b", 32.8),
        ("qwen2.5-vl-72b", 72.7), ("qwen3-vl-8b", 8.19), ("qwen3-vl-32b", 32.8),
        ("qwen3-vl-30b-a3b", 30.5), ("internvl3-8b", 7.61), ("internvl3-38b", 32.8),
        ("internvl3-78b", 72.7), ("llama-3-8b", 8.03), ("llava-next-video-7b", 6.74),
        # 27.78 and 35.95 with a vision tower and a layer that predicts further tokens.
        ("qwen3.5-27b", 26.9), ("qwen3.5-35b-a3b", 34.66),
    ],
)  # fmt: skip
def test_models_have_as_many_weights_as_their_makers_say(name, billions):
    assert SHAPES[name].parameters / 1e9 == pytest.approx(billions, rel=1.5e-3)


def test_every_model_is_counted():
    (mark,) = (m for m in test_models_have_as_many_weights_as_their_makers_say.pytestmark)
    assert {name for name, _ in mark.args[1]} == {*SHAPES} - {"tiny"}


def test_active_weights_of_experts():
    shape = SHAPES["qwen3-vl-30b-a3b"]
    embedding = 151936 * 2048
    assert (shape.active + embedding) / 1e9 == pytest.approx(3.35, rel=5e-3)  # "3.3B activated"
    assert shape.weight_bytes(1) == pytest.approx(2 * shape.active)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_experts_that_a_pass_reads(tokens):
    """All the ways in which tokens can choose 2 of 4."""
    shape = Shape(
        "qwen3_vl_moe", 64, 1, 4, 2, 96, 128, head_dim=16, experts=4, experts_per_token=2
    )
    choices = list(itertools.product(itertools.combinations(range(4), 2), repeat=tokens))
    read = sum(len(set(itertools.chain(*choice))) for choice in choices) / len(choices)
    none = replace(shape, experts_per_token=0).weight_bytes(tokens)
    assert shape.weight_bytes(tokens) - none == pytest.approx(2 * read * 3 * 64 * 96)


def test_verification_reads_more_experts_than_a_step(predict):
    shape = SHAPES["qwen3-vl-30b-a3b"]
    found = predict("--model", "qwen3-vl-30b-a3b", "--draft-length", "4")
    drafts = 4 * (shape.weight_bytes(1) + 1024 * 98304)
    verification = shape.weight_bytes(5) + 25000 * 98304
    assert shape.weight_bytes(5) > 2.5 * shape.weight_bytes(1)
    milliseconds = of(found, "bf16 drafts", "qwen3-vl-30b-a3b")["ms_per_step"]
    assert milliseconds == pytest.approx(1e3 * (drafts + verification) / H200)


def test_gpus_are_those_of_the_data_sheets():
    ridges = {name: gpu.device.flops / gpu.device.bandwidth for name, gpu in GPUS.items()}
    # Multiplications a byte: a slip of a power of ten, or a sparse figure, is far off.
    assert all(150 < ridge < 430 for ridge in ridges.values())
    sizes = [GPUS[name].memory / GIB for name in ("h200", "h100", "a100", "l40s", "rtx-4090")]
    assert sizes == [141, 80, 80, 48, 24]


@pytest.mark.parametrize(
    "device, name",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("AMD EPYC", None),
    ],
)
def test_a_gpu_is_known_by_what_its_driver_calls_it(device, name):
    assert named(device) == (name and GPUS[name])


def test_the_map(tmp_path, predict, capsys):
    from PIL import Image

    given = ["--batch", "1", "64", "--context", "4000", "512000"]
    assert main(["roofline", *given, "--sweep", "--out", str(tmp_path)]) == 0
    assert "bf16 drafts: 0.96x to 7.57x; 1 of 4 cells do not fit" in capsys.readouterr().out
    found = json.loads((tmp_path / "roofline-qwen2-vl-7b-h200.json").read_text())
    assert found["status"] == "PREDICTED, not measured"
    table = predict(*given)
    for way in sweep.WAYS.values():
        for row, column in itertools.product((0, 1), (0, 1)):
            batch, context = found["batch"][row], found["context"][column]
            record = of(table, way, batch=batch, context=context)
            panel = {name: values[row][column] for name, values in found[way].items()}
            assert panel["fits"] == record["fits"]
            assert panel["draft_length"] == record["drafting_length"]
            assert panel["speedup"] == pytest.approx(record["drafting_speedup"], abs=1e-4)
    with Image.open(tmp_path / "roofline-qwen2-vl-7b-h200.png") as picture:
        assert min(picture.size) > 200
    assert not list(tmp_path.glob("*.part"))


def test_the_picture_shows_speedups_and_what_does_not_fit(monkeypatch):
    from matplotlib.axes import Axes
    from PIL import Image

    written, hatched, lines = [], [], []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **_: written.append((x, y, text)))
    monkeypatch.setattr(Axes, "add_patch", lambda self, patch: hatched.append(patch))
    monkeypatch.setattr(Axes, "contour", lambda self, values, level, **_: lines.extend(level))
    options = options_of(["--batch", "1", "64", "--context", "4000", "512000"])
    found = sweep.numbers(options, "qwen2-vl-7b", "h200")
    picture = sweep.picture(options, found)
    assert (1, 0, "1.78") in written and (0, 0, "0.96") in written and len(written) == 8
    boxes = [patch for patch in hatched if patch.get_hatch()]
    assert [patch.get_xy() for patch in boxes] == [(0.5, 0.5), (0.5, 0.5)]
    assert lines == [
        1,
        1.5,
        2,
    ]  # all in the first panel; the second is above 2x everywhere
    with Image.open(io.BytesIO(picture)) as image:
        assert image.format == "PNG"


def options_of(arguments):
    import argparse

    from bench.roofline import command as roofline

    parser = argparse.ArgumentParser()
    roofline.add_parser(parser.add_subparsers())
    return parser.parse_args(["roofline", *arguments])


@pytest.mark.parametrize("name", ["roofline.md", "roofline-link.md"])
def test_the_tables_are_current(tmp_path, monkeypatch, name):
    """Each file is what its command writes."""
    monkeypatch.chdir(tmp_path)
    kept = (RESULTS / name).read_text(encoding="utf-8")
    (line,) = re.findall(r"`python -m bench (roofline --model .*)`", kept)
    assert main(shlex.split(line)) == 0
    assert (tmp_path / "bench/results" / name).read_text(encoding="utf-8") == kept


def test_the_picture_is_current(tmp_path, monkeypatch):
    """The file is what its command writes, as large as it should be."""
    monkeypatch.chdir(tmp_path)
    name = "roofline-qwen2-vl-7b-h200"
    options = options_of(["--sweep", "--out", "."])
    kept = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    options.batch, options.context = kept["batch"], kept["context"]
    assert sweep.numbers(options, "qwen2-vl-7b", "h200") == kept
    assert 10_000 < (RESULTS / f"{name}.png").stat().st_size < 80_000


def test_help_needs_no_torch():
    script = "import sys; from bench.__main__ import main\ntry: main(['roofline', '--help'])\n"
    script += "except SystemExit: print(sorted({'torch', 'matplotlib', 'numpy'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[]\n")
    for word in ("WHAT IS ASSUMED", "WHAT IS LEFT OUT", "0.53125 bytes", *SHAPES, *GPUS):
        assert word in done.stdout or word == "tiny", word


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "gpt"], "--model is gpt, expected one of qwen2-vl-7b"),
        (["--gpu", "tpu"], "--gpu is tpu, expected one of h200, h100, a100"),
        (["--tensor-parallel", "8"], "--tensor-parallel is 8, expected a number that 28 query"),
        (["--sweep"], "--sweep draws a map, expected --out DIR"),
        (["--sweep", "--out", ".", "--batch", "8"], "--batch is 8, expected two values or more"),
        (["--sweep", "--out", ".", "--json", "x"], "--json is for the tables"),
    ],
)
def test_what_is_refused(capsys, arguments, message):
    assert main(["roofline", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench roofline: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--draft-length", "64"], "--draft-length: is 64, expected 1 to 63 or best"),
        (["--tensor-parallel", "x"], "--tensor-parallel: is x, expected 1 to 64 or fit"),
        (["--acceptance", "1.5"], "--acceptance: is 1.5, expected 0 to 1"),
        (["--efficiency", "0"], "--efficiency: is 0, expected 0.01 to 1"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["roofline", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_map_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["roofline", "--sweep", "--out", str(tmp_path)]) == 2
    assert "is not installed; pip install matplotlib" in capsys.readouterr().err
    assert main(["roofline"]) == 0


def test_a_file_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["roofline", "--out", str(tmp_path / "file" / "results")]) == 2
    assert capsys.readouterr().err.count("\n") == 1

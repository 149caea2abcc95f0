"""`bench roofline --link`: figures against arithmetic by hand, the best set-up by trying all."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.models.dimensions import SHAPES
from bench.report import tables as report_tables
from bench.roofline import expected
from bench.roofline.devices import GIB, GPUS, LINKS, linked
from bench.roofline.offload import OTHER_ACCEPTANCES, Placed
from std_decode.costs.expected import EXPECTED, select_seconds

RESULTS = Path(__file__).parents[2] / "bench" / "results"
# Qwen2.5-VL-32B: what a step goes over, of which the head; a cached token.
HIDDEN, LAYERS, TABLE = 5120, 64, 5120 * 152064
MATRICES = LAYERS * (HIDDEN * (2 * HIDDEN + 2 * 1024) + 3 * HIDDEN * 27648) + TABLE
SMALL = LAYERS * (2 * HIDDEN + HIDDEN + 2 * 1024) + HIDDEN
COPIES = MATRICES * (0.5 + 4 / 128)
KV = 2 * 2 * LAYERS * 1024
STAGING = 2 * max(2 * TABLE, 2 * (MATRICES - TABLE) / LAYERS)
PCIE4, NVME = 25e9, 6e9
CARD = 0.9 * 24 * GIB


@pytest.fixture
def predict(tmp_path):
    """``predict("--kv", "host")``: the record of each context, of the 32B on an RTX 4090."""

    def call(*arguments, model="qwen2.5-vl-32b", gpu="rtx-4090"):
        path = tmp_path / "figures.json"
        given = ["--model", model, "--gpu", gpu, *arguments, "--json", str(path)]
        given += [] if "--link" in arguments else ["--link", "pcie4"]
        assert main(["roofline", *given]) == 0
        found = json.loads(path.read_text())
        assert found["status"] == "PREDICTED, not measured"
        return {one["context"]: one for one in found["predictions"]}

    return call


def placed(weights, kv, copies, context=25000, link="pcie4", gpu="rtx-4090", batch=1):
    device = linked(GPUS[gpu], link)
    disk = {"disk": LINKS[link].bandwidth} if link == "nvme" else {}
    shape, memory = SHAPES["qwen2.5-vl-32b"], 0.9 * GPUS[gpu].memory
    return Placed(shape, device, 1, batch, context, 1024, memory, weights, kv, copies, **disk)


def test_what_lies_where_in_bytes():
    both = placed("host", "host", True)
    selected = 1024 * KV + 2 * 25000 * KV / LAYERS
    needed = 2 * SMALL + STAGING + COPIES + selected
    assert both.needed(True) == pytest.approx(needed)
    assert both.fetched_weights == pytest.approx(2 * MATRICES - (CARD - needed))
    assert both.fetched_keys == 25000 * KV and both.device_bytes == pytest.approx(CARD)
    assert both.host_bytes == pytest.approx(both.fetched_weights + 2 * TABLE + 25000 * KV)
    # Without copies, or with the cache there, others have the room.
    assert both.fetched_weights - replace(both, copies=False).fetched_weights == pytest.approx(
        COPIES
    )
    cache = replace(both, kv="device", context=5000)
    assert cache.needed(True) == pytest.approx(needed - selected + 5000 * KV)
    assert cache.fetched_keys == 0
    here = placed("device", "device", True, gpu="h100-pcie")
    assert here.needed(True) == pytest.approx(2 * (MATRICES + SMALL + TABLE) + COPIES + 25000 * KV)
    assert here.host_bytes == here.fetched_weights == 0 and not here.fitting


def test_all_weights_that_find_room_stay():
    large = replace(placed("host", "host", False), memory=1e12)
    assert large.fetched_weights == 0 and large.device_bytes == pytest.approx(
        large.needed(False) + 2 * MATRICES
    )
    assert replace(large, memory=1e9).fetched_weights == pytest.approx(2 * MATRICES)


def test_experts_are_fetched_all_of_them():
    shape = SHAPES["qwen3-vl-30b-a3b"]
    cell = replace(placed("host", "device", False), shape=shape, memory=0.0)
    assert cell.fetched_weights == pytest.approx(shape.weight_bytes(10**9) - 2 * shape.counts.rest)


def test_a_round_fetches_once_and_drafts_nothing():
    cell = placed("host", "host", True)
    fetch = (cell.fetched_weights + cell.fetched_keys) / PCIE4
    draft = (COPIES + 2 * SMALL + 1024 * KV) / 1.008e12
    assert cell.dense_seconds() == cell.dense_seconds(64) == pytest.approx(fetch)
    found = cell.drafting(True, 0.8, 7)
    assert found.seconds == pytest.approx(7 * draft + fetch)
    assert found.tokens == pytest.approx(sum(0.8**n for n in range(8)))
    # The same with launches and paces, of which the fetch hides those of the dense pass.
    work = replace(cell.workload(0), draft_weight_bytes=None)
    other = select_seconds(work, cell.device) + EXPECTED.round
    each = expected.draft_seconds(cell, True) + EXPECTED.draft
    assert draft < each < 2 * draft
    assert expected.drafting(cell, True, 0.8, 7).seconds == pytest.approx(7 * each + fetch + other)


def test_what_is_fetched_comes_while_it_is_computed():
    cell = placed("host", "host", True)
    slow = replace(cell, device=replace(cell.device, bandwidth=PCIE4 / 4))
    computed = (2 * MATRICES + 2 * SMALL + 25000 * KV) / (PCIE4 / 4)
    assert slow.dense_seconds() == pytest.approx(computed)
    assert expected.dense_seconds(slow) > computed


def test_drafts_without_copies_fetch_the_weights_and_no_keys():
    cell = placed("host", "host", False)
    assert cell.draft_seconds(False) == pytest.approx(cell.fetched_weights / PCIE4)
    assert expected.draft_seconds(cell, False) == cell.draft_seconds(False)
    keys = placed("device", "host", False)
    assert keys.draft_seconds(False) == pytest.approx(
        (2 * MATRICES + 2 * SMALL + 1024 * KV) / 1.008e12
    )


@pytest.mark.parametrize("context", [1000, 1_000_000])
def test_an_ssd_has_the_weights_and_the_host_the_keys(context):
    cell = placed("host", "host", True, context, "nvme")
    weights, keys = cell.fetched_weights, cell.fetched_keys
    assert cell.dense_seconds() == pytest.approx(max(weights / NVME, (weights + keys) / PCIE4))
    assert (weights / NVME > (weights + keys) / PCIE4) == (context == 1000)
    assert replace(cell, copies=False).draft_seconds(False) == pytest.approx(
        replace(cell, copies=False).fetched_weights / NVME
    )


@pytest.mark.parametrize("gpu", ["rtx-4090", "l40s", "h100-pcie"])
def test_the_best_set_up_is_the_best_of_those_that_fit(predict, gpu):
    contexts = ["--context", "25000", "100000", "1000000", "--acceptance", "0.8"]
    best = predict(*contexts, gpu=gpu)
    each = {
        places: predict(*contexts, "--weights", places[0], "--kv", places[1], gpu=gpu)
        for places in itertools.product(("device", "host"), repeat=2)
    }
    for context, record in best.items():
        fitting = {p: found[context] for p, found in each.items() if found[context]["fits"]}
        # The gains at other acceptances may be of other set-ups; of two alike it is either.
        assert record | {"expected_at": 0} in (x | {"expected_at": 0} for x in fitting.values())
        assert record["tokens_per_s"] == max(one["tokens_per_s"] for one in fitting.values())
        dense = max(
            1 / expected.step_seconds(placed(*places, False, context, gpu=gpu))
            for places in each
            if placed(*places, False, context, gpu=gpu).fitting
        )
        # Of all, whatever was asked for.
        assert all(one["dense"] == record["dense"] for one in fitting.values())
        assert record["dense"]["tokens_per_s"] == pytest.approx(dense)
        assert record["expected_speedup"] == pytest.approx(record["tokens_per_s"] / dense)
        assert record["expected_speedup"] <= record["speedup"] + 1e-9
        assert record["device_bytes"] <= 0.9 * GPUS[gpu].memory * (1 + 1e-9)


def test_acceptance_is_an_argument_and_others_are_shown(predict):
    shown = predict()[25000]["expected_at"]
    assert [*map(float, shown)] == [*OTHER_ACCEPTANCES]
    for chance in OTHER_ACCEPTANCES:
        found = predict("--acceptance", str(chance))[25000]
        assert found["expected_speedup"] == shown[str(chance)] <= 1 / (1 - chance)


def test_copies_that_do_not_fit(predict, capsys):
    record = predict(model="qwen2.5-vl-72b")[25000]
    assert not record["four_bit"] and record["draft_length"] == 0
    assert record["speedup"] == record["expected_speedup"] == 1
    assert "no drafts" in capsys.readouterr().out
    larger = predict(model="qwen2.5-vl-72b", gpu="l40s")[25000]
    assert larger["four_bit"] and larger["expected_speedup"] > 2
    record = predict("--weights", "device")[25000]
    assert not record["fits"] and record["device_bytes"] == pytest.approx(
        2 * (MATRICES + SMALL + TABLE) + 1024 * KV + 2 * 25000 * KV / LAYERS
    )
    assert "does not fit" in capsys.readouterr().out


def test_a_link_that_a_card_has_not_is_left_out(tmp_path):
    given = ["--gpu", "rtx-4090", "h100-pcie", "--link", "pcie4", "pcie5"]
    assert main(["roofline", *given, "--json", str(tmp_path / "x")]) == 0
    found = json.loads((tmp_path / "x").read_text())["predictions"]
    assert [(one["gpu"], one["link"]) for one in found] == [
        ("rtx-4090", "pcie4"), ("h100-pcie", "pcie4"), ("h100-pcie", "pcie5"),
    ]  # fmt: skip
    own = {name: linked(GPUS[name], "nvme").link for name in ("rtx-4090", "h100-pcie")}
    assert own == {"rtx-4090": PCIE4, "h100-pcie": 50e9}
    assert linked(GPUS["h100"], "pcie4", 0.5).bandwidth == 0.5 * GPUS["h100"].device.bandwidth


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--link", "usb"], "--link is usb, expected one of pcie4, pcie5, nvme"),
        (["--weights", "host"], "--weights is host, expected --link too"),
        (["--kv", "best"], "--kv is best, expected --link too"),
        (["--link", "pcie4", "--tensor-parallel", "2"], "--link is of one GPU and of the tables"),
        (["--link", "pcie4", "--sweep", "--out", "."], "--link is of one GPU and of the tables"),
        (["--link", "pcie5", "--gpu", "a100"], "--link is pcie5, expected pcie4 or nvme for the"),
    ],
)
def test_what_is_refused(capsys, arguments, message):
    assert main(["roofline", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench roofline: ") and error.count("\n") == 1 and message in error


def test_the_page_has_each_card_behind_its_own_link(tmp_path):
    head, _, *rows, _, said = report_tables.cards(RESULTS)
    assert head.startswith("| predicted | GPU | 1 x 25,000 |") and len(rows) == 9
    cards = [" rtx-4090, 24 GB, pcie4 ", " l40s, 48 GB, pcie4 ", " h100-pcie, 80 GB, pcie5 "]
    assert [row.split("|")[2] for row in rows] == 3 * cards
    assert "acceptance 0.8" in said and "pcie4: 25 GB/s" in said and "not measured" in said
    kept = (RESULTS / "roofline-link.md").read_text(encoding="utf-8")
    for old, new, message in (
        ("| model | GPU | link | 1 x", "| model | 1 x", "no table of models, GPUs and links"),
        ("\nPREDICTED, ", "\n", "does not say what it takes for granted"),
    ):
        (tmp_path / "roofline-link.md").write_text(kept.replace(old, new))
        with pytest.raises(report_tables.Unclear, match=message):
            report_tables.cards(tmp_path)

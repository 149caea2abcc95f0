"""Processes that share a model: the tokens of one, drafting alike, with twins of their shares."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import std_decode

SCRIPT = """
    import json, os, sys
    import torch
    import torch.distributed as dist
    from transformers import LlamaForCausalLM
    import std_decode
    from std_decode.policy import DraftLength

    folder = sys.argv[1]
    dist.init_process_group("gloo")
    model = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).eval()
    ids = torch.randint(7, 99, (1, 80), generator=torch.Generator().manual_seed(1))
    found = {}
    for weights in (None, "int4"):
        options = dict(draft_weights=weights, draft_length=4, top_k_keys=1000)
        with std_decode.patched(model, **options):
            tokens = model.generate(ids, max_new_tokens=24, do_sample=False)
            stats = std_decode.last_stats(model)
        found[str(weights)] = dict(
            tokens=tokens[0].tolist(), rate=stats.acceptance_rate, made=stats.draft_weights,
            layers=stats.twinned_layers, bytes=stats.draft_weight_bytes,
        )
    # Each rank would like drafts of another length.
    DraftLength.choose = lambda self, rows: self.settle(2 + dist.get_rank())
    with std_decode.patched(model, top_k_keys=1000):
        tokens = model.generate(ids, max_new_tokens=24, do_sample=False)
        lengths = std_decode.last_stats(model).draft_lengths
    found["auto"] = dict(tokens=tokens[0].tolist(), lengths=lengths)
    with open(f"{folder}/{dist.get_rank()}.json", "w") as file:
        json.dump(found, file)
    dist.barrier()
    os._exit(0)  # tearing down gloo aborts now and then
"""

# Two pairs of processes, each of which shares a model; the pairs make unequally many choices.
PAIRS = """
    import json, os, sys
    import torch
    import torch.distributed as dist
    from types import SimpleNamespace
    from std_decode.ranks import lead

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    told = {}
    for names in (("pair", "tp"), ("tp",)):
        shape = (2, 2) if len(names) == 2 else (4,)
        mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=names)
        model = SimpleNamespace(_tp_size=2, _device_mesh=mesh, device=torch.device("cpu"))
        settle = lead(model)
        choices = range(3 if len(names) == 2 and rank < 2 else 2)
        told[" ".join(names)] = [settle(10 * rank + choice) for choice in choices]
    with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
        json.dump(told, file)
    dist.barrier()
    os._exit(0)
"""


# Drafts take little of a dense step on the first of two, and more than one on the other.
TIMES = """
    import json, os, sys
    import torch
    import torch.distributed as dist
    from types import SimpleNamespace
    from std_decode.cost import Workload
    from std_decode.policy import Policy
    from std_decode.ranks import lead

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = SimpleNamespace(_tp_size=2, device=torch.device("cpu"))
    workload = Workload(1.0, 0, 0, batch=1, context=1000, draft_keys=0, draft_weight_bytes=0.1)
    told = {}
    for name, settle in (("alone", lambda choice: choice), ("shared", lead(model))):
        length, told[name] = Policy().begin(workload, 1, settle), []
        for _ in range(60):
            gamma = length.choose([0])
            told[name].append(gamma)
            length.observe(gamma, {0: gamma}, gamma * (0.1 + 1.1 * rank), 1.0, gamma + 1)
    with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
        json.dump(told, file)
    dist.barrier()
    os._exit(0)
"""


def run(script, processes, folder):
    """What each of the processes has found."""
    path = folder / "share.py"
    path.write_text(textwrap.dedent(script))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--standalone", str(path), str(folder)]
    root = str(Path(std_decode.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    subprocess.run(command, check=True, timeout=120, env=environment)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture
def shared(make_case, monkeypatch, tmp_path):
    """A saved model, and what it generates in one process."""
    monkeypatch.setitem(make_case.text, "vocab_size", 128)
    monkeypatch.setitem(make_case.text, "intermediate_size", 128)
    case = make_case("llama", 0)
    case.model.save_pretrained(tmp_path)
    ids = torch.randint(7, 99, (1, 80), generator=torch.Generator().manual_seed(1))
    return tmp_path, case.model.generate(ids, max_new_tokens=24, do_sample=False)[0].tolist()


@pytest.mark.slow
def test_the_tokens_of_one_process(shared):
    folder, expected = shared
    ranks = run(SCRIPT, 2, folder)
    assert ranks[0] == ranks[1]
    own, int4 = ranks[0]["None"], ranks[0]["int4"]
    assert own["tokens"] == int4["tokens"] == ranks[0]["auto"]["tokens"] == expected
    assert set(ranks[0]["auto"]["lengths"][:-1]) == {2}
    assert own["rate"] == 1.0 > int4["rate"] > 0
    assert int4["made"] == "int4" and int4["layers"] == 22 and int4["bytes"] > 0


@pytest.mark.slow
def test_ranks_choose_as_the_first_that_shares_their_model(tmp_path):
    ranks = run(PAIRS, 4, tmp_path)
    assert [rank["pair tp"] for rank in ranks] == [[0, 1, 2], [0, 1, 2], [20, 21], [20, 21]]
    assert [rank["tp"] for rank in ranks] == [[0, 1]] * 4


def test_ranks_that_measure_other_times_draft_alike(tmp_path):
    first, second = run(TIMES, 2, tmp_path)
    assert first["alone"] != second["alone"]
    assert first["shared"] == second["shared"] == first["alone"]
    assert max(first["shared"]) > 4

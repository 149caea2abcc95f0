"""Two processes that share a model: the tokens of one, drafting with twins of their shares."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import std_decode

SCRIPT = """
    import json, os, sys
    import torch
    import torch.distributed as dist
    from transformers import LlamaForCausalLM
    import std_decode

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
    with open(f"{folder}/{dist.get_rank()}.json", "w") as file:
        json.dump(found, file)
    dist.barrier()
    os._exit(0)  # tearing down gloo aborts now and then
"""


@pytest.mark.slow
def test_the_tokens_of_one_process(make_case, monkeypatch, tmp_path):
    import torch

    monkeypatch.setitem(make_case.text, "vocab_size", 128)
    monkeypatch.setitem(make_case.text, "intermediate_size", 128)
    case = make_case("llama", 0)
    case.model.save_pretrained(tmp_path)
    ids = torch.randint(7, 99, (1, 80), generator=torch.Generator().manual_seed(1))
    expected = case.model.generate(ids, max_new_tokens=24, do_sample=False)[0].tolist()
    script = tmp_path / "share.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(script), str(tmp_path)]
    root = str(Path(std_decode.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    subprocess.run(command, check=True, timeout=120, env=environment)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    own, int4 = ranks[0]["None"], ranks[0]["int4"]
    assert own["tokens"] == int4["tokens"] == expected
    assert own["rate"] == 1.0 > int4["rate"] > 0
    assert int4["made"] == "int4" and int4["layers"] == 22 and int4["bytes"] > 0

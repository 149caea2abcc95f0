"""Processes that share a model: the tokens of one, drafting alike, with twins of their shares."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

import std_decode
from std_decode import parallel
from std_decode.errors import BadInput
from std_decode.inputs import InputError

SCRIPT = """
    import json, os, sys
    import torch
    import torch.distributed as dist
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig
    import std_decode
    from std_decode.rounds.policy import DraftLength

    folder = sys.argv[1]
    dist.init_process_group("gloo")
    plan = dict(distributed_config=DistributedConfig(tp_plan="auto"))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **plan).eval()
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
    DraftLength.choose = lambda self, rows, found=None: self.settle(2 + dist.get_rank())
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
    from std_decode.rounds.tensor_parallel import lead

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
    from std_decode.costs.workload import Workload
    from std_decode.rounds.policy import Policy
    from std_decode.rounds.tensor_parallel import lead

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


# A model of families/ with a batch, by every kind of rounds. Each rank has a seed of its own,
# and with "random" would draft as many tokens as it likes.
FAMILY = """
    import random, sys
    import torch
    from transformers import StoppingCriteria
    import std_decode
    from std_decode import parallel
    from std_decode.rounds.policy import DraftLength

    class Never(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.zeros(len(input_ids), dtype=torch.bool)

    folder = sys.argv[1]
    own_choice = DraftLength.choose

    def command(place):
        model = parallel.load_model(folder, place, dtype="float32")
        # Half of the heads, and what is local to them: cache, selection.
        layers = model.get_decoder().layers
        keys = next(x for x in layers if hasattr(x, "self_attn")).self_attn.k_proj.weight
        assert 2 * keys.to_local().shape[0] == keys.shape[0]
        inputs, options = torch.load(f"{folder}/inputs.pt")
        liking, found = random.Random(place.rank), {}
        for length in ("auto", "random", 4):
            if length == "random":
                def choose(self, rows, found=None):
                    gamma = liking.randrange(6)
                    return self.settle(-gamma if found and liking.randrange(2) else gamma)

                DraftLength.choose = choose
            for sample in (False, True):
                for mode in ("ragged", "lockstep"):
                    criteria = dict(stopping_criteria=[Never()] if mode == "lockstep" else [])
                    torch.manual_seed(1 + place.rank)
                    patch = dict(top_k_keys=8, draft_length=4 if length == 4 else "auto")
                    with std_decode.patched(model, **patch):
                        tokens = model.generate(
                            **inputs, **options, **criteria, do_sample=sample
                        )
                        stats = std_decode.last_stats(model)
                    assert stats.mode == mode and stats.fallback is None
                    assert length == "auto" or stats.rounds > 0
                    found[length, sample, mode] = tokens, stats.draft_lengths
            DraftLength.choose = own_choice
        torch.save(found, f"{folder}/{place.rank}.pt")
        return 0

    sys.exit(parallel.run(command, 60))
"""

# Rank 1 dies, or stops answering, while the second answer is generated.
DYING = """
    import os, signal, sys
    import torch
    from transformers import LogitsProcessor
    import std_decode
    from std_decode import parallel

    folder, how, patience = sys.argv[1:]

    class Dies(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            if self.calls == 5:
                os.kill(os.getpid(), getattr(signal, how))
            return scores

    def command(place):
        model = parallel.load_model(folder, place, dtype="float32")
        ids = torch.randint(7, 99, (1, 80), generator=torch.Generator().manual_seed(1))
        with std_decode.patched(model, top_k_keys=8, draft_length=4):
            model.generate(ids, max_new_tokens=12, do_sample=False)
            print(place.rank, "answered", flush=True)
            processors = [Dies()] if place.rank == 1 else []
            model.generate(
                ids, max_new_tokens=200, do_sample=False, logits_processor=processors
            )
        print(place.rank, "answered again", flush=True)
        return 0

    sys.exit(parallel.run(command, float(patience)))
"""


def environment(**more):
    root = str(Path(std_decode.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def torchrun(script, processes, folder, *arguments):
    path = folder / "share.py"
    path.write_text(textwrap.dedent(script))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return [*command, "--standalone", str(path), str(folder), *arguments]


def run(script, processes, folder):
    """What each of the processes has found."""
    command = torchrun(script, processes, folder)
    subprocess.run(command, check=True, timeout=120, env=environment())
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


@pytest.mark.parametrize(
    "family",
    [
        "qwen2_vl",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("llava_onevision", "qwen3_5")),
    ],
)
def test_a_video_model_s_batch_is_answered_as_by_one_process(make_case, tmp_path, family):
    case = make_case(family, 1, rows=3, eos=True, max_new_tokens=24)
    case.model.save_pretrained(tmp_path)
    torch.save((case.inputs, case.options), tmp_path / "inputs.pt")
    subprocess.run(torchrun(FAMILY, 2, tmp_path), check=True, timeout=200, env=environment())
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    lengths, ties = set(), set()
    for (length, sample, mode), (got, drafted) in first.items():
        assert torch.equal(got, second[length, sample, mode][0])
        assert drafted == second[length, sample, mode][1]
        lengths.update(drafted if length == "random" else [])
        expected = case.generate(do_sample=sample)
        ties |= case.assert_same_tokens(expected, got, do_sample=sample)
    assert len(first) == 12 and len(lengths) > 2 and len(ties) <= 1


@pytest.fixture
def folder(make_case, tmp_path):
    """Of a saved Qwen2-VL."""
    make_case("qwen2_vl").model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("how", "patience"),
    [("SIGKILL", 100), pytest.param("SIGSTOP", 4, marks=pytest.mark.slow)],
)
def test_a_rank_that_dies_or_hangs_ends_the_other_with_an_error(folder, how, patience):
    """Without torchrun's agent: the other one has to find out by itself."""
    path = folder / "dying.py"
    path.write_text(textwrap.dedent(DYING))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    joint = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks = [
        subprocess.Popen(
            [sys.executable, str(path), str(folder), how, str(patience)],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **joint),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        out, error = ranks[0].communicate(timeout=80)
    finally:
        for rank in ranks:
            rank.kill()  # also one that is stopped
            rank.wait()
    assert "0 answered\n" in out and "again" not in out
    assert ranks[0].returncode == 1
    assert "process 0 of 2: another process has died or does not answer" in error


@pytest.mark.slow
def test_torchrun_ends_all_when_one_dies(folder):
    command = torchrun(DYING, 2, folder, "SIGKILL", "600")
    done = subprocess.run(command, timeout=80, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and "again" not in done.stdout
    assert done.stdout.count("answered") == 2 and "SIGKILL" in done.stderr


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({}, "RANK is not set: torchrun sets it; start it as: torchrun --nproc-per-node"),
        ({"RANK": "one"}, "RANK, LOCAL_RANK and WORLD_SIZE: invalid literal"),
    ],
)
def test_without_torchrun_it_says_how_to_start(monkeypatch, told, words):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        if told:
            monkeypatch.setenv(name, told.get(name, "0"))
    with pytest.raises(InputError, match=words):
        parallel.run(lambda place: 0)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in dict(
        RANK=2, LOCAL_RANK=2, WORLD_SIZE=4, MASTER_ADDR=0, MASTER_PORT=0
    ).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(InputError, match="2 GPUs and a process for GPU 2; give .* 2 or less"):
        parallel.run(lambda place: 0)


def test_bad_input_is_told_once_a_machine(capsys):
    for rank, local_rank in ((0, 0), (1, 1), (2, 0)):
        place = parallel.Place(rank, local_rank, 4)
        for error in (BadInput("no"), InputError("no")):
            assert parallel._tell(error, place) == 2
    assert capsys.readouterr().err == "std-decode: no\n" * 4
    assert parallel._tell(ZeroDivisionError("ours"), place) == 1
    assert "ZeroDivisionError: ours" in capsys.readouterr().err


def test_a_model_that_cannot_be_shared_so_is_refused(make_case, tmp_path):
    make_case("qwen2_vl").model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="its 2 KV heads cannot be shared by 3 .*-node 2$"):
        parallel.load_model(str(tmp_path), parallel.Place(0, 0, 3))
    gpt2 = tmp_path / "gpt2"
    GPT2Config(n_layer=1, n_embd=8, n_head=2).save_pretrained(gpt2)
    with pytest.raises(InputError, match="no tensor-parallel plan for gpt2.*device_map"):
        parallel.load_model(str(gpt2), parallel.Place(0, 0, 2))


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

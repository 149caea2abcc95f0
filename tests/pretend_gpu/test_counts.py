"""What a call asks of a GPU, counted on the pretend one: waits, copies, launches, compilations."""

import pytest
import torch
from transformers import DynamicCache

import std_decode
from std_decode.passes import pool
from std_decode.rounds.lookup import Found, Lookup
from tests.decode.conftest import make_case  # noqa: F401
from tests.decode.families import base
from tests.decode.matches import Match
from tests.pretend_gpu.ledger import ledger

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ledger.installed, reason="counts are those of the pretend GPU"),
]
FAMILIES = ["llama", "qwen2_vl"]
PATCH = dict(draft_length=4, top_k_keys=10_000)  # every key: all drafts agree
FIVE = ["llama", "qwen2_vl", "qwen3_vl", "mistral", "llava_onevision"]
# Of a fused layer in a pass: 10 launches, of which its attention makes two.
ATTENTION = 2
OWN = {"_add_rms_norm_kernel": 2, "_rope_write_kernel": 1, "_silu_mul_kernel": 1}
PRODUCTS = 4


@pytest.fixture
def on_gpu(make_case):  # noqa: F811
    """``on_gpu(family, rows)``: a case whose passes are captured already."""
    patched = []

    def make(family, rows=1, **options):
        case = make_case(family, 5, rows)
        case.model.to("cuda")
        case.inputs = {name: value.to("cuda") for name, value in case.inputs.items()}
        patched.append(std_decode.patch(case.model, **{**PATCH, **options}))
        ledger.clear()
        for _ in range(3):
            case.generate(max_new_tokens=11)
        return case

    yield make
    for model in patched:
        std_decode.unpatch(model)


def counted(case, tokens):
    """Rounds of a call, waits of the host, and copies, over those of a call of one round."""
    ledger.clear()
    case.generate(max_new_tokens=tokens)
    stats = std_decode.last_stats(case.model)
    assert stats.fallback is None and stats.graph_captures == 0
    assert ledger.replays == stats.graph_replays > 0
    return stats.rounds, sum(ledger.syncs.values()), sum(ledger.copies.values())


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_waits_once_a_round_and_copies_nothing(on_gpu, family, rows, do_sample):
    case = on_gpu(family, rows)
    case.options["do_sample"] = do_sample
    few, many = counted(case, 11), counted(case, 41)
    if not do_sample:
        assert (few[0], many[0]) == (2, 8)
    assert many[0] - few[0] >= 6
    assert many[1] - few[1] == many[0] - few[0], ledger.syncs
    assert many[2] == few[2], ledger.copies


@pytest.mark.parametrize("rows", [1, 2])
def test_offloaded_keys_come_without_a_wait(on_gpu, rows):
    """The host waits once a round, and each layer's keys and values are copied, once a dense
    pass; nothing goes back, and nothing else comes."""
    case = on_gpu("llama", rows, kv_cache="offloaded")

    def counted(tokens):
        ledger.clear()
        case.generate(max_new_tokens=tokens)
        stats = std_decode.last_stats(case.model)
        assert stats.fallback is None and stats.host_kv_bytes > 0 == ledger.captures
        sources = {"link": 0, "other": 0}
        for (_, _, where), count in ledger.copies.items():
            sources["link" if "model/link.py" in where else "other"] += count
        return stats.rounds, sum(ledger.syncs.values()), sources["link"], sources["other"]

    few, many = counted(11), counted(41)
    rounds, waits, copies, others = (more - less for more, less in zip(many, few))
    assert rounds == 6 and waits == rounds and others == 0, (ledger.syncs, ledger.copies)
    layers, heads = base.TEXT["num_hidden_layers"], base.TEXT["num_key_value_heads"]
    assert copies == rounds * layers * 2 * rows * heads


def test_an_offloaded_cache_is_left_as_transformers_leaves_it(on_gpu):
    """On the host, but for a layer that is where it was needed last; each knows where it goes."""
    case = on_gpu("llama")
    ids, cache = case.inputs["input_ids"], DynamicCache(offloading=True)
    first = case.generate(past_key_values=cache, max_new_tokens=11)
    more = torch.cat([first, ids[:, 3:9]], dim=1)
    case.inputs = dict(input_ids=more, attention_mask=torch.ones_like(more))
    expected = case.generate(max_new_tokens=11)
    assert {layer.keys.device.type for layer in cache.layers} == {"cpu"}
    assert {layer.device.type for layer in cache.layers} == {"cuda"}
    cache.layers[1].prefetch()
    assert cache.layers[1].keys.device.type == "cuda"
    assert torch.equal(case.generate(past_key_values=cache, max_new_tokens=11), expected)
    stats = std_decode.last_stats(case.model)
    assert stats.reused_tokens > 0 < stats.host_kv_bytes and stats.fallback is None
    assert {layer.keys.device.type for layer in cache.layers} == {"cpu"}
    assert {layer.values.shape[2] for layer in cache.layers} == {more.shape[1] + 10}


@pytest.mark.parametrize("rows", [1, 2])
def test_look_ups_cost_a_copy_and_no_wait(on_gpu, monkeypatch, rows):
    """The host gets the tokens with what it reads anyway."""

    def find(lookup, rows, count):  # what the model would draft is not at hand: any token
        return [[7] * count if row in rows else [] for row in range(len(lookup.texts))]

    monkeypatch.setattr(Lookup, "found", lambda self, rows: Found([Match(8)], self.chances))
    monkeypatch.setattr(Lookup, "drafts", find)
    case = on_gpu("llama", rows, prompt_lookup=True)
    few, many = counted(case, 11), counted(case, 41)
    stats = std_decode.last_stats(case.model)
    assert stats.lookup_rounds == stats.rounds == many[0]
    more = many[0] - few[0]
    assert more >= 20 and many[1] - few[1] == more, ledger.syncs
    assert many[2] - few[2] == more, ledger.copies
    assert {direction for direction, *_ in ledger.copies} <= {"h2d", "d2h"}


def launches(on_gpu, monkeypatch, family, layers, **options):
    """Those of a draft or dense pass and of a verification, as they were captured."""
    # With sizes whose 4-bit weights lie side by side.
    sizes = dict(num_hidden_layers=layers, hidden_size=128, intermediate_size=128)
    # Whole buckets of selected keys would be all that these prompts have.
    monkeypatch.setattr(pool, "bucket", lambda tokens: tokens)
    for name, size in sizes.items() if family == "qwen2" else [("num_hidden_layers", layers)]:
        monkeypatch.setitem(base.TEXT, name, size)
    case = on_gpu(family, **options)
    stats = std_decode.last_stats(case.model)
    assert stats.fused_layers == layers and stats.eager_because is None
    return ledger.captured


@pytest.mark.parametrize("family, options", [
    *((family, dict(top_k_keys=8)) for family in FIVE),  # verification scores the keys
    ("qwen2", dict(draft_weights="int4")),
    ("llama", dict(draft_length=0)),
])  # fmt: skip
def test_launches_of_a_layer(on_gpu, monkeypatch, family, options):
    """With one layer more: what it launches more. Eight, and its attention's."""
    few, many = (launches(on_gpu, monkeypatch, family, n, **options) for n in (1, 2))
    kinds = ["draft", "verify"]
    kinds = kinds[1:] if options.get("draft_length") == 0 else kinds
    for kind, before, after in zip(kinds, few, many, strict=True):
        layer = dict(after - before)
        products = [
            name for name in layer if "int4" in name or name.startswith(("aten.mm", "aten.addmm"))
        ]
        if "draft_weights" in options and kind == "draft":
            assert all("int4" in name for name in products), layer
        assert sum(layer.pop(name) for name in products) == PRODUCTS, after - before
        assert {name: layer.pop(name) for name in OWN} == OWN
        assert sum(layer.values()) == ATTENTION, layer


def test_prompts_of_other_lengths_compile_nothing(on_gpu):
    case = on_gpu("llama")
    ids = case.inputs["input_ids"]
    for length in (7, 19, 33):
        ledger.clear()
        more = torch.randint(7, 99, (1, length), device="cuda")
        case.inputs = {"input_ids": torch.cat([ids, more], dim=1)}
        case.generate(max_new_tokens=11)
        assert std_decode.last_stats(case.model).rounds > 0 and ledger.kernels
        assert not ledger.compilations, length


def test_a_tensor_left_on_the_host_is_refused(on_gpu):
    with pytest.raises(RuntimeError, match="two devices"):
        torch.ones(3, device="cuda") + torch.ones(3)


def test_a_read_while_capturing_is_refused():
    number, graph = torch.zeros((), device="cuda"), torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturing"):
        with torch.cuda.graph(graph):
            number.item()
    with torch.cuda.graph(graph):
        more = number + 1
    number.fill_(4)
    graph.replay()
    assert int(more) == 5


def test_attention_of_a_layer_is_one_op(on_gpu, monkeypatch):
    """What its launches are beside that, in drafts and in verifications that score: none."""
    from std_decode.model.attention import Attending

    seen, plain = [], Attending.__call__

    def watched(self):
        before = ledger.launches.copy()
        out, _ = result = plain(self)
        assert out.is_contiguous()
        if self.running.phase != "prefill":
            seen.append((self.running.phase, self.running.rescore, ledger.launches - before))
        return result

    monkeypatch.setattr(Attending, "__call__", watched)
    case = on_gpu("llama", top_k_keys=8)
    # More than the lists hold: their lengths are rounded up to 256.
    case.inputs = {"input_ids": torch.randint(7, 99, (1, 400), device="cuda")}
    for _ in range(2):
        case.generate(max_new_tokens=21)
    found = {(phase, rescore): launched for phase, rescore, launched in seen}
    assert all(launched == found[phase, rescore] for phase, rescore, launched in seen)
    assert found["draft", False] == {"_sparse_split_kernel": 1, "merge_kernel": 1}
    assert found["verify", True] == {"_verify_split_kernel": 1, "merge_kernel": 1}
    # And of all layers one for the importance.
    layers = len(case.model._std_decode.layers)
    rescored = [c for c in ledger.captured if "_renew_kernel" in c]
    assert rescored
    for captured in rescored:
        assert captured["_renew_kernel"] == 1
        assert captured["_verify_split_kernel"] == captured["merge_kernel"] == layers
        assert captured["_rope_write_kernel"] == layers  # which writes keys and values
        assert "aten.index_copy_.default" not in captured

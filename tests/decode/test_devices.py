"""A model that is spread: layers on several devices, weights in memory or on disk until needed.

Here is one device. That passes mix no two of them is tested with a second one whose tensors have
no values; that the tokens are those of the unpatched model, with weights offloaded by accelerate.
"""

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StoppingCriteria,
)

import std_decode
from std_decode.model.cache import SparseToDenseCache
from std_decode.model.selection_rules import Selection
from std_decode.passes.engine import Engine
from std_decode.stats import DecodeStats
from tests.decode.families import TEXT


def to_device_of(module, args, kwargs):
    """What accelerate does before a layer on another device."""
    device = next(module.parameters()).device

    def moved(value):
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return moved(args), {name: moved(value) for name, value in kwargs.items()}


@pytest.mark.parametrize(("rows", "padded"), [(1, False), (2, False), (2, True)])
def test_no_pass_mixes_devices(rows, padded):
    """The first layer on the CPU, all after it on "meta", where tensors have no values."""
    first, second = torch.device("cpu"), torch.device("meta")
    model = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    decoder = model.model
    for module in (*decoder.layers[1:], decoder.norm, model.lm_head):
        module.to(second)
        module.register_forward_pre_hook(to_device_of, with_kwargs=True)
    ids = torch.ones(rows, 40, dtype=torch.long)
    start = torch.zeros(rows, dtype=torch.int32) if padded else None
    sinks = torch.arange(40).expand(rows, -1) < 4
    selection = Selection(
        sinks, ~sinks, torch.full((rows,), 5, dtype=torch.int32), 5, 12, complete=False
    )
    layers = {i: layer.self_attn for i, layer in enumerate(decoder.layers)}
    cache = SparseToDenseCache(model.config, 64, batch=rows, device=first, most_drafts=3)
    engine = Engine(model.config, layers, cache, reselect=True)
    positions = torch.arange(44)[None].expand(rows, -1)
    with torch.no_grad():
        engine.start(model.__call__, DynamicCache(), start, selection, DecodeStats())
        engine.prefill(input_ids=ids, position_ids=positions[:, :40])
        for drafts in (3, 3, 0):
            tokens, logits = engine.draft_and_verify(
                ids[:, :1],
                positions[:, 40 : 41 + drafts],
                drafts,
                lambda logits, step: ids[:, 0],
                {},
            )
        # What was looked up is verified without scores.
        engine.verify_looked_up(ids[:, :3], positions[:, 40:43], {})
    assert tokens.device == first and logits.device == second
    assert [layer.indices.device for layer in cache.layers] == [first, second, second]
    assert [len(group.layers) for group in engine.groups] == [1, 2]


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.eager
@pytest.mark.parametrize("mode", ["ragged", "lockstep"])
@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_device_map_auto_with_weights_on_disk(make_case, tmp_path, family, mode):
    """As much of the model in memory as is said to fit, the rest brought in for each pass."""
    case = make_case(family, 2, rows=3, eos=True)
    expected = {sample: case.generate(do_sample=sample) for sample in (False, True)}
    case.model.save_pretrained(tmp_path / "saved")
    whole = case.model
    case.model = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "saved",
        device_map="auto",
        max_memory={"cpu": whole.get_memory_footprint() // 2},
        offload_folder=tmp_path / "weights",
    ).eval()
    places = {parameter.device.type for parameter in case.model.parameters()}
    assert places == {"cpu", "meta"} and len(set(case.model.hf_device_map.values())) == 2
    if mode == "lockstep":
        case.options["stopping_criteria"] = [Never()]
    got = {}
    for length in (4, "auto"):
        with std_decode.patched(case.model, draft_length=length, top_k_keys=8):
            for sample in (False, True):
                got[length, sample] = case.generate(do_sample=sample)
                stats = std_decode.last_stats(case.model)
                assert stats.eager_because == "weights are offloaded" and stats.mode == mode
                assert stats.fallback is None and (stats.rounds > 0 or length == "auto")
    case.model = whole
    for (_, sample), tokens in got.items():
        case.assert_same_tokens(expected[sample], tokens, do_sample=sample)

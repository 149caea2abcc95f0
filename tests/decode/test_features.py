"""What users do around generate: the tokens of the unpatched model, and drafts all the same."""

import sys
import threading

import numpy as np
import pytest
import torch
from transformers import (
    GenerationConfig,
    TextIteratorStreamer,
    WatermarkingConfig,
    pipeline,
)

import std_decode
from std_decode.model.running_pass import uncompiled
from tests.decode.families import IMAGE

PATCH = dict(draft_length=4, top_k_keys=8)


def assert_same(case, call=None):
    """`call` gives tokens, or an object that holds them; returns both, and the stats of ours."""
    call = call or case.generate
    expected = call()
    with std_decode.patched(case.model, **PATCH):
        got = call()
        stats = std_decode.last_stats(case.model)
    assert stats.fallback is None and 0 < stats.accepted < stats.drafted
    tokens = [r if isinstance(r, torch.Tensor) else r.sequences for r in (expected, got)]
    assert torch.equal(*tokens)
    return expected, got, stats


@pytest.mark.parametrize(
    "options",
    [
        dict(prefix_allowed_tokens_fn=lambda row, text: list(range(7 + len(text) % 3, 90))),
        dict(sequence_bias=[[[9], 2.0], [[10, 11], -3.0]]),
        dict(guidance_scale=1.5),  # asks the model itself, with a cache of its own
        dict(watermarking_config=WatermarkingConfig(bias=2.0)),
        dict(max_time=600.0),
        dict(generation_config=GenerationConfig(max_length=112, do_sample=True, top_k=9)),
        dict(encoder_repetition_penalty=1.2, encoder_no_repeat_ngram_size=2),
        dict(remove_invalid_values=True, min_length=105),
        dict(cache_implementation="dynamic", return_dict_in_generate=True),
    ],
    ids=lambda options: "+".join(options),
)
@pytest.mark.parametrize("do_sample", [False, True])
def test_options(make_case, options, do_sample):
    case = make_case("llava_onevision", 6, rows=1, max_new_tokens=20)
    if "generation_config" in options:
        case.options = {}
        assert case.inputs["input_ids"].shape[1] < 96
    else:
        options = {**options, "do_sample": do_sample}
    assert_same(case, lambda: case.generate(**options))


@pytest.mark.parametrize("rows", [1, 2])
def test_several_sequences_of_each_prompt(make_case, rows):
    case = make_case("qwen2_vl", 3, rows, max_new_tokens=20)
    expected, _, stats = assert_same(
        case, lambda: case.generate(num_return_sequences=3, do_sample=True, top_p=0.95)
    )
    assert len(expected) == 3 * rows and len(set(map(tuple, expected.tolist()))) == 3 * rows
    assert stats.mode == "ragged"


def test_no_time_left(make_case):
    case = make_case("llama", 1)
    expected = case.generate(max_time=0.0)
    with std_decode.patched(case.model, **PATCH):
        assert torch.equal(case.generate(max_time=0.0), expected)
    assert expected.shape[1] == case.inputs["input_ids"].shape[1] + 1


@pytest.mark.parametrize("rows", [1, 3])
def test_transition_scores(make_case, rows):
    case = make_case("qwen2_vl", 2, rows, max_new_tokens=20)
    expected, got, _ = assert_same(
        case,
        lambda: case.generate(return_dict_in_generate=True, output_scores=True, do_sample=True),
    )
    scores = [
        case.model.compute_transition_scores(r.sequences, r.scores, normalize_logits=True)
        for r in (expected, got)
    ]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_streamer_that_another_thread_reads(make_case, letters, do_sample):
    case = make_case("qwen2_vl", 3, max_new_tokens=24, do_sample=do_sample)

    def told():
        streamer = TextIteratorStreamer(letters, skip_prompt=True, timeout=60)
        tokens = []
        thread = threading.Thread(
            target=lambda: tokens.append(case.generate(streamer=streamer)), daemon=True
        )
        thread.start()
        pieces = list(streamer)
        thread.join(60)
        assert "".join(pieces) == letters.decode(tokens[0][0, -24:])
        return tokens[0]

    assert_same(case, told)


def lora(model, seed=0):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    return get_peft_model(
        model, LoraConfig(target_modules=targets, init_lora_weights=False)
    ).eval()


@pytest.mark.parametrize("first", ["LoRA", "patch"])
@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_lora_before_and_after_patching(make_case, family, first):
    """Adapters count, and switching them off, on and merging them does: each time at once."""
    case = make_case(family, 5, rows=2, max_new_tokens=20)
    plain, bare = case.generate(), case.model
    if first == "patch":
        std_decode.patch(bare, **PATCH)
    case.model = lora(bare)
    if first == "LoRA":
        std_decode.patch(case.model, **PATCH)
    got = {"on": case.generate()}
    assert std_decode.last_stats(case.model).rounds > 0
    with case.model.disable_adapter():
        got["off"] = case.generate()
    case.model.merge_adapter()
    got["merged"] = case.generate()
    case.model.unmerge_adapter()
    assert std_decode.is_patched(case.model) and std_decode.is_patched(bare)
    std_decode.unpatch(case.model)
    expected = case.generate()
    assert not torch.equal(plain, expected)
    case.assert_same_tokens(expected, got["on"])
    case.assert_same_tokens(expected, got["merged"])
    case.model = case.model.unload()
    case.assert_same_tokens(plain, got["off"])


@pytest.mark.parametrize("family", ["llama", "qwen2_vl", "gpt_oss"])
def test_int8_weights_of_torchao(make_case, family):
    quantization = pytest.importorskip("torchao.quantization")
    case = make_case(family, 2, rows=2, max_new_tokens=20)
    plain = case.generate(output_logits=True, return_dict_in_generate=True).logits[0]
    decoder = case.model.get_decoder()
    quantization.quantize_(decoder, quantization.Int8WeightOnlyConfig())
    layers = [module for module in decoder.modules() if isinstance(module, torch.nn.Linear)]
    kinds = {type(layer.weight).__name__ for layer in layers}
    assert kinds == {"Int8Tensor"}
    assert_same(case)
    quantized = case.generate(output_logits=True, return_dict_in_generate=True).logits[0]
    assert (plain - quantized).abs().max() > 1e-4


@pytest.fixture
def llava_processor(letters):
    """The real processor of LLaVA, whose image processor needs no torchvision."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaProcessor(
        images,
        letters,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token=chr(97 + IMAGE),  # as `letters` has it
        num_additional_image_tokens=1,
    )


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_pipelines(make_case, monkeypatch, llava_processor, task):
    from PIL import Image
    from transformers.pipelines import any_to_any, base

    # It asks for torchvision, which a CPU build of torch cannot have, and uses none of it here.
    monkeypatch.setattr(any_to_any, "requires_backends", lambda *_: None)
    # By which a pipeline says that it does not know a model's class by name.
    monkeypatch.setattr(base.logger, "error", pytest.fail)

    case = make_case("llava", 4, max_new_tokens=20)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)

    def tell():
        run = pipeline(task, model=case.model, processor=llava_processor)
        assert run.model is case.model
        return run(images=image, text=text, max_new_tokens=20)

    text = chr(97 + IMAGE) + "abc"
    expected = tell()
    with std_decode.patched(case.model, **PATCH):
        got = tell()
        stats = std_decode.last_stats(case.model)
    assert stats.fallback is None and stats.rounds > 0 and stats.prompt_tokens > 64
    assert got == expected and len(got[0]["generated_text"]) > len(text)


def never(graph, inputs):
    raise AssertionError("a pass of a patched model was compiled")


def parts(model, part):
    return {
        "model": [model],
        "decoder": [model.get_decoder()],
        "layers": list(model.get_decoder().layers),
    }[part]


@pytest.mark.eager
@pytest.mark.parametrize("part", ["model", "decoder", "layers", "forward"])
def test_a_compiled_model_runs_as_it_is(make_case, part):
    """Compiled code stays with the length and the pass that it was compiled for."""
    case = make_case("qwen2_vl", 1, rows=2)
    expected = case.generate()
    if part == "forward":
        case.model.forward = torch.compile(case.model.forward, backend=never)
    else:
        for module in parts(case.model, part):
            module.compile(backend=never)
    for do_sample in (False, True):
        with std_decode.patched(case.model, **PATCH):
            got = case.generate(do_sample=do_sample)
            stats = std_decode.last_stats(case.model)
        assert stats.fallback is None and stats.rounds > 0
        if not do_sample:
            assert torch.equal(expected, got)
    with pytest.raises(Exception, match="a pass of a patched model was compiled"):
        case.generate()  # unpatched it is compiled as ever


@pytest.mark.slow
def test_a_compiled_model_compiled_in_earnest(make_case):
    """Unpatched by compiled code, then patched, then unpatched again."""
    case = make_case("llama", 1)
    plain = case.generate()
    case.model.compile(backend="eager")
    expected = case.generate()
    with std_decode.patched(case.model, **PATCH):
        got = case.generate()
        assert std_decode.last_stats(case.model).rounds > 0
    assert torch.equal(plain, expected) and torch.equal(got, expected)
    assert torch.equal(case.generate(), expected)


def test_compilers_come_back_when_the_last_thread_is_through():
    import torch._dynamo  # noqa: F401  (without it there is nothing to hold back)

    eval_frame = sys.modules["torch._dynamo.eval_frame"]
    first, second = uncompiled(), uncompiled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert eval_frame._stance.stance == "force_eager"
    second.__exit__(None, None, None)
    assert eval_frame._stance.stance == "default"

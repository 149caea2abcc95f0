"""Layers whose result for a token depends on the others are refused; quantisation is not."""

import logging

import pytest
import torch
from torch import nn

import std_decode

PATCH = dict(draft_length=4, top_k_keys=8)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Wrapped(nn.Module):
    """A linear layer, in the form in which a format of 8 bits comes."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x):
        step = self.step(x).clamp(min=1e-6)  # the token that pads is all zeros
        rounded = (x / step).round() * step
        return nn.functional.linear(rounded, self.weight, self.bias)


class ScaledByToken(Wrapped):
    def step(self, x):
        return x.abs().amax(dim=-1, keepdim=True) / 127


class ScaledByAll(Wrapped):
    def step(self, x):
        return x.abs().amax() / 127


class ScaledByRow(Wrapped):
    def step(self, x):
        return x.abs().amax(dim=(1, 2) if x.dim() > 2 else -1, keepdim=True) / 127


class Overlooked(Wrapped):
    """Columns with an outlier are not rounded, as in LLM.int8."""

    threshold = 6.0

    def forward(self, x):
        out = (x.abs() >= self.threshold).flatten(0, -2).any(dim=0)
        step = torch.where(out, 0, x).abs().amax(dim=-1, keepdim=True).clamp(min=1e-4) / 127
        rounded = torch.where(out, x, (x / step).round() * step)
        return nn.functional.linear(rounded, self.weight, self.bias)


class NormOverTokens(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.weight = layer.weight

    def forward(self, x):
        return x / x.pow(2).mean(dim=(1, 2), keepdim=True).sqrt() * self.weight


class Positions(nn.Module):
    """Tells tokens by their place in what is fed."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) * torch.arange(1, x.shape[1] + 1).to(x)[:, None]


MIXING = {
    "one scale for all tokens": ("mlp.gate_proj", ScaledByAll),
    "one scale for a row's tokens": ("mlp.down_proj", ScaledByRow),
    "columns with outliers": ("self_attn.v_proj", Overlooked),
    "a norm over tokens": ("input_layernorm", NormOverTokens),
    "a norm over tokens, after attention": ("post_attention_layernorm", NormOverTokens),
    "a place in what is fed": ("mlp", Positions),
}


def put(model, path, make):
    """Put `make` of what is there in the second decoder layer."""
    owner, _, name = path.rpartition(".")
    owner = model.get_decoder().layers[1].get_submodule(owner)
    setattr(owner, name, make(getattr(owner, name)).eval())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MIXING)
def test_a_layer_that_mixes_tokens_is_refused(make_case, state_of, name, dtype):
    path, make = MIXING[name]
    for family in ("llama", "qwen2_vl"):
        case = make_case(family, seed=1)
        case.model.to(dtype)
        put(case.model, path, make)
        before = state_of(case.model)
        with pytest.raises(NotImplementedError) as refused:
            std_decode.patch(case.model)
        where = rf"layers.1.{path} ({make.__name__}) gives a token another result when others are"
        assert where in str(refused.value) and "the attention" not in str(refused.value)
        assert state_of(case.model) == before
        hooks = [m for m in case.model.modules() if m._forward_pre_hooks or m._forward_hooks]
        assert not hooks


@pytest.mark.parametrize("family", ["llama", "qwen2_vl", "gpt_oss"])
def test_a_layer_that_scales_each_token_by_itself(make_case, family):
    case = make_case(family, seed=2, rows=2)
    put(case.model, "self_attn.o_proj", ScaledByToken)
    expected = case.generate()
    with std_decode.patched(case.model, **PATCH):
        got = case.generate()
        assert std_decode.last_stats(case.model).rounds > 0
    case.assert_same_tokens(expected, got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_half_precision_too(make_case, dtype):
    case = make_case("llama", seed=2)
    case.model.to(dtype)
    for path in ("self_attn.q_proj", "mlp.down_proj"):
        put(case.model, path, ScaledByToken)
    put(case.model, "mlp", lambda mlp: nn.Sequential(nn.Identity(), mlp))
    std_decode.patch(case.model)


def test_the_lm_head_is_tried(make_case):
    case = make_case("llama", seed=3)
    case.model.lm_head = ScaledByAll(case.model.lm_head)
    with pytest.raises(NotImplementedError, match=r"patch: lm_head \(ScaledByAll\) gives a token"):
        std_decode.patch(case.model)


def test_a_forward_that_was_replaced(make_case):
    """As compressed-tensors does: the class is still torch's."""
    case = make_case("llama", seed=3)
    layer = case.model.get_decoder().layers[0].mlp.up_proj
    layer.forward = ScaledByAll(layer).forward
    with pytest.raises(NotImplementedError, match=r"mlp.up_proj \(Linear\) gives a token"):
        std_decode.patch(case.model)


class Weight(torch.Tensor):
    """A tensor that quantises what it is multiplied with, as those of torchao."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not nn.functional.linear:
            return super().__torch_function__(function, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            step = args[0].abs().amax() / 127
            return function((args[0] / step).round() * step, *args[1:])


def test_a_weight_that_quantises_its_input(make_case):
    case = make_case("llama", seed=3)
    layer = case.model.get_decoder().layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Weight))
    assert type(layer.weight) is not nn.Parameter
    with pytest.raises(NotImplementedError, match=r"mlp.up_proj \(Linear\) gives a token"):
        std_decode.patch(case.model)


def changed_head(model):
    model.lm_head = ScaledByAll(model.lm_head).eval()


def changed_layer(model):
    put(model, "mlp.gate_proj", ScaledByAll)


def changed_weight(model):
    layer = model.get_decoder().layers[1].mlp.gate_proj
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Weight))


@pytest.mark.parametrize("change", [changed_head, changed_layer, changed_weight])
def test_a_layer_that_is_put_there_after_patch(make_case, change):
    case = make_case("qwen2_vl", seed=4)
    other = make_case("qwen2_vl", seed=4)
    change(other.model)
    with std_decode.patched(case.model, **PATCH):
        case.generate()
        assert std_decode.last_stats(case.model).rounds > 0
        change(case.model)
        got = case.generate()
        assert "gives a token another result" in std_decode.last_stats(case.model).fallback
    assert torch.equal(got, other.generate())


@pytest.mark.filterwarnings("ignore")
def test_dynamic_int8_of_torch(make_case):
    case = make_case("llama", seed=5)
    torch.ao.quantization.quantize_dynamic(case.model, {nn.Linear}, inplace=True)
    with pytest.raises(NotImplementedError, match=r"q_proj \(Linear\) gives a token another"):
        std_decode.patch(case.model)


def test_observers_note_nothing_of_the_trial(make_case):
    case = make_case("llama", seed=5)
    observer = torch.ao.quantization.MinMaxObserver()
    put(case.model, "mlp.up_proj", lambda layer: nn.Sequential(observer, layer))
    case.generate()
    std_decode.patch(case.model)
    assert observer.max_val.abs() < 100


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_llm_int8(make_case, caplog, threshold, dtype):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    caplog.set_level(logging.ERROR)
    case = make_case("llama", seed=1)
    case.model.to(dtype)
    for module in list(case.model.get_decoder().modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear):
                shape = (layer.in_features, layer.out_features, layer.bias is not None)
                kind = bitsandbytes.nn.Linear8bitLt
                new = kind(*shape, has_fp16_weights=False, threshold=threshold)
                new.load_state_dict(layer.state_dict())
                setattr(module, name, new.to("cpu").eval())
    if threshold:
        with pytest.raises(NotImplementedError, match=r"\(Linear8bitLt\).*llm_int8_threshold=0.0"):
            std_decode.patch(case.model)
        return
    expected = case.generate()
    with std_decode.patched(case.model, **PATCH):
        got = case.generate()
        assert std_decode.last_stats(case.model).rounds > 0
    if dtype == torch.float32:
        case.assert_same_tokens(expected, got)

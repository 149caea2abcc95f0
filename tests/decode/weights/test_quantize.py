"""4-bit weights: right to their own rounding, and never seen in the answer."""

import pytest
import torch
from torch.nn.functional import linear

import std_decode
from std_decode.weights import quantize, rounding
from std_decode.weights.twins import TwinnedLinear

FAMILIES = ("qwen2_vl", "llava_onevision", "llama", "gemma3")
PATCH = dict(draft_weights="int4", draft_length=4, top_k_keys=6)
EVERY_KEY = 10_000


@pytest.fixture
def whole(make_case, monkeypatch):
    """Cases whose LM head can have a twin too."""
    monkeypatch.setitem(make_case.text, "vocab_size", 128)
    return make_case


def between_least_and_most(weight, group):
    """The weights by the plain way to round, in float64: steps between the ends of the range."""
    groups = weight.double().unflatten(1, (-1, group))
    least, most = groups.aminmax(dim=-1, keepdim=True)
    step = (most - least) / 15
    return (((groups - least) / step).round() * step + least).flatten(1)


@pytest.mark.parametrize("dtype", quantize.FLOATS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (48, 96), (80, 64), (16, 384)])
def test_weights_are_nearer_than_between_the_ends_of_their_range(rows, columns, dtype):
    torch.manual_seed(0)
    weight = torch.randn(rows, columns, dtype=torch.float64).to(dtype)
    copy = quantize.quantize(weight)
    assert copy.group == {32: 32, 96: 32, 64: 64, 384: 128}[columns]
    groups = weight.double().unflatten(1, (-1, copy.group))
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    error = quantize.dequantize(copy).double() - weight.double()
    assert (
        error.square().mean()
        < 0.95 * (between_least_and_most(weight, copy.group) - weight.double()).square().mean()
    )
    # Scale and zero are bfloat16, and least squares may cut the ends of the range.
    allowed = 1.5 * step + 2**-8 * (groups.abs().amax(-1) + 8 * step)
    assert (error.unflatten(1, (-1, copy.group)).abs() <= allowed[..., None]).all()


def test_what_is_multiplied_with_much_is_rounded_best():
    torch.manual_seed(0)
    weight, importance = torch.randn(64, 256), torch.ones(256)
    importance[[3, 130, 250]] = 100.0
    plain = quantize.dequantize(quantize.quantize(weight)) - weight
    errors = (
        quantize.dequantize(quantize.quantize(weight, importance / importance.mean())) - weight
    )
    heavy = importance > 1
    assert errors[:, heavy].square().mean() < 0.5 * plain[:, heavy].square().mean()
    assert (errors.square() @ importance).mean() < 0.8 * (plain.square() @ importance).mean()


def test_errors_cancel_out_on_the_mean_input():
    torch.manual_seed(0)
    weight, given = torch.randn(64, 256), torch.randn(500, 256) + 4 * torch.rand(256)
    scale = given.square().mean().sqrt()
    squares, mean = given.square().mean(0) / scale**2, given.mean(0) / scale
    apart, balanced = (
        quantize.dequantize(quantize.quantize(weight, squares, about)) - weight
        for about in (None, mean)
    )
    assert (balanced @ mean).square().mean() < 0.05 * (apart @ mean).square().mean()
    assert (given @ balanced.T).square().mean() < 0.5 * (given @ apart.T).square().mean()
    assert balanced.square().mean() < 1.2 * apart.square().mean()
    # Where inputs have no mean there is nothing to cancel.
    for one, other in zip(
        quantize.quantize(weight, squares), quantize.quantize(weight, squares, 0 * mean)
    ):
        assert torch.equal(one, other)


def test_zeros_move_as_far_as_is_best():
    """What is said to be least of all moves is, against moves a little shorter and longer."""
    torch.manual_seed(0)
    mean = torch.randn(4, 32) / 2
    squares = mean.square() + torch.rand(4, 32)
    variance, total = (squares - mean.square()).double().sum(-1), mean.double().sum(-1)

    def cost(move):
        return (variance * move.square()).sum() + (1 - total @ move) ** 2

    best = rounding._step(squares, mean).double()
    for other in [0.9 * best, 1.1 * best, *(best + 0.05 * torch.eye(4))]:
        assert cost(best) < cost(other)


def test_groups_are_finer_where_bytes_allow():
    assert quantize.group_sizes([]) == []
    layer = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    shapes, head = 30 * layer, (49152, 576)  # SmolLM2-135M
    groups = quantize.group_sizes([*shapes, head], besides=16 * 576 * 4)
    wide = [group for (_, columns), group in zip(shapes, groups) if columns == 1536]
    assert wide == 14 * [128] + 16 * [64] and set(groups[6::7]) == {64, 128}
    assert all(group == 64 for group, (_, columns) in zip(groups, shapes) if columns == 576)
    total = sum(quantize.nbytes(*shape, group) for shape, group in zip([*shapes, head], groups))
    numbers = sum(rows * columns for rows, columns in [*shapes, head])
    assert 0.559 < (total + 16 * 576 * 4) / numbers <= quantize.MOST_BYTES
    # Nothing where all have 128, or where most need finer ones than the bytes allow.
    assert set(quantize.group_sizes([(4096, 4096), (14336, 4096), (4096, 14336)])) == {128}
    assert quantize.group_sizes([(96, 96), (256, 96), (96, 256)]) == [32, 32, 128]
    # Only the widest: a key's smaller layer stays as its query's, with which it is one product.
    assert quantize.group_sizes([(512, 512), (64, 512), (512, 1984)]) == [128, 128, 64]


def test_that_all_columns_are_alike_changes_nothing():
    weight = torch.randn(48, 384)
    for one, other in zip(quantize.quantize(weight), quantize.quantize(weight, torch.ones(384))):
        assert torch.equal(one, other)


def test_weights_that_are_all_the_same_are_kept():
    weight = torch.full((16, 64), 0.375)
    assert torch.equal(quantize.dequantize(quantize.quantize(weight)), weight)


@pytest.mark.parametrize("dtype", quantize.FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_that_of_the_rounded_weights(dtype, shape, bias):
    weight, added = torch.randn(80, 384), torch.randn(80) if bias else None
    copy = quantize.quantize(weight)
    given = torch.randn(*shape, 2 * 384)[..., ::2].to(dtype)  # strided
    packed = quantize.pack(copy.values, copy.group)
    got = quantize.linear(given, packed, copy.scales, None if added is None else added.to(dtype))
    assert got.dtype == dtype and got.shape == (*shape, 80)
    exact = linear(
        given.double(),
        quantize.dequantize(copy).double(),
        added if added is None else added.double(),
    )
    plain = linear(
        given.bfloat16(),
        quantize.dequantize(copy).bfloat16(),
        added if added is None else added.bfloat16(),
    )
    allowed = 2 * (plain.double() - exact).abs().max() + 2**-8 * exact.abs().max()
    assert (got.double() - exact).abs().max() <= allowed


def test_large_layers_are_quantised_and_packed_in_parts(monkeypatch):
    weight = torch.randn(336, 128)
    whole = quantize.quantize(weight)
    packed = quantize.pack(whole.values, whole.group)
    monkeypatch.setattr(quantize, "CHUNK", 100 * 128)
    monkeypatch.setattr(quantize, "FITTED", 50 * 128)
    assert quantize._chunk_rows(128) == 64
    parts = quantize.quantize(weight)
    assert torch.equal(whole.values, parts.values) and torch.equal(whole.scales, parts.scales)
    assert torch.equal(packed, quantize.pack(parts.values, parts.group))
    into = torch.full_like(packed, 255)
    assert quantize.pack(parts.values, parts.group, out=into) is into and torch.equal(into, packed)


def test_a_gpu_without_triton_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda")
    assert quantize.no_kernel(gpu) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0" in quantize.no_kernel(gpu)
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    assert "takes Triton, which is not installed" in quantize.no_kernel(gpu)


def test_bytes_are_those_that_are_stated():
    for rows, columns in ((16, 32), (48, 96), (80, 384)):
        copy = quantize.quantize(torch.randn(rows, columns))
        assert copy.values.nbytes + copy.scales.nbytes == quantize.nbytes(rows, columns)
        assert quantize.pack(copy.values, copy.group).nbytes == copy.values.nbytes
    finer = quantize.quantize(torch.randn(80, 384), group=32)
    assert finer.group == 32
    assert finer.values.nbytes + finer.scales.nbytes == quantize.nbytes(80, 384, 32)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 16, 33])
@pytest.mark.parametrize("columns", [96, 192, 384, 3584])
def test_the_product_on_a_gpu(rows, columns):
    """In whatever order its kernel packs them, the weights are the rounded ones."""
    weight = torch.randn(336, columns, device="cuda", dtype=torch.bfloat16)
    copy = quantize.quantize(weight)
    assert torch.equal(copy.values.cpu(), quantize.quantize(weight.cpu()).values)
    given = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    got = quantize.linear(given, quantize.pack(copy.values, copy.group), copy.scales, None)
    rounded = quantize.dequantize(copy)
    exact, plain = linear(given.double(), rounded.double()), linear(given, rounded.bfloat16())
    allowed = 2 * (plain.double() - exact).abs().max() + 2**-8 * exact.abs().max()
    assert (got.double() - exact).abs().max() <= allowed


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"compile": True}, {"cuda_graphs": False}], ids=str)
@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_same_tokens_on_a_gpu(whole, family, options):
    torch.backends.cuda.matmul.allow_tf32 = False
    for rows, do_sample in ((1, False), (3, True)):
        case = whole(family, 1, rows, do_sample=do_sample)
        case.model.to("cuda")
        case.inputs = {name: value.to("cuda") for name, value in case.inputs.items()}
        expected = case.generate()
        with std_decode.patched(case.model, **PATCH, **options):
            for _ in range(3):
                case.assert_same_tokens(expected, case.generate())
            stats = std_decode.last_stats(case.model)
        assert stats.draft_weights == "int4" and stats.twinned_layers == 22
        assert (stats.graph_replays > 0) == ("cuda_graphs" not in options)


# The promise


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3])
def test_same_tokens_as_unpatched(whole, family, rows, seed):
    case = whole(family, seed, rows, eos=rows > 1)
    for do_sample in (False, True):
        expected = case.generate(do_sample=do_sample)
        ties = set()
        for draft_length, top_k_keys in ((1, 4), (4, 4), (7, EVERY_KEY)):
            options = dict(draft_length=draft_length, top_k_keys=top_k_keys)
            with std_decode.patched(case.model, draft_weights="int4", **options):
                got = case.generate(do_sample=do_sample)
                stats = std_decode.last_stats(case.model)
                assert stats.fallback is None and stats.draft_weights == "int4"
                assert (stats.twinned_layers, stats.kept_layers) == (22, 0)
            ties |= case.assert_same_tokens(expected, got, do_sample=do_sample)
        assert len(ties) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_read_the_twins_and_nothing_else_does(whole, family):
    """Twins of NaN: no draft is worth anything, and the answer is the same."""
    case = whole(family, 1, max_new_tokens=24)
    expected = case.generate()
    with std_decode.patched(case.model, **{**PATCH, "top_k_keys": EVERY_KEY}):
        case.assert_same_tokens(expected, case.generate())
        usual = std_decode.last_stats(case.model).accepted
        for layer in case.model.modules():
            if isinstance(layer, TwinnedLinear):
                layer._std_decode_twin.scales.fill_(float("nan"))
        case.assert_same_tokens(expected, case.generate())
        stats = std_decode.last_stats(case.model)
    assert stats.accepted < usual and stats.accepted <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_tokens_differ_by_rounding_alone(whole, family):
    """As without twins: where they part, the token was hardly behind the best."""
    for seed in range(4):
        case = whole(family, seed, max_new_tokens=24)
        case.model.bfloat16()
        case.inputs = {
            name: x.bfloat16() if x.is_floating_point() else x for name, x in case.inputs.items()
        }
        for do_sample in (False, True):
            expected = case.generate(do_sample=do_sample)
            with std_decode.patched(case.model, **PATCH):
                got = case.generate(do_sample=do_sample)
                assert std_decode.last_stats(case.model).draft_weights == "int4"
            parted = (expected != got).int()[0]
            if not parted.any():
                continue
            step = int(parted.argmax())
            lag = case.behind(do_sample=do_sample)(step - case.inputs["input_ids"].shape[1])[0]
            print(
                f"{family}, seed {seed}, sampled {do_sample}: behind by {float(lag[got[0, step]])}"
            )
            assert lag[got[0, step]] < 0.1

"""Twins of layers with the same input as one product: the same numbers, and no second copy."""

import copy

import pytest
import torch
from torch import nn

import std_decode
from std_decode.weights import quantize
from std_decode.weights.twins import Twins
from tests.decode.recorder import Recording

PATCH = dict(draft_weights="int4", draft_length=4, top_k_keys=10_000)


class Attention(nn.Module):
    def __init__(self, sizes, inputs=64):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(inputs, size, bias=False) for size in sizes)

    def get_decoder(self):
        return self

    def get_input_embeddings(self):
        return self.layers[0]  # its type is asked for; in training nothing is read with it

    def get_output_embeddings(self):
        return None


@pytest.fixture(params=[False, True], ids=["apart", "in one buffer"])
def shared(request, monkeypatch):
    """Both what the CPU does and what a GPU does; the CPU's op copies scales that lie apart."""
    monkeypatch.setattr(quantize, "reads_slices", lambda device: request.param)
    return request.param


def separately(twins, given):
    parts = [quantize.linear(given, twin.packed, twin.scales, None) for twin in twins.twins]
    return torch.cat(parts, -1)


@pytest.mark.parametrize("made_first", [False, True])
def test_one_product_is_that_of_each(shared, made_first):
    model = Attention((128, 64, 48))
    with torch.no_grad():
        for index, layer in enumerate(model.layers):
            layer.weight.mul_(4**index)  # scales of another layer would show
    twins, given = Twins(model), torch.randn(2, 3, 64)
    if made_first:
        twins.make(model)
    joint = twins.joint(list(model.layers))
    twins.make(model)
    assert twins.joint(list(model.layers)) is joint
    assert (joint.packed is not None) == shared
    expected = separately(twins, given)
    assert torch.equal(joint.multiply(given), expected)
    parts = joint.partials(given)
    assert parts.shape == (1, 6, 240) and parts.dtype == torch.float32
    assert torch.equal(parts[0], expected.flatten(0, 1))
    exact = torch.cat([layer(given) for layer in model.layers], -1)
    assert (expected - exact).norm() < 0.15 * exact.norm()
    storages = {twin.packed.untyped_storage().data_ptr() for twin in twins.twins}
    assert len(storages) == (1 if shared else 3)
    assert twins.nbytes == twins.planned_bytes == sum(
        tensor.untyped_storage().nbytes()
        for tensor in ((joint.packed, joint.scales) if shared else
                       (x for twin in twins.twins for x in (twin.packed, twin.scales)))
    )  # fmt: skip


def test_weights_that_change_change_in_place(shared):
    model = Attention((64, 64))
    twins, given = Twins(model), torch.randn(5, 64)
    joint = twins.joint(list(model.layers))
    twins.make(model)
    where = [(twin.packed.data_ptr(), twin.scales.data_ptr()) for twin in twins.twins]
    before = joint.multiply(given)
    with torch.no_grad():
        model.layers[1].weight.neg_()
    twins.make(model)
    assert where == [(twin.packed.data_ptr(), twin.scales.data_ptr()) for twin in twins.twins]
    after = joint.multiply(given)
    assert torch.equal(after[:, :64], before[:, :64])
    assert (after[:, 64:] + before[:, 64:]).abs().max() < 0.2 < before[:, 64:].abs().max()
    assert torch.equal(after, separately(twins, given))


# Sizes that cannot be cut, another group, a layer that keeps its weights.
@pytest.mark.parametrize("kind", ["sizes", "groups", "kept", "dropped"])
def test_layers_that_do_not_go_together_are_multiplied_one_by_one(shared, kind, monkeypatch):
    model = Attention((48, 64, 64) if kind == "sizes" else (64, 64, 64))
    if kind == "kept":
        model.layers[2].double()
    if kind == "groups":
        plain = quantize.quantize
        monkeypatch.setattr(quantize, "group_size", lambda columns: 32)
        first = plain(model.layers[0].weight)
        monkeypatch.undo()
        monkeypatch.setattr(quantize, "reads_slices", lambda device: shared)
        monkeypatch.setattr(
            quantize, "quantize",
            lambda weight, *more: (
                first if weight is model.layers[0].weight else plain(weight, *more)
            ),
        )  # fmt: skip
    twins, given = Twins(model), torch.randn(5, 64)
    joint = twins.joint(list(model.layers))
    twins.make(model)
    if kind == "dropped":
        twins.twins[1].drop()
    if kind == "kept":
        model.layers[2].float()
    assert joint.packed is None
    parts = [
        layer(given)
        if twin is None or twin.packed is None
        else quantize.linear(given, twin.packed, twin.scales, None)
        for layer, twin in zip(model.layers, joint.twins)
    ]
    assert torch.equal(joint.multiply(given), torch.cat(parts, -1))
    assert joint.partials(given).shape == (1, 5, sum(len(layer.weight) for layer in model.layers))
    if kind == "dropped":
        twins.make(model)
        assert (joint.packed is not None) == shared
        assert torch.equal(joint.multiply(given), separately(twins, given))


def test_a_copy_has_a_buffer_of_its_own(shared):
    model = Attention((64, 64))
    twins = Twins(model)
    twins.joint(list(model.layers))
    twins.make(model)
    copied, twice = copy.deepcopy((model, twins))
    (joint,) = twice.joints
    assert joint.packed is None and joint.layers == list(copied.layers)
    twice.make(copied)
    given = torch.randn(2, 64)
    assert torch.equal(joint.multiply(given), twins.joints[0].multiply(given))
    assert not shared or joint.packed.data_ptr() != twins.joints[0].packed.data_ptr()
    twice.detach()
    assert joint.packed is None and (twins.joints[0].packed is not None) == shared


def test_captured_drafts_read_joint_twins_where_they_stay(make_case, monkeypatch):
    """Layers that draft alone with views of a joint buffer, captured; then weights change."""
    from std_decode.passes import graphs

    monkeypatch.setattr(quantize, "reads_slices", lambda device: True)
    monkeypatch.setattr(graphs, "unavailable", lambda devices: None)
    monkeypatch.setattr(graphs, "capture", Recording())
    monkeypatch.setitem(make_case.text, "intermediate_size", 128)
    case = make_case("llama", 1)
    expected = case.generate()
    with std_decode.patched(case.model, **PATCH):
        twins = case.model._std_decode.draft_weights.twins
        mlps = [layer.mlp for layer in case.model.model.layers]
        for mlp in mlps:
            assert twins.joint([mlp.gate_proj, mlp.up_proj]).packed is not None
        for _ in range(3):
            case.assert_same_tokens(expected, case.generate())
            stats = std_decode.last_stats(case.model)
        assert stats.graph_captures == 0 and stats.graph_replays > 2
        with torch.no_grad():
            mlps[0].up_proj.weight.neg_()
        got = case.generate()
        stats = std_decode.last_stats(case.model)
        assert stats.graph_captures == 0 and stats.accepted > 0
    case.assert_same_tokens(case.generate(), got)

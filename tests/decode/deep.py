"""Tiny models made as deep as real ones, and with activations as massive as theirs."""

import copy

import torch
from torch import nn

MASSIVE = {3: 1500.0, 11: -400.0}  # of a few dimensions, as pretrained models have it


def deepen(model, depth):
    """Repeat the layers of `model`'s decoder, each with weights of its own."""
    decoder = model.get_decoder()
    config = decoder.config
    name, layers = next(
        (name, part)
        for name, part in decoder.named_children()
        if isinstance(part, nn.ModuleList) and len(part) == config.num_hidden_layers
    )
    count = len(layers)
    deeper = nn.ModuleList(copy.deepcopy(layers[index % count]) for index in range(depth))
    for index, layer in enumerate(deeper):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
            for held, value in vars(module).items():
                if value is not config and type(value) is type(config):
                    setattr(module, held, config)  # attention belongs to the decoder by its config
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                parameter.data = parameter.data[:, torch.randperm(parameter.shape[1])]
    setattr(decoder, name, deeper)
    for owner in (config, decoder):  # layer_types and the like
        for told, kinds in list(vars(owner).items()):
            if isinstance(kinds, list) and len(kinds) == count:
                setattr(owner, told, [kinds[index % count] for index in range(depth)])
    config.num_hidden_layers = depth
    return model


@torch.no_grad()
def make_massive(model):
    """Have some tokens' states be hundreds of times as large as all others in a few dimensions.

    As the first token of pretrained models has them, which make much of the others' attention.
    """
    embeddings = model.get_input_embeddings().weight
    for dimension, value in MASSIVE.items():
        some = embeddings[::40, dimension]
        some.copy_(value * (1 + torch.rand(len(some))))
    for name, module in model.get_decoder().named_modules():
        weight = getattr(module, "weight", None)
        if "norm" in name and weight is not None and weight.shape == embeddings.shape[1:]:
            weight.mul_(3)
            weight[list(MASSIVE)] *= 0.01
        if name.endswith("q_proj"):
            weight.mul_(5)
    return model

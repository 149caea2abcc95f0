"""Models whose weights accelerate brings in for each pass, over a link that counts."""

import threading
import weakref
from collections.abc import Mapping

import accelerate
import torch

from std_decode.weights.hooks import align_hooks


class Link(Mapping):
    """Stands for what weights are read from.

    Attributes:
        taken: names of what was read, and in which thread.
        nbytes: in all.
        most: bytes that were there at a time, of what was read.
    """

    def __init__(self, weights):
        self.weights, self.taken, self.nbytes, self.most = weights, [], 0, 0
        self.live, self.lock = {}, threading.Lock()

    def __getitem__(self, name):
        array = self.weights[name].numpy().copy()  # which lives as long as the tensor's memory
        with self.lock:
            self.taken.append((name, threading.current_thread().name))
            self.nbytes += array.nbytes
            self.live[id(array)] = array.nbytes
            weakref.finalize(array, self.live.pop, id(array))
            self.most = max(self.most, sum(list(self.live.values())))
        return torch.from_numpy(array)

    def __iter__(self):
        return iter(self.weights)

    def __len__(self):
        return len(self.weights)


def offload(model, where, folder):
    """As accelerate does it; the link between."""
    if where == "disk":
        accelerate.disk_offload(model, folder, execution_device="cpu")
    else:
        accelerate.cpu_offload(model, execution_device="cpu")
    link = None
    for _, hook in hooks(model):
        if hook.weights_map is not None:
            link = link or Link(hook.weights_map.dataset)
            hook.weights_map.dataset = link
    return link


def hooks(model):
    return [(name, hook) for name, x in model.named_modules() for hook in align_hooks(x)]


def traces(model):
    """All that patch could leave behind."""
    passing = {"tied_pointers_to_remove"}  # accelerate's own, from the first pass on
    found = [(name, type(hook), {*vars(hook)} - passing) for name, hook in hooks(model)]
    for name, module in model.named_modules():
        own = vars(module)
        forward = getattr(own.get("_old_forward"), "__func__", None)
        weights = [
            (key, x.device.type, x.shape) for key, x in module._parameters.items() if x is not None
        ]
        found.append((name, type(module), sorted(own), forward, weights))
    return found


def dense_bytes(model):
    """What a dense pass of the decoder and the head needs."""
    parts = (model.get_decoder(), model.get_output_embeddings())
    weights = [
        x for part in parts for module in part.modules() for x in module._parameters.values()
    ]
    return sum(x.nbytes for x in weights if x is not None)

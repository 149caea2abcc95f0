"""A stand-in for CUDA graphs that runs on the CPU and is as strict as they are.

Capturing records each operator with the very tensors it works on, and changes nothing. Replaying
runs the same operators on the same tensors again, whatever has become of the Python objects that
once held them. Reading a value back to the host while capturing is an error.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

HOST_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.item.default,
}


def tensors(*trees):
    return [leaf for leaf in tree_flatten(trees)[0] if isinstance(leaf, torch.Tensor)]


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []
        self.before = {}  # storages that were written to, as they were
        self.own = set()  # storages made while capturing

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in HOST_READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for tensor in self.written(func, args, kwargs):
            where = storage(tensor)
            if where not in self.own and where not in self.before:
                self.before[where] = tensor, tensor.untyped_storage().clone()
        results = func(*args, **kwargs)
        given = {storage(tensor) for tensor in tensors(args, kwargs)}
        fresh = [x for x in tensors(results) if storage(x) not in given]
        self.own |= {storage(tensor) for tensor in fresh}
        self.operators.append((func, args, kwargs, fresh))
        return results

    @staticmethod
    def written(func, args, kwargs):
        """The tensors among the arguments that the operator writes to."""
        names = func._schema.arguments
        given = [*zip(names, args), *((a, kwargs[a.name]) for a in names if a.name in kwargs)]
        return tensors([v for a, v in given if a.alias_info is not None and a.alias_info.is_write])

    def undo(self):
        for tensor, content in self.before.values():
            tensor.untyped_storage().copy_(content)

    def replay(self):
        for func, args, kwargs, fresh in self.operators:
            results = tensors(func(*args, **kwargs))
            given = {storage(tensor) for tensor in tensors(args, kwargs)}
            new = [tensor for tensor in results if storage(tensor) not in given]
            for tensor, result in zip(fresh, new, strict=True):
                tensor.copy_(result)


class Recording:
    """`std_decode.passes.graphs.capture`, and an account of what it was used for."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, step, pool):
        self.captures += 1
        recorder = Recorder()
        try:
            with recorder:
                result = step()
        finally:
            recorder.undo()
        result.fill_(float("nan"))  # nothing has been computed yet

        def replay():
            self.replays += 1
            recorder.replay()
            return result

        return replay

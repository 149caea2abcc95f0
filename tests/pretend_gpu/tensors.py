"""Tensors on the pretend GPU, and what operators on them do."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import std_kernels
from tests.decode import recorder
from tests.pretend_gpu.ledger import ledger

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
HOST_READS = recorder.HOST_READS | {
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
    aten.bincount.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
INDEXING = {
    aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default,
    aten.index_put_.default, aten._index_put_impl_.default,
}  # fmt: skip
# They make a tensor without writing to it, or only say how one is to be read.
NO_LAUNCH = {
    aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default,
    aten.empty_strided.default, aten.new_empty_strided.default, aten.lift_fresh.default,
    aten._unsafe_view.default,
}  # fmt: skip
# What only CUDA has.
ONLY_THERE = {
    aten.bmm.dtype: lambda left, right, dtype: torch.bmm(left.to(dtype), right.to(dtype)),
    aten._convert_weight_to_int4pack.default: lambda values, _: std_kernels.pack_int4(values, 32),
    aten._weight_int4pack_mm.default: aten._weight_int4pack_mm_for_cpu.default,
}
ops: dict[str, Any] = {}  # launchers of std_kernels' Triton kernels, by the op's name


class PretendTensor(torch.Tensor):
    """Says that it is on cuda:0, holds `held` on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> PretendTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, layout=held.layout, device=DEVICE,
        )  # fmt: skip
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        return compute(func, args, kwargs or {})

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, other: PretendTensor) -> None:
        self.held = other.held

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def get_device(self) -> int:
        return 0

    def tolist(self) -> Any:
        ledger.sync("tolist")
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendTensor({self.held})"

    def __getitem__(self, index: Any) -> Any:
        return torch.Tensor.__getitem__(self, _on_device(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        torch.Tensor.__setitem__(self, _on_device(index), value)

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
        return make_tensor(data, dtype=dtype or self.dtype, device=device or self.device)


class Mode(TorchDispatchMode):
    """Sends operators that make tensors on the pretend GPU there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        return compute(func, args, kwargs or {})


def _on_device(index: Any) -> Any:
    """Lists among indices become tensors on the device, as PyTorch's own indexing makes them."""
    if isinstance(index, tuple):
        return tuple(map(_on_device, index))
    return make_tensor(index, device=DEVICE) if isinstance(index, list) else index


def is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def compute(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One operator, as a device would have it done."""
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    ours = [x for x in given if isinstance(x, PretendTensor)]
    others = [x for x in given if not isinstance(x, PretendTensor)]
    if func is aten._to_copy.default:
        return _copied(args[0], dict(kwargs))
    if func is aten.copy_.default and ours and others:
        return _copied_over(*args[:2])
    if ours and any(x.dim() for x in others):
        indices = tree_flatten(args[1])[0] if func in INDEXING else []
        if any(x.dim() and not any(x is index for index in indices) for x in others):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({func})"
            )
        ledger.copy("h2d", "an index")
    if ours and func in HOST_READS:
        ledger.sync(str(func))
    if ours and func in INDEXING and any(_is_mask(x) for x in args[1]):
        ledger.sync(f"{func} with a mask")
    return execute(func, args, kwargs, bool(ours) or is_ours(kwargs.get("device")))


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _copied(source: Any, kwargs: dict[str, Any]) -> Any:
    target = kwargs.pop("device", None)
    target = source.device if target is None else torch.device(target)
    kwargs = {k: v for k, v in kwargs.items() if k not in ("non_blocking", "pin_memory")}
    func = aten._to_copy.default
    if isinstance(source, PretendTensor):
        if target.type == "cuda":
            return execute(func, (source,), kwargs, True)
        ledger.copy("d2h", "to")
        return func(source.held, **kwargs)
    if target.type == "cuda":
        ledger.copy("h2d", "to")
        return PretendTensor(func(source, **kwargs))
    return func(source, **kwargs)


def _copied_over(target: Any, source: Any) -> Any:
    if isinstance(target, PretendTensor):
        ledger.copy("h2d", "copy_")
        target.held.copy_(source)
    else:
        ledger.copy("d2h", "copy_")
        target.copy_(source.held)
    return target


def execute(func: Any, args: tuple, kwargs: dict[str, Any], wraps: bool) -> Any:
    """Computes on the CPU; results are on the pretend GPU if `wraps`."""
    if not wraps:
        kwargs.pop("pin_memory", None)  # which needs a device
        return func(*args, **kwargs)
    plain_args, plain = tree_map(_held, args), dict(tree_map(_held, kwargs))
    if plain.get("device") is not None:
        plain["device"] = torch.device("cpu")
    plain.pop("pin_memory", None)
    if func.namespace == "std_kernels" and ops:
        ops[func._schema.name.partition("::")[2]](*plain_args)  # its kernels are counted
    elif func not in NO_LAUNCH and not func.is_view:
        ledger.launch(str(func))
    results = ONLY_THERE.get(func, func)(*plain_args, **plain)
    # What an operator writes to and returns is the very tensor that it was given.
    written = {id(x.held): x for x in _written(func, args, kwargs)}

    def wrapped(result: Any) -> Any:
        if not isinstance(result, torch.Tensor) or isinstance(result, PretendTensor):
            return result
        return written[id(result)] if id(result) in written else PretendTensor(result)

    return tree_map(wrapped, results)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, PretendTensor) else value


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[PretendTensor]:
    written = recorder.Recorder.written(func, args, kwargs)
    return [x for x in written if isinstance(x, PretendTensor)]


_tensor = torch.tensor


def make_tensor(data: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    """`torch.tensor`, which builds its result below the dispatcher."""
    device = torch.empty(0).device if device is None else torch.device(device)
    if isinstance(data, torch.Tensor):
        return data.detach().clone().to(device=device, dtype=dtype or data.dtype)
    with torch.device("cpu"):
        made = _tensor(_numbers(data), dtype=dtype)
    return made.to(DEVICE) if device.type == "cuda" else made


def _numbers(data: Any) -> Any:
    if isinstance(data, PretendTensor):
        ledger.sync("a tensor of tensors")
        return data.held.tolist()
    return [_numbers(x) for x in data] if isinstance(data, (list, tuple)) else data


_as_tensor = torch.as_tensor


def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Any:
    if isinstance(data, torch.Tensor):
        return data.to(device=device or data.device, dtype=dtype or data.dtype)
    with torch.device("cpu"):
        made = _as_tensor(data, dtype=dtype)
    return made if device is None else made.to(device)

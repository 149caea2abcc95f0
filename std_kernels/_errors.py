"""Wording of argument errors: `op: argument has X, expected Y; remedy`."""

from torch import Tensor


def bad_value(op: str, argument: str, found: str, expected: str, remedy: str) -> ValueError:
    """Words a wrong shape, device, stride or range."""
    return ValueError(f"{op}: {argument} {found}, expected {expected}; {remedy}")


def bad_type(op: str, argument: str, found: str, expected: str, remedy: str) -> TypeError:
    """Words a wrong dtype or Python type."""
    return TypeError(f"{op}: {argument} {found}, expected {expected}; {remedy}")


def bad_shape(op: str, argument: str, tensor: Tensor, expected: str, remedy: str) -> ValueError:
    """Words a wrong rank or size."""
    return bad_value(op, argument, f"has shape {list(tensor.shape)}", expected, remedy)


def bad_dtype(op: str, argument: str, tensor: Tensor, expected: str) -> TypeError:
    """Words a wrong dtype."""
    found = f"has dtype {_short(tensor.dtype)}"
    return bad_type(op, argument, found, expected, f"convert {argument} with .to()")


def bad_device(op: str, argument: str, tensor: Tensor, like: Tensor) -> ValueError:
    """Words a tensor that lies on another device than the op's first argument."""
    remedy = f"move {argument} with .to({str(like.device)!r})"
    return bad_value(
        op, argument, f"is on device {tensor.device}", f"device {like.device}", remedy
    )


def bad_stride(op: str, argument: str, tensor: Tensor) -> ValueError:
    """Words an innermost dimension that is not dense in memory."""
    found = f"has strides {list(tensor.stride())}"
    return bad_value(
        op, argument, found, "an inner stride of 1", f"pass {argument}.contiguous() instead"
    )


def not_a_tensor(op: str, argument: str, value: object, expected: str) -> TypeError:
    """Words an argument that is no tensor at all."""
    found = f"is of type {type(value).__name__}"
    return bad_type(op, argument, found, expected, "pass a torch.Tensor")


def needs_grad(op: str) -> RuntimeError:
    """Words a call that autograd would record."""
    return RuntimeError(
        f"{op}: an input has requires_grad=True, expected inference without gradients; "
        "call it under torch.no_grad() or pass detached tensors"
    )


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")

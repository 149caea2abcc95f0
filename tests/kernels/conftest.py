"""What the kernel tests share: inputs whose unreadable part is NaN, and the error-ratio rule."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

NAN = float("nan")


@dataclass
class Cache:
    """One call's tensors; key and value are NaN wherever no row may read."""

    query: Tensor
    key: Tensor
    value: Tensor
    kv_len: Tensor
    kv_start: Tensor

    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value, self.kv_len


def _lay_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "tokens_first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "padded_rows":
        wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 24), NAN)
        wide[..., 8:-16] = tensor
        return wide[..., 8:-16]
    if layout == "odd_rows":
        return torch.nn.functional.pad(tensor, (0, 3), value=NAN)[..., :-3]
    if layout == "odd_strides":
        return tensor.new_full((3, 2, *tensor.shape), NAN).copy_(tensor)[1, 1]
    return tensor


def _make_cache(
    kv_len: list[int],
    kv_start: list[int] | None = None,
    *,
    Hkv: int = 2,
    G: int = 4,
    T: int = 3,
    D: int = 32,
    N: int = 96,
    dtype: torch.dtype = torch.float32,
    layout: str = "heads_first",
    seed: int = 0,
    device: str = "cpu",
) -> Cache:
    generator = torch.Generator().manual_seed(seed)
    B = len(kv_len)
    # Logits of a few units: a mask wrong by one key must show.
    query = 2 * torch.randn(B, Hkv * G, T, D, generator=generator)
    key, value = torch.randn(2, B, Hkv, N, D, generator=generator)
    lengths = torch.tensor(kv_len, dtype=torch.int32)
    starts = torch.tensor(kv_start or [0] * B, dtype=torch.int32)
    n = torch.arange(N)
    stale = ((n >= lengths[:, None]) | (n < starts[:, None]))[:, None, :, None]
    key, value = key.masked_fill(stale, NAN), value.masked_fill(stale, NAN)
    query, key, value = (_lay_out(x.to(device, dtype), layout) for x in (query, key, value))
    return Cache(query, key, value, lengths.to(device), starts.to(device))


def _assert_accurate(
    actual: Tensor, expected: Tensor, plain: Tensor, floor: float | None = None
) -> None:
    """Error against float64 at most twice that of plain torch at `plain`'s precision."""
    assert expected.dtype == torch.float64
    assert not actual.isnan().any()
    assert torch.equal(actual.isinf(), expected.isinf())
    finite = expected.isfinite()
    if not finite.any():
        return
    wanted = expected[finite]
    if floor is None:
        floor = torch.finfo(actual.dtype).eps * max(1.0, float(wanted.abs().max()))
    error = float((actual.double()[finite] - wanted).abs().max())
    limit = 2 * float((plain.double()[finite] - wanted).abs().max()) + floor
    assert error <= limit, f"error {error:.2e}, limit {limit:.2e}"


@pytest.fixture(scope="session")
def make_cache() -> Callable[..., Cache]:
    return _make_cache


@pytest.fixture(scope="session")
def assert_accurate() -> Callable[..., None]:
    return _assert_accurate


@pytest.fixture(scope="session")
def small_chunks() -> Callable[[pytest.MonkeyPatch], None]:
    """Makes the CPU path split its work as it would at a thousand times the size."""
    from std_kernels import _packed, cpu, cpu_verify

    def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (_packed, cpu, cpu_verify):
            monkeypatch.setattr(module, "MAX_LOGITS", 20)

    return shrink


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small tensors run fastest on one thread, and the machine may be shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

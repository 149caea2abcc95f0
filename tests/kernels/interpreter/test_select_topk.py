"""select_topk's kernels: rows of up to 128 scores take one launch here, longer ones three."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import std_kernels as sk
from std_kernels import _select_topk_kernels as kernels
from std_kernels import _tuning, cpu, reference

INF, NAN = float("inf"), float("nan")
# Few distinct values, so that ties, and every value with a rule of its own, are common.
SPECIAL = torch.tensor(
    [0.0, -0.0, 1.0, -1.0, 1e-42, -1e-42, 3.4e38, -3.4028234663852886e38, INF, -INF, NAN, -NAN]
)
SHORT, LONG = 128, 300


def check(scores, k, **masks):
    indices = sk.select_topk(scores, k, **masks)
    assert indices.dtype == torch.int32
    assert torch.equal(indices, reference.select_topk(scores, k, **masks))
    return indices


NAMES = ("row", "sample", "filter", "list")


class Spy:
    """Stands for a kernel: tells `told` its name, grid and arguments, and launches it, or not."""

    def __init__(self, name, told, launches=True):
        self.kernel = getattr(kernels, f"_select_topk_{name}_kernel")
        self.name, self.told, self.launches = name, told, launches

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.told(self.name, grid, args, options)
            if self.launches:
                self.kernel[grid](*args, **options)

        return launch


def spy(monkeypatch, told, launches=True):
    for name in NAMES:
        monkeypatch.setattr(kernels, f"_select_topk_{name}_kernel", Spy(name, told, launches))


@pytest.mark.parametrize(
    "N, k, launches",
    [(SHORT, 9, ["row"]), (LONG, 9, ["sample", "filter", "list"]), (LONG, 101, ["list"])],
)
def test_the_kernels_run(monkeypatch, N, k, launches):
    monkeypatch.setattr(cpu, "select_topk", None)
    seen = []
    spy(monkeypatch, lambda name, *_: seen.append(name))
    check(torch.randn(1, 1, N), k)
    assert seen == launches


@pytest.mark.parametrize("N", [4097, 8192, 8193, 25088, 132352, 1 << 20])
def test_no_program_is_empty(monkeypatch, N):
    """As a GPU launches them: as many as a row has blocks, not the next power of two."""
    monkeypatch.setattr(_tuning, "arch_of", lambda device: "default")
    seen = {}
    spy(monkeypatch, lambda name, grid, _, options: seen.update({name: (grid, options)}), False)
    kernels.select_topk(torch.empty(3, 1, 2, N), 1024, None, None)
    (programs,), options = seen["filter"]
    assert programs == 6 * -(-N // options["BLOCK_N"])
    assert seen["sample"][0] == seen["list"][0] == (6,)


def listed(monkeypatch):
    """A list that gets, at each launch of `list`, how much each row has listed, and the room."""
    found = []

    def told(name, grid, args, options):
        if name == "list":
            found.append((args[3][:, 1].tolist(), options["ROOM"]))

    spy(monkeypatch, told)
    return found


KINDS = {
    "softmax": lambda n, x: (2 * x).softmax(-1),
    "frames": lambda n, x: x + 9 * (n % 32 == 0),  # as often as keys are sampled
    "recent": lambda n, x: x - 9 * (n < n[-1] - 3000),
    "short": lambda n, x: x.masked_fill(n >= 3000, -INF),
    "few": lambda n, x: x.masked_fill(n >= 1500, -INF),  # fewer are sampled than should reach it
    "close": lambda n, x: 1 + 1e-4 * x,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_is_as_long_as_planned(monkeypatch, kind):
    """With a GPU's sizes: between k and the room, so that no row is read again."""
    monkeypatch.setattr(_tuning, "arch_of", lambda device: "default")
    found = listed(monkeypatch)
    n = torch.arange(131072)
    x = torch.randn(2, 1, 1, len(n), generator=torch.Generator().manual_seed(0))
    scores = KINDS[kind](n, x)
    assert torch.equal(
        kernels.select_topk(scores, 1024, None, None), reference.select_topk(scores, 1024)
    )
    ((lengths, room),) = found
    assert all(1024 <= length <= room == 4096 for length in lengths)


@pytest.mark.parametrize("plan, why", [((1, 1, 100), "short"), ((128, 128, 100), "long")])
def test_a_list_that_is_no_good_is_not_used(monkeypatch, plan, why):
    monkeypatch.setattr(kernels, "_plan_sample", lambda *_: plan)
    found = listed(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(2, 1, 1, 260, generator=generator)
    scores[1] = scores[1].round(decimals=1)
    check(scores, 90)
    ((lengths, room),) = found
    assert all(length < 90 if why == "short" else length > room for length in lengths)


def test_chunks_are_put_in_order(monkeypatch):
    """On a GPU they may come in any: here the list is turned round before it is read."""

    def told(name, grid, args, options):
        if name != "list":
            return
        state, chunks, positions = args[3:6]
        for row, length in enumerate(state[:, 1].tolist()):
            parts = [positions[row, at : at + count].clone() for at, count in chunks[row].tolist()]
            positions[row, :length] = torch.cat(parts[::-1])
            chunks[row, :, 0] = length - chunks[row, :, 1].cumsum(0)

    spy(monkeypatch, told)
    scores = torch.randn(2, 1, 1, LONG, generator=torch.Generator().manual_seed(2))
    scores[1] = scores[1].round()
    check(scores, 20)


@pytest.mark.parametrize("N", [129, 192, 257])
def test_the_best_keys_may_be_anywhere(N):
    """Beside the borders of words (32) and chunks (64), and at the end."""
    best = torch.tensor([0, 31, 32, 63, 64, N - 1])
    scores = -torch.rand(len(best), 1, 1, N, generator=torch.Generator().manual_seed(N))
    scores[range(len(best)), 0, 0, best] = 1.0
    indices = check(scores, 5)
    assert (indices.flatten(0, 2) == best[:, None]).any(-1).all()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_scores_and_masks(data):
    B, Hkv = data.draw(st.integers(1, 2), label="B"), data.draw(st.integers(1, 2), label="Hkv")
    N = data.draw(
        st.sampled_from([1, 2, 12, 63, 64, 65, 127, 128, 129, 192, 193, 257, 300]), label="N"
    )
    lead = data.draw(st.sampled_from([(), (1,), (2,), (0,), (1, 2)]), label="lead")
    kinds = data.draw(st.integers(1, len(SPECIAL)), label="kinds")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    values = SPECIAL[torch.randperm(len(SPECIAL), generator=generator)[:kinds]]
    scores = values[torch.randint(kinds, (*lead, B, Hkv, N), generator=generator)]
    masks = {}
    for name in ("candidates", "always"):
        share = data.draw(st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]), label=name)
        if share is not None:
            masks[name] = torch.rand(B, N, generator=generator) < share
    k = data.draw(st.one_of(st.integers(1, N), st.just(N)), label="k")
    check(scores, k, **masks)


@pytest.mark.parametrize("N", [SHORT - 1, LONG + 3])
@pytest.mark.parametrize("k", [1, 40, 101])
def test_ties_take_the_lowest_position(N, k):
    indices = check(torch.full((1, 1, N), 0.25), k)
    assert indices.flatten().tolist() == list(range(k))
    scores = torch.zeros(1, 1, N)
    scores[..., 1::2] = -0.0
    assert torch.equal(check(scores, k), indices)


@pytest.mark.parametrize("N", [SHORT, LONG])
def test_too_many_always_keep_the_highest_positions(N):
    always = torch.ones(1, N, dtype=torch.bool)
    always[0, 7::5] = False
    indices = check(torch.full((1, 1, N), NAN), 70, always=always)
    assert indices.flatten().tolist() == always[0].nonzero().flatten()[-70:].tolist()


@pytest.mark.parametrize("N", [SHORT, LONG])
def test_fewer_than_k_are_padded(N):
    scores = torch.full((1, 2, N), -INF)
    scores[:, :, ::3] = NAN
    scores[:, 1, [5, N - 1]] = torch.tensor([-1e-42, INF])
    always = torch.zeros(1, N, dtype=torch.bool)
    always[0, 100] = True
    indices = check(scores, N - 1, always=always)
    assert indices[0, 0, :2].tolist() == [100, -1]
    assert indices[0, 1, :4].tolist() == [5, 100, N - 1, -1]
    nobody = torch.zeros(1, N, dtype=torch.bool)
    assert (check(scores, 3, candidates=nobody) == -1).all()


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_digit_decides(shift):
    """Scores that differ in one byte of their bits only."""
    generator = torch.Generator().manual_seed(shift)
    bits = 0x3F123456 + (torch.randint(0, 0x40, (1, 2, LONG), generator=generator) << shift)
    scores = bits.to(torch.int32).view(torch.float32)
    # Negative ones too: what stands beyond the end reads as 0, and would be above them all.
    for signed in (scores, -scores):
        check(signed, 31)
        check(signed[..., : SHORT - 1], 31)


@pytest.mark.parametrize("N", [27, 150])
def test_leading_dimensions_and_strides(N):
    generator = torch.Generator().manual_seed(N)
    wide = torch.randn(2, 2, 2, 1, N + 13, generator=generator)[..., 3 : N + 3]
    masks = {
        "candidates": (torch.arange(N) % 3 > 0).expand(2, N),
        "always": (torch.rand(2, 3 * N, generator=generator) < 0.1)[:, N : 2 * N],
    }
    # B and Hkv swapped, leading dimensions that do not fold, a stride of 0.
    check(wide.transpose(0, 3), 7, **masks)
    check(wide.transpose(0, 1), 7, **masks)
    check(wide[0, :, 0, :1].expand(3, 2, 1, N), 7, **masks)


@pytest.mark.parametrize("N", [60, 150])
def test_rows_of_a_call_do_not_touch_each_other(N):
    scores = torch.randn(2, 2, N, generator=torch.Generator().manual_seed(N)).round(decimals=1)
    together = check(scores, 11)
    for b in range(2):
        assert torch.equal(sk.select_topk(scores[b : b + 1], 11), together[b : b + 1])


def test_offsets_beyond_32_bits():
    # Only the pages that hold the rows are ever touched.
    # A stride that fits 32 bits, and one that does not.
    for rows, stride in ((3, 1 << 30), (2, 1 << 31)):
        storage = torch.empty((1 << 31) + LONG)
        scores = storage.as_strided((rows, 1, 1, LONG), (stride, LONG, LONG, 1))
        scores.copy_(torch.randn(rows, 1, 1, LONG, generator=torch.Generator().manual_seed(0)))
        check(scores, 20)
        check(scores[..., :50], 20)

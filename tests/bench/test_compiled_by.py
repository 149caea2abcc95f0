"""`bench compile` with another Triton: what is otherwise, and nothing else."""

import pytest

from bench import compile as bench
from bench.compiled_by import differences, kernels, version

KEPT = bench.RESULTS.read_text()


def rows(page):
    return [line for line in page.splitlines() if line.startswith("| sm_80 ")]


def test_the_same_numbers_are_no_difference():
    page = differences(KEPT, KEPT.replace(f"triton {version(KEPT)},", "triton 9.9.9,"))
    assert "Triton 9.9.9;" in page and f"from Triton {version(KEPT)}," in page
    assert page.count("\n|") == 2 and f"\n0 of {len(kernels(KEPT))} kernels" in page


def test_every_kernel_is_found():
    (count,) = [line.split()[2] for line in KEPT.splitlines() if line.startswith("triton ")]
    assert len(kernels(KEPT)) == int(count)


def test_a_number_that_changed_is_told_with_both():
    old = next(line for line in KEPT.splitlines() if line.startswith("| verify_attention |"))
    cells = old.split(" | ")
    registers = cells[6]
    new = " | ".join((*cells[:6], "999", *cells[7:]))
    (row,) = rows(differences(KEPT, KEPT.replace(old, new, 1)))
    assert f"| {registers} → 999 |" in row and row.count("→") == 1


def test_problems_are_counted_and_told():
    old = next(line for line in KEPT.splitlines() if line.startswith("| verify_attention |"))
    assert old.endswith(" | ok |")
    page = differences(KEPT, KEPT.replace(old, old[: -len("ok |")] + "fails |", 1))
    (row,) = rows(page)
    assert row.endswith("| ok → fails |") and " compiled 1 have problems.\n" in page


def test_a_kernel_that_only_one_has_is_told():
    old = next(line for line in KEPT.splitlines() if line.startswith("| verify_attention | merge"))
    # The last of those that share its names goes: the others keep their order.
    page = differences(KEPT, KEPT.replace(old + "\n", "", 1))
    (row,) = rows(page)
    assert row.count("→ -") >= 3 and "merge" in row


@pytest.mark.parametrize("other", [False, True])
def test_where_the_command_writes(monkeypatch, other):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "9.9.9" if other else version(KEPT))
    assert bench._default() == (bench.OTHERWISE if other else bench.RESULTS)

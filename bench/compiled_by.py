"""What another Triton makes of the kernels than the one that wrote `results/compile.md`."""

from __future__ import annotations

import re
from itertools import count

# Columns of a table of `bench compile`: what a kernel is, and what the compiler made of it.
_IS, _MADE = slice(0, 6), slice(6, 12)

Key = tuple[str, ...]


def version(text: str) -> str:
    """Of the Triton that compiled what a page tells."""
    found = re.search(r"^triton ([^,\s]+),", text, re.M)
    assert found, "a page of bench compile names its Triton"
    return found[1]


def kernels(text: str) -> dict[Key, list[str]]:
    """Registers, spills, shared memory, loads, matrix instructions and verdict of each kernel.

    Kernels that share all names, for their options, are told apart by their order.
    """
    found: dict[Key, list[str]] = {}
    target = ""
    for line in text.splitlines():
        if line.startswith("## "):
            target = line[3:]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 12 or cells[0] in ("op", "---"):
            continue
        key = next(k for i in count() if (k := (target, *cells[_IS], str(i))) not in found)
        found[key] = cells[_MADE]
    return found


def differences(kept: str, new: str) -> str:
    """A page of the kernels that `new` has otherwise than `kept`, or that only one has."""
    before, after = kernels(kept), kernels(new)
    changed = [key for key in before | after if before.get(key) != after.get(key)]
    lines = [
        "# Kernels that another Triton compiles otherwise",
        "",
        f"Written by `python -m bench compile` with Triton {version(new)}; no GPU took part.",
        f"The rest is as [compile.md](compile.md) has it from Triton {version(kept)},",
        "whose numbers the launch table names.",
        "",
        f"{len(changed)} of {len(before | after)} kernels. Of all that it compiled "
        f"{sum(made[-1] != 'ok' for made in after.values())} have problems.",
        "",
        "| target | op | kernel | dtype | D | tile | warps, stages "
        "| registers | spills | shared | loop loads | matrix | verdict |",
        "|" + 13 * "---|",
    ]
    for key in changed:
        pairs = zip(before.get(key, ["-"] * 6), after.get(key, ["-"] * 6))
        cells = (old if old == now else f"{old} → {now}" for old, now in pairs)
        lines.append(f"| {' | '.join((*key[:-1], *cells))} |")
    return "\n".join(lines) + "\n"

"""What a compiled kernel is made of: registers, spills, load widths, matrix instructions.

Read from the machine code, so that it says what a GPU will run: SASS through the cuobjdump and
nvdisasm that Triton ships, and the AMD compiler's assembly as it is.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WIDE = 16


@dataclass
class Report:
    """The numbers of one compiled kernel."""

    registers: int
    spills: int  # NVIDIA: instructions on thread-local memory; AMD: registers kept there
    shared: int  # bytes
    matrix: str  # the tensor-core instruction, "" for none
    dots: int  # matrix products in the source
    scalar_dots: int  # those of them that run on plain multiply-adds
    # Bytes that one thread loads from global memory in loops, by bytes an instruction.
    loop_loads: dict[int, int] = field(default_factory=dict)
    # NVIDIA: those of them that go to shared memory meanwhile, and the instructions of a loop.
    async_loads: dict[int, int] = field(default_factory=dict)
    loop_instructions: int = 0

    @property
    def narrow_share(self) -> float:
        """The share of the bytes loaded in loops that come in less than 16 bytes at a time."""
        total = sum(self.loop_loads.values())
        narrow = sum(count for width, count in self.loop_loads.items() if width < WIDE)
        return narrow / total if total else 0.0


def inspect(compiled: Any) -> Report:
    """Reports on what `triton.compile` returned."""
    dots, scalar = _dots(compiled.asm["ttir"], compiled.asm["ttgir"])
    report = _inspect_nvidia if "cubin" in compiled.asm else _inspect_amd
    registers, spills, matrix, *loop = report(compiled.asm)
    return Report(registers, spills, compiled.metadata.shared, matrix, dots, scalar, *loop)


def _dots(ttir: str, ttgir: str) -> tuple[int, int]:
    # What stays a tt.dot in a blocked layout is lowered to FMAs; tensor cores have layouts of
    # their own, and wgmma and tcgen05 ops of their own.
    layouts = dict(re.findall(r"^(#\w+) = #(\S+)<", ttgir, re.MULTILINE))
    results = re.findall(r"= tt\.dot .*-> tensor<[^#\n]*(#\w+)>", ttgir)
    scalar = sum(layouts.get(name, "").endswith("blocked") for name in results)
    return len(re.findall(r"= tt\.dot ", ttir)), scalar


def _inspect_nvidia(
    asm: dict[str, Any],
) -> tuple[int, int, str, dict[int, int], dict[int, int], int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump: no register count in its output: {usage[:200]!r}")
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    matrix = re.search(r"\b(HGMMA|UTC\w*MMA|HMMA)\b", sass)
    loads = loop_loads(sass), loop_loads(sass, "LDGSTS"), loop_instructions(sass)
    return int(found[1]), spills, matrix[1] if matrix else "", *loads


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _inspect_amd(asm: dict[str, Any]) -> tuple[int, int, str, dict[int, int]]:
    text = asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"amdgcn: no {name} in the assembly")
        return int(found[1])

    # Scalar registers spill to lanes of vector ones, not to memory.
    spills = number("vgpr_spill_count")
    matrix = re.search(r"\b(v_mfma)_", text)
    return number("vgpr_count"), spills, matrix[1] if matrix else "", loop_loads(text)


# LDG.E.128, LDGSTS.E.BYPASS.128, LDG.E.U16.CONSTANT; a width that is not named is 4 bytes.
_NVIDIA_LOAD = re.compile(r"\b(?:LDG|LDGSTS)\.E([.\w]*)")
_AMD_LOAD = re.compile(r"\b(?:global|buffer)_load_(?:lds_)?(dwordx[234]|dword|u?short|[su]byte)")
_AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2}
_ADDRESS = re.compile(r"/\*[0-9a-f]{4,}\*/")  # before each instruction of SASS
_LABEL = re.compile(r"^\s*(\.L\w+):", re.MULTILINE)
_BRANCH = re.compile(r"\b(?:BRA|s_c?branch)\w*[^\n]*?(\.L\w+)")


def loop_loads(text: str, kind: str = "") -> dict[int, int]:
    """Bytes per thread that the loads inside loops bring, by width, in SASS or AMD assembly.

    Args:
        kind: only of instructions that begin so.
    """
    loops = _loops(text)
    loads: dict[int, int] = {}
    for at, width in _loads(text):
        if text.startswith(kind, at) and any(start <= at < stop for start, stop in loops):
            loads[width] = loads.get(width, 0) + width
    return loads


def loop_instructions(sass: str) -> int:
    """Of the longest loop, 0 where there is none."""
    return max((len(_ADDRESS.findall(sass, *loop)) for loop in _loops(sass)), default=0)


def _loops(text: str) -> list[tuple[int, int]]:
    """What lies between a label and a later branch back to it."""
    labels = {found[1]: found.start() for found in _LABEL.finditer(text)}
    return [
        (labels[found[1]], found.start())
        for found in _BRANCH.finditer(text)
        if labels.get(found[1], len(text)) < found.start()
    ]


def _loads(text: str) -> list[tuple[int, int]]:
    found = []
    for match in _NVIDIA_LOAD.finditer(text):
        parts = match[1].split(".")
        bits = next((int(part) for part in parts if part in ("64", "128")), None)
        small = next((int(part[1:]) for part in parts if part in ("U16", "S16", "U8", "S8")), 32)
        found.append((match.start(), (bits or small) // 8))
    for match in _AMD_LOAD.finditer(text):
        found.append((match.start(), _AMD_WIDTHS.get(match[1], 1)))
    return found

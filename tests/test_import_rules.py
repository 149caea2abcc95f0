"""Who may import whom, read from the source without running it."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OP_FILES = {
    *("score_keys", "select_topk", "sparse_attention", "verify_attention", "int4_linear"),
    *("add_rms_norm", "rope_write", "silu_mul", "renew_importance"),
}
# Rooms of std_decode, folders and files of the first level. Each may import those above it here;
# `errors` and `stats` import nothing of ours, and are for all.
ROOMS = """
    errors stats costs model weights passes rounds admission
    generation patched_class options patching __init__
    video frames inputs parallel demo app __main__
""".split()
APART = {"video", "frames", "inputs", "parallel", "demo"}  # know nothing of decoding


def imports_in(source: str, package: str = "") -> set[str]:
    """Dotted names of everything imported, `from a import b` as `a.b`, anywhere in the source."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def imports_of(path: Path) -> set[str]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return imports_in(path.read_text(encoding="utf-8"), package)


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def test_the_reader_sees_every_kind_of_import():
    source = "import a.b\nfrom c import d\ndef f():\n    from . import e\n    from ..g import h\n"
    assert imports_in(source, "p.q") == {"a.b", "c.d", "p.q.e", "p.g.h"}


def test_reference_imports_torch_and_einops_only():
    imported = imports_of(ROOT / "std_kernels" / "reference.py")
    assert imported, "nothing was read"
    assert {name.partition(".")[0] for name in imported} == {"torch", "einops"}


@pytest.mark.parametrize("package", ["std_kernels", "std_decode"])
def test_the_library_does_not_import_reference(package):
    for path in sources(package):
        assert not any(within(name, "std_kernels.reference") for name in imports_of(path)), path


def test_op_files_do_not_import_each_other():
    for op in OP_FILES:
        imported = imports_of(ROOT / "std_kernels" / f"{op}.py")
        for other in OP_FILES - {op}:
            assert not any(within(name, f"std_kernels.{other}") for name in imported), op


def test_kernels_know_nothing_of_models():
    for path in sources("std_kernels"):
        roots = {name.partition(".")[0] for name in imports_of(path)}
        assert not roots & {"transformers", "std_decode", "bench", "tests"}, path


def test_decode_uses_public_ops_only():
    init = ast.parse((ROOT / "std_kernels" / "__init__.py").read_text(encoding="utf-8"))
    public = next(
        ast.literal_eval(node.value)
        for node in init.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    allowed = {"std_kernels", *(f"std_kernels.{name}" for name in public)}
    for path in sources("std_decode"):
        kernels = {name for name in imports_of(path) if within(name, "std_kernels")}
        assert kernels <= allowed, path


def test_bench_does_not_import_tests():
    for path in sources("bench"):
        assert not any(within(name, "tests") for name in imports_of(path)), path


def modules_of(folder: str) -> dict[str, Path]:
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sources(folder)}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


@cache
def imports_between(folder: str) -> dict[str, set[str]]:
    """For each module those of the same folder that it imports, wherever in it; but for types."""
    modules, found = modules_of(folder), {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = [ast.Pass()]
        package = ".".join(path.relative_to(ROOT).parent.parts)
        imported = imports_in(ast.unparse(tree), package)
        found[name] = {
            near for one in imported if (near := nearest(one, modules)) and near != name
        }
    return found


def nearest(name: str, modules: dict[str, Path]) -> str:
    """The module that `name` is, or is in; "" where it is none of these."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def room(module: str) -> str:
    return (module.split(".") + ["__init__"])[1]


@pytest.mark.parametrize("folder", ["std_kernels", "std_decode", "bench", "tests"])
def test_no_modules_import_each_other_in_a_circle(folder):
    imported = imports_between(folder)
    assert len(imported) > 10, "nothing was read"
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_rooms_import_in_one_direction():
    rank = {name: place for place, name in enumerate(ROOMS)}
    imported = imports_between("std_decode")
    assert {room(module) for module in imported} == set(ROOMS), "a room that has no place in ROOMS"
    for module, others in imported.items():
        for other in others:
            assert rank[room(other)] <= rank[room(module)], f"{module} imports {other}"


def test_what_reads_videos_and_loads_models_knows_nothing_of_decoding():
    decoding = set(ROOMS) - APART - {"errors"}
    for module, others in imports_between("std_decode").items():
        if room(module) in APART:
            assert not decoding & {room(other) for other in others}, module

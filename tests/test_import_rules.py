"""Who may import whom, read from the source without running it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OP_FILES = {"score_keys", "select_topk", "sparse_attention", "verify_attention"}


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

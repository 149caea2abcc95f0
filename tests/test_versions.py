"""The table of tested versions, and what must agree with it."""

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests import versions

ROOT = Path(__file__).parent.parent
COLUMNS = {"python": 1, "torch": 2, "torchvision": 3, "transformers": 4, "triton": 5}
TABLE = versions.rows(versions.PAGE.read_text(encoding="utf-8"))
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_table_is_as_it_would_be_written():
    text = versions.PAGE.read_text(encoding="utf-8")
    assert TABLE and versions.written(text, TABLE) == text


def bounds(package):
    if package == "python":
        return SpecifierSet(re.search(r'requires-python = "(.*)"', PROJECT)[1])
    return Requirement(re.search(rf'^ *"({package}>=.*)"', PROJECT, re.M)[1]).specifier


@pytest.mark.parametrize("package", ["python", "torch", "transformers", "triton"])
def test_bounds_are_what_was_tested(package):
    allowed, tested = bounds(package), versions.minors(TABLE, COLUMNS[package])
    assert all(f"{a}.{b}" in allowed for a, b in tested)
    (major, least), (_, most) = min(tested), max(tested)
    assert f"{major}.{least - 1}" not in allowed, f"{package} below {least} was not tested"
    if package in ("torch", "triton"):
        assert f"{major}.{most + 1}" not in allowed, f"{package} above {most} was not tested"


def test_what_ci_installs_is_in_the_table():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pinned = re.findall(r'"(torch|torchvision|transformers|triton)==([\d.]+)"', script)
    pinned += [("triton", number) for number in re.findall(r"triton (\d[\d.]+)$", script, re.M)]
    assert len(pinned) >= 7
    for package, number in pinned:
        assert number in {row[COLUMNS[package]] for row in TABLE if row[0].startswith("CI")}
    noted = set(re.findall(r'^ *tested "(.*)"', script, re.M))
    assert noted == {row[0] for row in TABLE if row[0].startswith("CI")}


def test_readme_says_the_range():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert versions.summary(TABLE) in readme


def test_a_row_is_written_by_tests_that_pass(monkeypatch, tmp_path, capsys):
    page = tmp_path / "models.md"
    page.write_text(versions.written("a\n<!-- versions -->\n<!-- end -->\nb\n", TABLE[:1]))
    monkeypatch.setattr(versions, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["versions", "trial"])
    assert versions.main() == 1 and "has no row ('trial'" in capsys.readouterr().out
    for _ in range(2):
        versions.note("trial")
        assert versions.rows(page.read_text()) == sorted([TABLE[0], versions.here("trial")])
        assert versions.main() == 0
    older = [(*row[:5], "1.0") for row in versions.rows(page.read_text())]
    page.write_text(versions.written(page.read_text(), older))
    assert versions.main() == 1  # another Triton

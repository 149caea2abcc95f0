"""What is published: a source distribution that is whole, and a wheel that works where nothing is.

Takes a minute and a package registry: ``pytest -m slow tests/test_wheel.py``.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PACKAGES = ("std_decode", "std_kernels")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def run(*command, cwd):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tracked():
    """Names of the files that git tracks, and that are there."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so what belongs to it is unknown")
    names = run("git", "ls-files", cwd=ROOT).splitlines()
    return {name for name in names if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory, tracked):
    """A source distribution, and the wheel that is built from it, of a copy of what git tracks."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--outdir", out, source, cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_the_source_distribution_has_all_that_git_tracks(built, tracked):
    with tarfile.open(built[0]) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    made = {name for name in names if "egg-info/" in name} | {"PKG-INFO"}
    assert names - made == tracked


def test_the_wheel_has_the_packages_and_nothing_else(built, tracked):
    with zipfile.ZipFile(built[1]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {name for name in tracked if name.startswith(tuple(f"{p}/" for p in PACKAGES))}
    assert built[1].stat().st_size < 8 * 2**20


def test_the_wheel_installs_and_passes_the_demo_where_nothing_is(built, tmp_path):
    run(sys.executable, "-m", "venv", "venv", cwd=tmp_path)
    scripts = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python, command = scripts / "python", scripts / "std-decode"
    # Compiling all modules of all dependencies takes longer than the rest, and another torch than
    # the one that is here, some GB, longer still.
    here = [f"{name}=={Version(version(name)).public}" for name in ("torch", "triton")]
    run(python, "-m", "pip", "install", "--quiet", "--no-compile", built[1], *here, cwd=tmp_path)
    run(python, "-m", "pip", "check", cwd=tmp_path)
    where = run(python, "-c", "import std_decode; print(std_decode.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")
    told = run(command, "demo", "--seconds", "8", "--events", "2", "--draft-length", "4",
               cwd=tmp_path)  # fmt: skip
    assert "tokens identical" in told and "yes" in told and "NO" not in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["venv"]

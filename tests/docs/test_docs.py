"""What the documentation says runs, and the API page is that of the docstrings."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import std_decode
import std_kernels
from std_decode.app import arguments
from std_decode.app import main as cli
from std_decode.demo.model import generate_inputs, load_model, load_tokenizer
from tests.app import tiny
from tests.demo import tiny_qwen

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py") if path.stem != "given")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "examples/README.md"]
# A block that loads a model of the reader's gets the demo model instead.
COMMAND = re.compile(
    r"(?:^ *|[`(]|&& )std-decode ((?!generate`|compare`)\w+ --[^`\n]+)", re.MULTILINE
)
LOADS = re.compile(r"\w+\.from_pretrained\(\.\.\.\)")


def make_api():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_api_page_is_current():
    current = make_api().page() == (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert current, "docs/api.md is out of date: python docs/make_api.py writes it again"


@pytest.mark.parametrize("module", [std_decode, std_kernels])
def test_the_api_page_has_every_public_name_and_argument(module):
    page = make_api().page()
    for name in module.__all__:
        entry = page.partition(f"\n### {name}\n")[2].partition("\n### ")[0]
        assert entry and "```python" in entry, name
        assert not re.search(r"^\s*(Args|Returns|Raises|Note|Attributes):$", entry, re.MULTILINE)
    patch = page.partition("\n### patch\n")[2].partition("\n### ")[0]
    for argument in ("top_k_keys", "draft_weights_cache", "visual_mask"):
        assert f"- `{argument}`: " in patch and f"    {argument}: " in patch


def python_blocks(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


BLOCKS = [(path, i) for path in ("README.md",) for i in range(len(python_blocks(path)))]


@pytest.mark.parametrize(("path", "number"), BLOCKS)
def test_every_python_block_of_the_readme_runs(path, number, capsys):
    code = python_blocks(path)[number]
    frames = torch.zeros(16, 56, 56, 3, dtype=torch.uint8).numpy()
    given = {"inputs": {**generate_inputs(frames, 0, load_tokenizer()), "max_new_tokens": 8}}
    code, loads = LOADS.subn("demo_model()", code)
    exec(compile(code, f"{path}, block {number}", "exec"), {"demo_model": load_model, **given})
    assert ("acceptance rate" in capsys.readouterr().out) == bool(loads)


def commands():
    """Command lines of std-decode in the documentation and in the help."""
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    texts += [cli.SPARSITY_EXAMPLES, arguments.GENERATE_EXAMPLES, arguments.COMPARE_EXAMPLES]
    return sorted({line for text in texts for line in COMMAND.findall(text)} - {"demo --help"})


@pytest.mark.parametrize("command", commands())
def test_every_command_that_is_shown_is_one(command):
    options = [part for part in shlex.split(command) if part not in ("[--draft-length", "G]")]
    try:
        cli._parser().parse_args(["1" if part == "N" else part for part in options])
    except SystemExit as ended:  # --help
        assert ended.code == 0 and "--help" in options


def test_there_are_blocks_and_examples_to_run():
    assert len(BLOCKS) >= 2 and len(EXAMPLES) >= 3 and len(commands()) > 12
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert all(f"({name})" in listed for name in EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_runs_without_a_download(name, tmp_path):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "True" in done.stdout and "False" not in done.stdout, done.stdout


@pytest.mark.torchvision
@pytest.mark.parametrize("name", ["patch_a_model.py", "second_question.py"])
def test_an_example_takes_a_model_of_the_reader_s(name, tmp_path, filmed_for_docs):
    save = "import sys\nfrom pathlib import Path\nfrom tests.app import tiny\n"
    save += "tiny.save_llava(Path(sys.argv[1]))"
    done = tiny_qwen.run(save, tmp_path / "m", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code = "import runpy, sys\nsys.path.insert(0, sys.argv.pop(1))\nsys.argv.pop(0)\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    script = ROOT / "examples" / name
    arguments = [script.parent, script, "--model", tmp_path / "m", "--video", filmed_for_docs]
    done = tiny_qwen.run(code, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "True" in done.stdout and "False" not in done.stdout, done.stdout


@pytest.fixture(scope="module")
def filmed_for_docs(tmp_path_factory):
    return tiny.film(tmp_path_factory.mktemp("filmed") / "clip.mp4")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    """To a file of the repository, and to a heading of it where it names one."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if heading:
            found = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in found}
            assert heading in slugs, link


def test_readme_counts_the_families_that_are_listed():
    from tests.decode.families.table import in_text

    listed = in_text((ROOT / "docs/models.md").read_text(encoding="utf-8")).count("\n") - 1
    assert f"{listed} families" in (ROOT / "README.md").read_text(encoding="utf-8")

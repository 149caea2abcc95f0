"""`bench report`: README from results files, the check, and plots; `bench demo` writes one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import demo, environment, records
from bench.__main__ import main
from bench.report import command as report
from bench.report import gpu_notes
from bench.report import plots as report_plots
from bench.report import tables as report_tables

ROOT = Path(__file__).parents[2]
ABOUT = {
    "kind": "environment", "device": "NVIDIA H9", "driver": "599.1", "torch": "9.9",
    "transformers": "8.8", "commit": "abcdef0123456789", "date": "2031-02-03T04:05:06+00:00",
    "copy_gb_per_s": 3000.0,
}  # fmt: skip
README = "before\n\n<!-- table: {} -->\n\nold\n\n<!-- end -->\n\nafter\n"


@pytest.fixture
def results(tmp_path):
    """A folder, and ``results.keep(name, *records)``."""

    class Folder:
        path = tmp_path / "results"

        def keep(self, name, *found):
            self.path.mkdir(exist_ok=True)
            text = "".join(map(records.line_of, (ABOUT, *found)))
            (self.path / f"{name}-nvidia-h9.jsonl").write_text(text)

    return Folder()


def told(results, name):
    """README's rows of cells, and the text around them."""
    text = report.rewritten(README.format(name), results.path)
    assert text.startswith("before\n") and text.endswith("<!-- end -->\n\nafter\n")
    assert "old" not in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines], text


def demo_record(**changes):
    return {
        "kind": "demo", "seconds": 1024, "draft_length": 4, "repeat": 5, "status": "ok",
        "video_tokens": 4096, "identical": True, "unpatched_tokens_per_second": 347.4,
        "dense_path_tokens_per_second": 403.0, "patched_tokens_per_second": 326.1,
        "over_unpatched": 0.934, "over_dense_path": 0.8, "acceptance_rate": 0.92,
        "mean_accepted_length": 4.61, "attributes_right": 1.0, **changes,
    }  # fmt: skip


def test_readme_and_results_agree():
    assert main(["report", "--check"]) == 0


def test_the_check_names_the_difference_and_report_mends_it(tmp_path, capsys):
    folder, page = tmp_path / "results", tmp_path / "measured.md"
    shutil.copytree(ROOT / "bench/results", folder)
    text = (ROOT / "docs/measured.md").read_text(encoding="utf-8")
    readme = shutil.copy(ROOT / "README.md", tmp_path)
    where = ["--results", str(folder), "--readme", str(readme), str(page)]
    (path,) = folder.glob("prefill-*.jsonl")
    about, first, *rest = records.read(path)
    first["ratio"] = 1.876
    path.write_text("".join(map(records.line_of, (about, first, *rest))))
    page.write_text(text, encoding="utf-8")
    assert main(["report", "--check", *where]) == 1
    captured = capsys.readouterr()
    times = f"{first['unpatched_ms']:.0f} | {first['patched_ms']:.0f}"
    assert f"+| 1,024 | {times} | +87.6% |" in captured.out and "disagree" in captured.err
    assert page.read_text(encoding="utf-8") == text
    assert main(["report", *where]) == 0 and main(["report", "--check", *where]) == 0
    changed = page.read_text(encoding="utf-8").splitlines()
    assert sum(old != new for old, new in zip(text.splitlines(), changed)) == 1


def test_the_check_is_light():
    script = "import sys; from bench.__main__ import main; main(['report', '--check'])\n"
    script += "print(sorted({'torch', 'transformers', 'matplotlib'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.endswith("[]\n"), done.stderr


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- table: demo -->\n", "without"),
        ("<!-- table: demo -->\n<!-- table: decode -->\n<!-- end -->\n", "without"),
        ("<!-- table: speed -->\n<!-- end -->\n", "a table speed, expected one of demo, decode"),
        ("<!-- table: kernels -->\n<!-- end -->\n", "kernels-x.jsonl does not begin with"),
    ],
)
def test_what_cannot_be_understood_is_refused(tmp_path, capsys, text, message):
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "kernels-x.jsonl").write_text("{}\n")
    given = ["--readme", str(tmp_path / "README.md"), "--results", str(tmp_path)]
    assert main(["report", *given]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == text


@pytest.mark.parametrize(
    "name", ["demo", "decode", "kernels", "prefill", "promises", "real", "offload"]
)
def test_what_has_no_file_has_no_table(results, name):
    rows, text = told(results, name)
    assert rows == [] and f"<!-- table: {name} -->\n<!-- end -->" in text


def test_the_demo_table(results):
    none = demo_record(draft_length="auto", acceptance_rate=None, mean_accepted_length=1.0)
    failed = {"kind": "demo", "seconds": 1, "draft_length": 4, "status": "failed: no"}
    results.keep("demo", demo_record(), demo_record(seconds=64), none, failed)
    rows, text = told(results, "demo")
    assert [row[:3] for row in rows[1:]] == [
        ["1,024 s", "4,096", "auto"], ["64 s", "4,096", "4"], ["1,024 s", "4,096", "4"],
    ]  # fmt: skip
    assert rows[1][-3:-1] == ["-", "1.0"]
    assert rows[3][3:] == ["347", "403", "326", "0.93x", "0.80x", "92%", "4.6", "100%"]
    where = "NVIDIA H9, driver 599.1, torch 9.9, transformers 8.8, commit abcdef012, 2031-02-03"
    assert where in text and "identical." in text and "BUG" not in text
    results.keep("demo", demo_record(identical=False))
    assert "A BUG" in told(results, "demo")[1]


def test_the_table_of_promises(results):
    took = {"unpatched": {"1": 20.0}, "rounded": {"1": 20.4, "8": 31.0}, "one shape": {"1": 30.0}}
    record = {"model": "demo", "dtype": "bfloat16", "milliseconds": took, "kept": {}, "note": ""}
    late = {"model": "x", "dtype": "bfloat16", "note": "skipped: out of time"}
    results.keep("promises", record, late, {**record, "kept": {"one shape": False}})
    rows, text = told(results, "promises")
    assert rows[0][-2:] == ["dense step", "8 tokens"] and len(rows) == 5
    assert rows[1] == ["demo", "bfloat16", "20.0", "rounded", "20.4", "31.0"]
    assert rows[2][3:] == ["one shape", "30.0", "-"]
    assert rows[4][3] == "one shape NOT KEPT: A BUG" and "Milliseconds a pass" in text


def decoded(what, speed, **more):
    return {
        "kind": "decode", "what": what, "status": "ok", "shape": "qwen2-vl-7b", "batch": 8,
        "context": 25000, "ms": 8e3 / speed, "ms_p20": 7e3 / speed, "ms_p80": 9e3 / speed,
        "tokens_per_s": {"median": speed}, "ratio": speed / 400, "runs": 5,
        "same_as_transformers": "512 of 512", **more,
    }  # fmt: skip


DRAFTS = dict(acceptance=0.9, acceptance_is="forced", draft_length=4, top_k_keys=1024,
              accepted_of_drafted=0.78, tokens_per_pass=4.1)  # fmt: skip
DECODED = [
    decoded("transformers generate", 400.0),
    decoded("ours, dense", 420.0),
    decoded("ours, dense, compiled", 500.0),
    decoded("ours, forced acceptance 0.9", 440.0, **DRAFTS),
    decoded("ours, forced acceptance 0.9, int4 drafts, compiled", 620.0, **DRAFTS),
    {"kind": "decode", "what": "transformers generate, static cache", "status": "skipped: late",
     "shape": "qwen2-vl-7b", "batch": 8, "context": 25000},
    {"kind": "pass", "what": "ours, dense", "pass": "dense", "status": "ok", "batch": 8,
     "shape": "qwen2-vl-7b", "context": 25000, "ms": 19.0, "bytes": 25e9},
]  # fmt: skip


def test_the_decoding_table(results):
    results.keep("decode", *DECODED)
    rows, text = told(results, "decode")
    assert rows[1] == [
        "qwen2-vl-7b", "8 x 25,000", "400", "-", "-", "500", "620", "1.55x", "78% forced", "4.10",
        "512 of 512", "4 drafts, 1,024 keys, int4 drafts, compiled",
    ]  # fmt: skip
    assert len(rows) == 2 and "Forced acceptance is an input" in text
    own = {**DRAFTS, "acceptance_is": "measured"}
    del own["acceptance"]
    results.keep("decode", DECODED[0], decoded("ours, measured acceptance", 300.0, **own))
    rows, text = told(results, "decode")
    assert rows[1][7:9] == ["0.75x", "78% measured"] and "input" not in text


def kernel(what, ms, size="1 x 8000", **more):
    return {
        "kind": "kernel", "op": "select_topk", "shape": "llama-3-8b", "size": size, "what": what,
        "status": "ok", "cold_ms": ms, "gb_per_s": 100 / ms, "of_copy": 0.5, **more,
    }  # fmt: skip


def test_the_kernels_table(results):
    """Losing cases are told; what only one side has is no comparison."""
    large = {"size": "8 x 128000", "gb_per_s": 900.0}
    results.keep(
        "kernels",
        kernel("copy", 1.0, op="copy"),
        kernel("ours", 2.0), kernel("torch.topk", 1.0), kernel("sort", 3.0),
        kernel("ours", 20.0, **large), kernel("torch.topk", 25.0, **large),
        kernel("ours", 9.0, "8 x 8000"), kernel("torch.topk", 10.0, "8 x 8000"),
        kernel("ours", 1.0, "of its own"),
        {**kernel("torch.topk", 1.0, "failed"), "status": "failed: no"},
    )  # fmt: skip
    rows, text = told(results, "kernels")
    assert [row[2:] for row in rows[1:]] == [
        ["1 x 8000", "2", "50", "50%", "torch.topk", "1", "2.00x"],
        ["8 x 128000", "20", "900", "50%", "torch.topk", "25", "0.80x"],
    ]
    assert "fastest at 2 of 3 sizes" in text


def test_the_ceiling_is_that_of_the_roofline(tmp_path):
    lines = report_tables.ceiling(ROOT / "bench/results")
    assert lines[2].startswith(
        "| Qwen2-VL-7B (56 KiB of KV cache a token) | ceiling | 1.00x / 2.1"
    )
    assert lines[3].startswith("|  | expected | 1.00x / 1.4")
    (tmp_path / "roofline.md").write_text("| model | GPU | 1 x 25,000 |\n")
    with pytest.raises(report_tables.Unclear, match="has no table of models on h200"):
        report_tables.ceiling(tmp_path)


def test_plots(results, capsys):
    results.keep("decode", *DECODED)
    results.keep("kernels", kernel("ours", 2.0), kernel("ours", 9.0, "8 x 8000"))
    readme = results.path / "README.md"
    readme.write_text("nothing")
    assert main(["report", "--readme", str(readme), "--results", str(results.path)]) == 0
    names = {path.name for path in results.path.glob("*.png")}
    assert names == {"decode-nvidia-h9.png", "kernels-nvidia-h9-roofline.png"}
    assert capsys.readouterr().out.count("plots in") == 2


def test_what_the_plots_show(results):
    results.keep("decode", *DECODED)
    figure = report_plots.page(results.path / "decode-nvidia-h9.jsonl")
    against, roofline, speedups = figure.axes
    assert {line.get_label(): line.get_ydata()[0] for line in against.lines}["ours, dense"] == (
        pytest.approx(8e3 / 420)
    )
    copy = {line.get_label(): line for line in roofline.lines}["a large copy's bandwidth"]
    assert copy.get_ydata()[0] == pytest.approx(25 / 3)  # ms for 25 GB at 3 TB/s
    assert speedups.texts[0].get_text().startswith("1.55x")


def test_without_matplotlib_there_are_no_plots(results, monkeypatch):
    results.keep("decode", *DECODED)
    monkeypatch.setattr(report_plots, "find_spec", lambda name: None)
    assert report_plots.write(results.path / "decode-nvidia-h9.jsonl") is None


def test_the_demo_is_measured_and_goes_on(tmp_path, monkeypatch):
    """What the demo says is kept; a run that fails is told and tried again."""
    given = ["demo", "--seconds", "16", "--events", "3", "--repeat", "1", "--out", str(tmp_path)]
    assert main([*given, "--draft-length", "4"]) == 0
    (path,) = tmp_path.glob("demo-*.jsonl")
    about, record = records.read(path)
    assert about["checkpoint"] == environment.checkpoint() and about["device"]
    assert record["identical"] and record["video_tokens"] == 64 and record["emitted"] > 3
    assert record["patched_tokens_per_second"] > 0 and 0 <= record["acceptance_rate"] <= 1
    assert len(report_tables.demo(tmp_path)) == 5

    asked = []

    def fails(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 2, "", "one\nout of luck\n")

    monkeypatch.setattr(demo.subprocess, "run", fails)
    monkeypatch.setattr("bench.environment.output", lambda *_: about["commit"])
    assert main([*given, "--draft-length", "4", "auto", "--resume"]) == 1
    assert len(asked) == 1 and asked[0][asked[0].index("--draft-length") + 1] == "auto"
    assert records.read(path)[1:] == [
        record,
        {"kind": "demo", "seconds": 16, "draft_length": "auto", "repeat": 1, "top_k_keys": 64,
         "events": 3, "seed": 0, "status": "failed: out of luck"},
    ]  # fmt: skip


def test_records_say_where_they_are_from(tmp_path):
    about = environment.environment(torch.device("cpu"), seed=3)
    assert about["kind"] == "environment" and about["seed"] == 3 and about["threads"] >= 1
    path = records.file_of(tmp_path, "decode", "NVIDIA H100 80GB HBM3")
    assert path.name == "decode-nvidia-h100-80gb-hbm3.jsonl"
    journal = records.Journal(path, about)
    journal.keep({"status": "ok"})
    journal.keep({"status": "failed"})
    with open(path, "a") as file:
        file.write('{"status": "o')
    later = {**about, "date": "2099-01-01T00:00:00+00:00"}
    again = records.Journal(path, later, lambda record: record["status"] == "ok")
    assert again.records == [about, {"status": "ok"}] and again.resumed == 1
    assert [json.loads(line) for line in path.read_text().splitlines()] == again.records
    for changed in ({"commit": "another"}, {"sources": "others"}, {"device": "another"}):
        other = records.Journal(path, {**later, **changed}, lambda record: True)
        assert other.resumed == 0
        journal = records.Journal(path, about)
        journal.keep({"status": "ok"})


def test_an_exception_in_one_line(capsys):
    compiler = "at 7:12:\n    x = tl.load(p)\n    ^\nTypeError('no pointer')"
    for text, said in (
        (compiler, "TypeError('no pointer')"),
        ("first\nsecond", "first"),
        ("", ""),
    ):
        try:
            raise RuntimeError(text)
        except RuntimeError as error:
            assert records.failure(error) == f"failed: RuntimeError: {said}"
        # Where it came from is in the log.
        assert "test_an_exception_in_one_line" in capsys.readouterr().err


def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    def full(self, content):
        raise OSError(28, "No space left on device")

    page = tmp_path / "README.md"
    page.write_text("<!-- table: demo -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["report", "--readme", str(page), "--results", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "README.md cannot be written: No space left" in told and told.count("\n") == 1
    assert "old" in page.read_text()


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "rewritten", interrupted)
    assert main(["report", "--check"]) == 130
    assert capsys.readouterr().err == "python -m bench report: interrupted\n"


def test_a_gpu_is_set_beside_what_was_predicted(results, tmp_path, monkeypatch):
    monkeypatch.setattr(report_plots, "write", lambda path: None)
    where = dict(shape="qwen2-vl-7b", context=25000, status="ok", batch=1)
    ours, drafts = "ours, dense", gpu_notes.INT4
    results.keep(
        "decode",
        {"kind": "pass", "what": ours, "pass": "dense", "ms": 13.3, "kernels": 2800, "layers": 28,
         **where},
        dict(kind="decode", what=ours, tokens_per_s={"median": 100.0}, **where),
        dict(kind="decode", what=drafts, tokens_per_s={"median": 130.0}, **where),
    )  # fmt: skip
    (path,) = results.path.glob("decode-*.jsonl")
    path.write_text(path.read_text().replace("NVIDIA H9", "NVIDIA H200"))
    page = tmp_path / "page.md"
    page.write_text("nothing to fill in\n")
    command = ["report", "--results", str(results.path), "--readme", str(page)]
    assert main([*command, "--check"]) == 1  # the notes are not there yet
    assert main(command) == 0 and main([*command, "--check"]) == 0
    told = (results.path / gpu_notes.NAME).read_text()
    assert "| ours, dense: dense | 4.80 | 13.30 | 2.77 | 10 | 100.0 |" in told
    assert f"| 1 x 25,000 | {drafts} | 1.45x | 1.30x | 299 | 130 |" in told
    path.unlink()
    assert gpu_notes.page(results.path) is None

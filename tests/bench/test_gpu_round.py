"""`bench gpu` with tiny stand-ins for its parts, on the CPU: ends in time, goes on, tells."""

import argparse
import itertools
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import environment, records
from bench.__main__ import COMMANDS, main
from bench.gpu import command, parts, passed, summary

CPU = ["--device", "cpu"]
PREFILL = ["--shape", "tiny", *CPU, "--tokens", "120", "--pairs", "1"]
DECODE = ["--quick", "--shape", "tiny", *CPU, "--batch", "1", "--context", "150", "--runs", "1",
          "--new-tokens", "12", "--ways", "dense"]  # fmt: skip
SOME_TESTS = """
import time, pytest
from pathlib import Path
def test_good(record_property):
    record_property("margin", 0.25)
def test_bad():
    assert 2 + 2 == 5, "arithmetic"
@pytest.mark.skip("no tool for it")
def test_skipped(): pass
def test_slow():
    Path(__file__).with_name("slow has begun").touch()
    time.sleep(SECONDS)
"""


@pytest.fixture
def about():
    return environment.environment(torch.device("cpu"))


@pytest.fixture
def some_tests(tmp_path, monkeypatch):
    """``some_tests(seconds)`` has the part "tests" run four, the last of which takes as long."""

    def make(seconds):
        path = tmp_path / "test_some.py"
        path.write_text(SOME_TESTS.replace("SECONDS", str(seconds)))
        monkeypatch.setattr(
            parts, "_tests", lambda: ["-n0", "--rootdir", str(tmp_path), str(path)]
        )
        return parts.Part("tests", 1, ["-v"], "pytest")

    return make


def is_running(pid):
    """Neither gone nor dead and waiting for someone to ask."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def round_of(out, about, some, seconds=200.0, resume=False):
    return parts.run_parts(out, about, some, time.monotonic() + seconds, resume)


def of_round(out, about):
    found = records.read(records.file_of(out, "round", about["device"]))[1:]
    return passed.tests_of(found), {r["part"]: r for r in found if r["kind"] == "part"}


def test_time_is_shared_and_what_is_left_is_for_the_rest(tmp_path, about, monkeypatch):
    now, given = [0.0], {}
    monkeypatch.setattr(parts, "time", SimpleNamespace(monotonic=lambda: now[0]))
    use = {"identity": 1.0, "one": 1.0, "promises": 1.0, "tests": 0.1, "kernels": 0.5}
    use |= {"many": 1.0, "prefill": 1.0, "memcheck": 1.0}
    adding = []

    def time_part(part, out, about, seconds, adds):
        given[part.name] = seconds
        adding.extend([part.name] * adds)
        now[0] += use[part.name] * seconds
        return {"kind": "part", "part": part.name, "passed": True, "complete": True}

    monkeypatch.setattr(parts, "time_part", time_part)
    assert parts.run_parts(tmp_path, about, parts.PARTS, 540.0, False) == 0
    assert sum(given[name] for name in ("identity", "one", "promises")) < 240
    left = 540 * (1 - 235 / 590)
    assert given["tests"] == pytest.approx(left * 140 / 355)
    assert given["kernels"] == pytest.approx((left - 0.1 * given["tests"]) * 70 / 215)
    assert adding == ["tests", "many", "memcheck"]  # what is there already of their commands stays
    assert now[0] == pytest.approx(540)  # to the end, and no further
    # Starting and the last thing begun come on top: a machine may stop it after 600 seconds.
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    box = parser.parse_args(["gpu", "--out", "x"]).seconds
    assert box + parts.GRACE < 570 and all(
        given[name] > 30 for name in given if name != "memcheck"
    )


@pytest.mark.parametrize("part", parts.PARTS, ids=lambda part: part.name)
def test_the_commands_know_what_they_are_asked(part):
    if part.runs == "pytest":
        command = [sys.executable, "-m", "pytest", "-n0", "--collect-only", "-q", *part.options]
        if part.name == "tests":
            command += [name for name in parts._tests() if name.endswith(".py")]
        done = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True)
        wanted = {"identity": "one_shape", "tests": "one_synch", "memcheck": "test_memcheck"}
        assert done.returncode == 0 and wanted[part.name] in done.stdout
        assert ("test_memcheck" in done.stdout) == (part.name == "memcheck")
        return
    parser = argparse.ArgumentParser()
    import_module(COMMANDS[part.runs]).add_parser(parser.add_subparsers())
    more = ["--seconds", "9", "--out", "x", "--resume"]
    parser.parse_args([part.runs, *part.options, *more])


def test_what_drafting_gains_is_asked_where_it_should_and_fits():
    """One row, then 8 and 32, and all of them on an 80 GB GPU."""
    from bench.decode import grid
    from bench.models import build

    parser = argparse.ArgumentParser()
    import_module(COMMANDS["decode"]).add_parser(parser.add_subparsers())
    cells = []
    for part in (part for part in parts.PARTS if part.runs == "decode"):
        options = parser.parse_args(["decode", *part.options])
        options.quick = False
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "free_memory", lambda device: 78 << 30)
            plan = grid.plan_of("qwen2-vl-7b", options, torch.device("cuda"))
        assert not plan.refused
        cells += plan.cells
    assert cells == [(25000, 1), (25000, 8), (25000, 32)]


def test_only_files_with_gpu_tests_are_collected():
    """The others need packages that a GPU machine may lack: one that fails to import ends all."""
    files = [name for name in parts._tests() if name.endswith(".py")]
    assert (
        "tests/kernels/test_gpu.py" in files and "tests/decode/weights/test_quantize.py" in files
    )
    assert 3 <= len(files) <= 8 and not any("reliability" in name for name in files)
    for name in files:
        source = (environment.ROOT / name).read_text()
        assert "\nimport av" not in source and "\nfrom av" not in source


def test_without_a_gpu_nothing_is_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["gpu", "--out", str(tmp_path / "out"), "--resume"]) == 2
    assert not (tmp_path / "out").exists() and "no GPU" in capsys.readouterr().err


def test_a_part_that_hangs_is_stopped_and_costs_nothing_else(tmp_path, about, capfd, monkeypatch):
    monkeypatch.setattr(parts, "GRACE", 0)
    ended = parts.time_part(parts.Part("decode", 1, DECODE), tmp_path, about, 0.2)
    assert ended["exit_status"] is None and not ended["passed"] and not ended["complete"]
    assert "decode: stopped after 0 s" in capfd.readouterr().out
    # With all that it has started.
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    sleep = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    with open(tmp_path / "log", "wb") as log:
        assert parts._run_apart([sys.executable, "-c", code, sleep], log, 3, {}, []) is None
    time.sleep(0.3)
    assert not is_running(int((tmp_path / "log").read_text()))


def test_a_part_that_cannot_run_says_why(tmp_path, about, capfd):
    assert round_of(tmp_path, about, [parts.Part("prefill", 1, ["--shape", "tiny", "--tokens"])])
    told = capfd.readouterr().out
    assert "prefill: exit status 2" in told and "--tokens: expected at least one argument" in told


def test_it_goes_on_where_it_was_cut_off(tmp_path, about, capfd, monkeypatch):
    """Decoding has no time at first; then its file is cut off in the middle of a line."""
    monkeypatch.setattr(parts, "GRACE", 200)
    prefill, decode = parts.Part("prefill", 1, PREFILL), parts.Part("decode", 1, DECODE)
    assert round_of(tmp_path, about, [prefill]) == 0
    assert round_of(tmp_path, about, [prefill, decode], parts.START - 1, resume=True) == 0
    _, ended = of_round(tmp_path, about)
    assert ended["prefill"]["complete"]
    assert ended["decode"]["passed"] and not ended["decode"]["complete"]
    read = records.file_of(tmp_path, "prefill", about["device"]).read_text()
    decoded = records.file_of(tmp_path, "decode", about["device"])
    assert "out of time" in decoded.read_text()
    told = capfd.readouterr().out
    assert "prefill: complete since" in told and "skipped: out of time: everything" in told

    assert round_of(tmp_path, about, [prefill, decode], resume=True) == 0
    told = capfd.readouterr().out
    assert "prefill: complete since" in told and "prefill: exit" not in told
    assert "ours, dense: " in told and "same 12 of 12" in told
    assert records.file_of(tmp_path, "prefill", about["device"]).read_text() == read
    whole = decoded.read_text()
    assert "out of time" not in whole and '"ours, dense"' in whole

    # Cut off within the record of the dense path: transformers' figures stay, the rest comes anew.
    # What came back from there lies in a folder of its own.
    lines = whole.splitlines(keepends=True)
    cut = next(n for n, line in enumerate(lines) if '"decode", "what": "ours, dense"' in line)
    decoded.write_text("".join(lines[:cut]) + lines[cut][:50])
    path = records.file_of(tmp_path, "round", about["device"])
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    new = tmp_path / "new"
    assert not command.bring(tmp_path / "nowhere", new, about["device"]) and not new.exists()
    assert command.bring(tmp_path, new, about["device"])
    assert round_of(new, about, [prefill, decode], resume=True) == 0
    decoded = records.file_of(new, "decode", about["device"])
    again = decoded.read_text().splitlines(keepends=True)
    assert again[:cut] == lines[:cut] and len(again) == len(lines)
    assert again[cut] != lines[cut]
    # A machine may give back no more than eight files.
    names = {path.name for path in new.iterdir()}
    assert len(names) <= 5 and parts.LOG in names and not any(".md" in name for name in names)

    # Other sources: nothing is gone on from.
    capfd.readouterr()
    other = {**about, "sources": "of another day"}
    assert round_of(new, other, [prefill], resume=True) == 0
    assert "prefill: exit status 0" in capfd.readouterr().out


def test_what_tests_say_is_there_when_they_are_cut_off(tmp_path, about, some_tests, capfd):
    """And those that passed are not run again."""
    part = some_tests(seconds=100)

    def monotonic():  # all the time is over once the last test has begun
        return time.monotonic() + (500 if (tmp_path / "slow has begun").exists() else 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "time", SimpleNamespace(monotonic=monotonic))
        patch.setattr(parts, "LOOK", 0.2)
        assert round_of(tmp_path, about, [part]) == 1
    tests, ended = of_round(tmp_path, about)
    states = {name.partition("::")[2]: record["status"] for name, record in tests.items()}
    assert states == {"test_good": "passed", "test_bad": "failed", "test_skipped": "skipped"}
    assert not ended["tests"]["complete"] and ended["tests"]["exit_status"] is None
    told = capfd.readouterr().out
    for words in ("stopped after 5", "1 passed, 1 failed, 1 skipped", "FAILED test_some.py::",
                  "AssertionError: arithmetic", "no tool for it", "margin 0.25"):  # fmt: skip
        assert words in told, words
    log = (tmp_path / parts.LOG).read_text()
    assert "assert 2 + 2 == 5" in log.replace("(2 + 2)", "2 + 2")  # a traceback, at once

    part = some_tests(seconds=0)
    assert round_of(tmp_path, about, [part], resume=True) == 1
    tests, ended = of_round(tmp_path, about)
    assert ended["tests"]["complete"] and [*tests.values()][-1]["status"] == "passed"
    log = (tmp_path / parts.LOG).read_text().rpartition("\n==== tests: ")[2]
    assert "test_good" not in log and "test_slow PASSED" in log and "1 deselected" in log
    capfd.readouterr()
    assert round_of(tmp_path, about, [part], resume=True) == 1  # remembered
    told = capfd.readouterr().out
    assert "tests: complete since an earlier run" in told and "2 passed, 1 failed" in told


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child may outlive its parent")
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_what_it_started_when_it_is_ended(tmp_path, end):
    """Two rounds must not write into one file, nor time beside one another."""
    script = (
        "import signal, sys, time\nfrom pathlib import Path\nfrom bench.gpu import parts\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "code = 'import os, time; print(os.getpid(), flush=True); time.sleep(100)'\n"
        "with open(sys.argv[1], 'wb') as log:\n"
        "    parts._run_apart([sys.executable, '-c', code], log, 100, {}, [])\n"
    )
    log = tmp_path / "log"
    process = subprocess.Popen([sys.executable, "-c", script, str(log)], cwd=environment.ROOT)
    for _ in range(300):
        if log.exists() and log.read_text().strip():
            break
        time.sleep(0.1)
    child = int(log.read_text())
    assert is_running(child)
    process.send_signal(end)
    assert process.wait(20) == (143 if end == signal.SIGTERM else -end)
    time.sleep(0.3)
    assert not is_running(child)


def test_parts_of_one_file_are_complete_each_by_its_own():
    """What "one" had no time for does not send "many" through it all again, nor the reverse."""
    late = "skipped: out of time"
    found = [
        dict(kind="decode", shape="qwen2-vl-7b", batch=1, status=late),
        dict(kind="first", shape="qwen2-vl-7b", batch=1, status=late),
        dict(kind="decode", shape="qwen2-vl-7b", batch=8, status="ok"),
        dict(kind="first", shape="demo", batch=1, status="ok"),
    ]
    assert summary.of("one", found) == found[:2] and summary.of("many", found) == found[2:]
    assert summary.of("kernels", found) == found


def test_a_summary_of_all_fits_where_little_is_shown():
    """As much as a full round finds, on a machine that shows the last 12,000 characters."""
    whole = [{"device": "NVIDIA H100 80GB HBM3", "copy_gb_per_s": 3015.0}]
    for (shape, context), batch in itertools.product(
        [("qwen2-vl-7b", 25000), ("demo", 1024), ("demo", 4096)], (8, 32, 1)
    ):
        where = dict(shape=shape, batch=batch, context=context)
        for suffix in ("", ", compiled", ", no graphs"):
            for what in ("ours, dense", "ours, forced acceptance 0.9",
                         "ours, forced acceptance 0.9, int4 drafts"):  # fmt: skip
                whole.append(
                    dict(kind="decode", what=what + suffix, status="ok", ms=12.345, ratio=1.8,
                         tokens_per_s={"median": 4321.0}, tokens_per_pass=4.1, first_use_s=12.0,
                         same_as_transformers="1280 of 1312", **where)
                )  # fmt: skip
                passing = dict(status="ok", ms=11.2, of_copy=0.83, **where)
                whole.append({"kind": "pass", "what": what + suffix, "pass": "verify", **passing})
        whole.append({"kind": "decode", "what": "everything", "status": "skipped: out of time",
                      **where})  # fmt: skip
    ops = [{"device": "NVIDIA H200"}, dict(op="copy", what="copy", gb_per_s=4300.0, size="4 GB")]
    for number in range(25):
        ops += [
            dict(op="verify_attention_with_scores", size=f"B 16, N 131072, T {number}", what=what,
                 status="ok", cold_ms=0.1, of_copy=0.9, ours_takes=0.7)
            for what in ("ours", "sdpa-flash", "flashinfer")
        ]  # fmt: skip
    failing = [{"device": "x"}] + [
        dict(kind="test", test=f"tests/decode/test_gpu.py::test_{n}", status="failed",
             text="E   AssertionError: tokens differ " + "x" * 300, properties={})
        for n in range(93)
    ]  # fmt: skip
    told = {
        "one": summary.lines("one", whole),
        "many": summary.lines("many", whole),
        "kernels": summary.lines("kernels", ops),
        "tests": summary.lines("tests", failing),
    }
    assert sum(len(line) + 3 for lines in told.values() for line in lines) < 11_300
    for name, lines in told.items():  # of a usual round nothing is left out
        assert "lines more" not in lines[-1], (name, lines)
    assert told["one"][0] == "a large copy moves 3,015 GB/s, 90% of the data sheet's"
    assert told["kernels"][0] == "a large copy moves 4,300 GB/s, 90% of the data sheet's"
    assert "  skipped: out of time: everything" in told["many"]
    way = "  ours, dense: 12.3 ms, 4,321/s, 1.80x, 4.10 a pass, same 1280 of 1312, first 12 s"
    assert way in told["one"] and way in told["many"]
    best = "100.0 us, 90% of copy; best rival sdpa-flash, ours takes 0.70x"
    assert told["kernels"][1].endswith(best)
    more = summary.lines("kernels", ops + [{**r, "size": f"more {r['size']}"} for r in ops[2:]])
    assert len(more) < 40 and more[-1] == f"and {51 + 1 - len(more) + 1} lines more"
    assert told["tests"][0] == "0 passed, 93 failed, 0 skipped"
    assert told["tests"][-1] == "and 85 more failed"

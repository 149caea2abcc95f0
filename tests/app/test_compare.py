"""`std-decode compare`: what it says is so, and a difference is never called identical."""

import json
from dataclasses import replace

import pytest
import torch

from std_decode.app import compare
from std_decode.app import main as cli
from std_decode.app.answer import Answer, ratio, side_by_side
from std_decode.rounds.rows import Rows
from tests.demo import tiny_qwen

DRAFTS = ["--draft-length", "3", "--top-k-keys", "8"]


@pytest.fixture(autouse=True)
def few_measurements(monkeypatch):
    """The advice of these tests need not be good."""
    monkeypatch.setattr(compare, "ADVISED_KEYS", (16,))
    monkeypatch.setattr(compare, "ADVISED_LENGTHS", (2,))


def compared(arguments, path, status=0):
    assert cli.main(["compare", *map(str, arguments), "--json", str(path)]) == status
    return json.loads(path.read_text())


def test_the_demo_model_is_compared(filmed, tmp_path, capsys):
    found = compared(["--video", filmed, *DRAFTS, "--repeat", 2], tmp_path / "a.json")
    told = " ".join(capsys.readouterr().out.split())
    assert found["identical"] and found["difference"] is None and "clip.mp4" in found["about"]
    assert " ".join(found["answer"].split()) in told and found["answer"].count("#") == 4
    assert found["answer_tokens"] == found["stats"]["emitted"] > 16 and found["runs"] == 2
    assert set(found["stats"]["draft_lengths"]) <= {1, 2, 3}  # shorter where the answer ends
    assert found["dtype"] == "float32" and found["versions"]["torch"] == torch.__version__
    for way in ("unpatched", "patched"):
        assert 0 < found[way]["first_seconds"] < found[way]["total_seconds"]
        assert found[way]["tokens_per_second"] > 0
    assert found["speedup"]["decoding"] > 0 and found["speedup"]["in_all"] > 0
    advice = found["advice"]
    assert [*advice["agreement_by_keys"]][:2] == ["8", "16"] and advice["why"] in told
    assert [point["draft_length"] for point in advice["rounds"]] == [0, 2, 3]
    assert f"advice: top_k_keys={advice['top_k_keys']}" in told and "medians of 2 runs" in told


def test_options_reach_both_ways_of_answering(llama, tmp_path):
    arguments = ["--model", llama, "--prompt", "Why?", "--max-new-tokens", 20, "--no-advice"]
    greedy = compared([*arguments, *DRAFTS], tmp_path / "a.json")
    sampled = compared([*arguments, *DRAFTS, "--sample", "--seed", 3], tmp_path / "b.json")
    again = compared([*arguments, *DRAFTS, "--sample", "--seed", 4], tmp_path / "c.json")
    int4 = compared([*arguments, *DRAFTS, "--draft-weights", "int4"], tmp_path / "d.json")
    assert len({found["answer"] for found in (greedy, sampled, again)}) == 3
    assert int4["answer"] == greedy["answer"]
    assert int4["stats"]["draft_weights"] == "int4" and greedy["stats"]["draft_weights"] is None
    for found in (greedy, sampled, again, int4):
        assert found["identical"] and found["stats"]["rounds"] > 3 and found["advice"] is None


def test_it_says_what_is_on_the_host(llama, tmp_path, capsys):
    arguments = ["--model", llama, "--prompt", "Why?", "--max-new-tokens", 20, "--no-advice"]
    found = compared([*arguments, *DRAFTS, "--kv-cache", "offloaded"], tmp_path / "a.json")
    assert found["identical"] and found["stats"]["rounds"] > 3
    kept = found["stats"]["host_kv_bytes"]
    assert kept and f"on the host, MiB │ │ {kept / 2**20:,.1f}" in " ".join(
        capsys.readouterr().out.split()
    )


def test_in_bfloat16_the_status_says_whether_tokens_are_identical(llama, tmp_path):
    figures = tmp_path / "a.json"
    arguments = ["--model", llama, "--prompt", "Why?", "--no-advice", "--dtype", "bfloat16"]
    status = cli.main(["compare", *map(str, arguments), *DRAFTS, "--json", str(figures)])
    found = json.loads(figures.read_text())
    assert found["dtype"] == "bfloat16" and status == (0 if found["identical"] else 1)
    assert found["identical"] == (found["difference"] is None)


def test_it_says_what_was_promised(llama, tmp_path, capsys):
    arguments = ["--model", llama, "--prompt", "Why?", "--max-new-tokens", 24, "--no-advice"]
    arguments += [*DRAFTS, "--dtype", "bfloat16"]
    found = compared(arguments, tmp_path / "a.json")
    assert found["identical"] and found["stats"]["promise"] == "unpatched"
    told = " ".join(capsys.readouterr().out.split())
    assert "promised │ │ the unpatched bits" in told
    path = tmp_path / "b.json"
    cli.main(["compare", *map(str, arguments), "--reproducible", "yes", "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["stats"]["promise"] == "reproducible"
    assert found["as_without_drafts"] is (None if found["identical"] else True)
    assert "drafts change no bit" in " ".join(capsys.readouterr().out.split())


def test_a_broken_promise_is_a_bug(llama, tmp_path, monkeypatch, capsys):
    plain = Rows.keep

    def keep(self, tokens, *args):
        drafted = tokens.shape[1] > 1
        return plain(self, (tokens + drafted) % 60, *args)

    monkeypatch.setattr(Rows, "keep", keep)
    arguments = ["--model", llama, "--prompt", "Why?", "--max-new-tokens", 24, "--no-advice"]
    arguments += [*DRAFTS, "--dtype", "bfloat16"]
    found = compared(arguments, tmp_path / "a.json", status=1)
    assert found["difference"]["promised"] and not found["difference"]["is_rounding"]
    assert "The unpatched model's own bits were promised" in " ".join(
        capsys.readouterr().out.split()
    )
    arguments += ["--reproducible", "yes"]
    found = compared(arguments, tmp_path / "b.json", status=1)
    assert found["as_without_drafts"] is False
    assert "Without drafts the tokens are others" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("wrong", ["1", "65", "maybe"])
def test_a_wrong_promise_is_refused_with_what_there_is(wrong, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", "--reproducible", wrong])
    assert end.value.code == 2
    assert "expected no, yes, auto, unpatched or 2 to 64 tokens" in capsys.readouterr().err


def test_a_bug_is_told_with_its_margin_and_status_1(llama, tmp_path, monkeypatch, capsys):
    plain = Rows.keep
    monkeypatch.setattr(
        Rows, "keep", lambda self, tokens, *args: plain(self, (tokens + 1) % 60, *args)
    )
    arguments = ["--model", llama, "--prompt", "Why?", "--max-new-tokens", 12, "--no-advice"]
    found = compared([*arguments, *DRAFTS], tmp_path / "a.json", status=1)
    told = " ".join(capsys.readouterr().out.split())
    difference = found["difference"]
    assert not found["identical"] and "NO" in told and "report it as a bug" in told
    assert difference["step"] == 0 and difference["patched"] != difference["unpatched"]
    assert difference["behind"] > 1e-4 and not difference["is_rounding"]
    assert "The first difference is token 1 of the answer" in told


def test_a_model_that_does_not_repeat_itself_is_not_called_identical(
    llama, tmp_path, monkeypatch, capsys
):
    plain, calls = compare.answer, []

    def unsteady(*args, **options):
        told = plain(*args, **options)
        calls.append(told)
        if len(calls) == 5:  # after a first pass, and unpatched, patched, patched
            told = replace(told, sequences=told.sequences.flip(1))
        return told

    monkeypatch.setattr(compare, "answer", unsteady)
    arguments = ["--model", llama, "--prompt", "Why?", "--max-new-tokens", 12, "--no-advice"]
    found = compared([*arguments, *DRAFTS, "--repeat", 2], tmp_path / "a.json", status=1)
    assert not found["identical"] and not found["unpatched_repeats_itself"]
    assert "differ among themselves" in capsys.readouterr().out


def test_a_short_answer_has_no_advice(llama, tmp_path, capsys):
    arguments = ["--model", llama, "--prompt", "Why?", "--max-new-tokens", 1]
    found = compared(arguments, tmp_path / "a.json")
    assert "has 1 tokens, too few" in found["advice"]["none_because"]
    assert found["unpatched"]["tokens_per_second"] == 0 and found["speedup"]["decoding"] is None
    assert "no advice: " in capsys.readouterr().out


def test_a_file_that_cannot_be_written_is_refused_before_the_work(capsys):
    assert cli.main(["compare", "--json", "no/such/folder/a.json"]) == 2
    assert "--json: no/such/folder/a.json cannot be a file" in capsys.readouterr().err


def test_ratios_are_of_the_runs_side_by_side():
    def run(speed, seconds):
        return Answer(torch.zeros(1, 1), "", 1, 0.1, seconds, speed)

    told = {
        "unpatched": [run(10, 4), run(20, 2), run(10, 8)],
        "patched": [run(20, 1), run(10, 4), run(30, 2)],
    }
    assert ratio(told, "unpatched", "tokens_per_second") == 2
    assert ratio(told, "unpatched", "total_seconds") == 4
    cells = [list(column.cells) for column in side_by_side("a", told).columns]
    assert cells[0][1:5] == ["decoding, tokens/s", "  patched is", "in all, s", "  patched is"]
    assert cells[1][1:5] == ["10.0", "2.00x", "4.000", "4.00x"] and cells[2][1] == "20.0"


COMMAND = "import sys\nfrom std_decode.app import main as cli\nsys.exit(cli.main(sys.argv[1:]))"


@pytest.mark.torchvision
@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_a_model_from_a_folder_is_compared(tmp_path, filmed, checkpoints, family):
    arguments = ["--model", checkpoints / family, "--video", filmed, "--frames", 8, *DRAFTS,
                 "--prompt", "Why?", "--max-new-tokens", 24, "--json", "a.json"]  # fmt: skip
    done = tiny_qwen.run(COMMAND, "compare", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["identical"] and found["answer_tokens"] == 24 and found["dtype"] == "float32"
    assert found["about"] == f"{family}, clip.mp4, 8 frames" and found["stats"]["rounds"] > 3
    keys = list(found["advice"]["agreement_by_keys"])
    assert keys[:2] == ["8", "64"] and int(keys[-1]) > 100  # all of the video

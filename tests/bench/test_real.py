"""`bench real`, with a tiny model of random weights in the pretrained one's place."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import environment, records
from bench.__main__ import main
from bench.models import pretrained
from bench.real import measure, texts
from bench.real.command import good
from bench.report import tables as report_tables
from bench.report.real import tables
from std_decode.rounds.rows import Rows

FEW = ["real", "--quick"]


class Words:
    """A tokenizer: each character a token."""

    def __call__(self, text, return_tensors=None):
        ids = [ord(letter) % 120 for letter in text]
        ids = torch.tensor([ids]) if return_tensors else ids
        return _Encoded(input_ids=ids, attention_mask=torch.ones(1, len(text), dtype=torch.long))

    def decode(self, ids):
        return "".join(map(chr, ids))

    def apply_chat_template(self, turns, **_):
        return self("".join(turn["content"] for turn in turns), "pt")


class _Encoded(dict):
    __getattr__ = dict.__getitem__


def load(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    model.generation_config.eos_token_id = None
    return Words(), model


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """``bench(*arguments)``: exit status, and the records, the environment first."""
    monkeypatch.setattr(pretrained, "installed", lambda: True)
    monkeypatch.setattr(pretrained, "load", load)

    def call(*arguments):
        status = main([*FEW, *arguments, "--out", str(tmp_path)])
        part = arguments[arguments.index("--parts") + 1] if "--parts" in arguments else "*"
        paths = sorted(tmp_path.glob(f"real-{part}-*.jsonl"))
        return status, [record for path in paths for record in records.read(path)]

    return call


def test_every_part_and_what_is_kept_of_an_earlier_run(bench, capsys):
    status, (about, *found) = bench("--parts", "acceptance")
    assert status == 0 and about["model"] == pretrained.NAME and len(found) == 4
    assert {record["draft_weights"] for record in found} == {None, "int4"}
    assert all(record["identical"] and record["drafted"] > 10 for record in found)
    status, more = bench("--resume")
    assert status == 0 and more[:5] == [about, *found]
    assert [record.get("part") for record in more[5:]] == [
        None, "rounding", "rounding", None, "speed", "speed"
    ]  # fmt: skip
    assert more[6]["steps"] == 16 and more[6]["as promised"]["lags"] == []
    assert set(more[9]["tokens_per_s"]) == set(measure.timed_ways()) == {"unpatched", *texts.WAYS}
    assert all(rate > 0 for rate in more[9]["tokens_per_s"].values())
    assert [(record["kind"], record["task"]) for record in more[9:]] == list(measure.TIMED)
    assert bench("--resume")[1] == more  # nothing is done twice
    assert "every key, 4-bit weights" in capsys.readouterr().out


def test_ways_that_are_asked_for_are_timed_beside_unpatched(bench):
    status, (about, *found) = bench("--parts", "speed", "--ways", "auto", "dense path")
    assert status == 0
    for record in found:
        assert set(record["tokens_per_s"]) == {"unpatched", "dense path", "auto"}
        (turn,) = record["auto_over_dense"]
        assert f"| {turn:.2f} ({turn:.2f} to {turn:.2f}) |" in "\n".join(tables(about, [record]))


def test_copies_alone(bench):
    status, (about, *found) = bench("--copies")
    assert status == 0 and [record["kind"] for record in found] == ["prose", "table"]
    for record in found:
        assert record["part"] == "acceptance" and record["identical"]
        assert (record["draft_weights"], record["top_k_keys"]) == ("int4", measure.EVERY)
    rates = [record["accepted"] / record["drafted"] for record in found]
    (row,) = (line for line in tables(about, found) if line.startswith("| every key"))
    assert f" {sum(rates) / 2:.0%} " in row.split("|")[-4]


def test_parts_may_be_of_different_commits(bench, monkeypatch, tmp_path):
    plain, ways = environment.environment, {"unpatched": None, "auto": dict(draft_length="auto")}
    monkeypatch.setattr(measure, "timed_ways", lambda: ways)

    def of_commit(commit, part):
        monkeypatch.setattr(
            environment,
            "environment",
            lambda *at, **more: {**plain(*at, **more), "commit": commit},
        )
        assert bench("--parts", part)[0] == 0

    of_commit("a" * 40, "acceptance")
    of_commit("b" * 40, "speed")
    pages = [report_tables.real(tmp_path), report_tables.real_short(tmp_path)]
    for lines in pages:
        last = [line for line in lines if "commit" in line]
        assert [f"commit {c * 9}" in line for c, line in zip("ab", last)] == [True, True]
    assert all("| prose, summary | 300 |" in "\n".join(lines) for lines in pages)
    assert report_tables.real_short(tmp_path / "none") == []


def test_tokens_that_differ_are_a_failure(bench, monkeypatch):
    plain = Rows.keep

    def keep(self, tokens, agreed, limit):
        return plain(self, tokens, agreed * 0 + tokens.shape[1] - 1, limit)

    monkeypatch.setattr(Rows, "keep", keep)
    status, (_, *found) = bench("--parts", "acceptance")
    assert status == 1 and any(not record["identical"] for record in found)
    assert "A BUG" in "\n".join(tables({"model": "m", "new_tokens": 16, **ABOUT}, found))


def test_what_fails_is_said_and_the_rest_goes_on(bench, monkeypatch):
    plain = measure.text

    def fail(tokenizer, model, kind, *rest):
        if kind == "prose":
            raise RuntimeError("no such luck")
        return plain(tokenizer, model, kind, *rest)

    monkeypatch.setattr(measure, "text", fail)
    status, (_, first, second) = bench("--parts", "speed")
    assert status == 1 and first["status"] == "failed: RuntimeError: no such luck"
    assert second["status"] == "ok"
    speeds = {"unpatched": True, texts.LOOKUP: False}
    assert good({"status": "ok", "identical": speeds})  # theirs is not our bug
    assert not good({"status": "ok", "identical": {**speeds, "auto": False}})


def test_without_the_model_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "installed", lambda: False)
    assert main(FEW) == 2
    assert pretrained.INSTALL in capsys.readouterr().err


def test_texts_are_as_long_as_asked_and_all_different():
    tokenizer, seen = Words(), set()
    for kind in texts.KINDS:
        for task in texts.TASKS:
            ids = texts.prompt(tokenizer, kind, task, 3000, 1)["input_ids"]
            assert ids.shape[0] == 1 and 2600 <= ids.shape[1] <= 3300, (kind, task, ids.shape)
            seen.add(tuple(ids[0].tolist()))
    seen |= {tuple(texts.prompt(tokenizer, k, "summary", 3000, 5)["input_ids"][0].tolist())
             for k in texts.KINDS}  # fmt: skip
    assert len(seen) == 16


def test_longer_texts_take_the_tasks_in_turn():
    chosen = list(measure.choose(texts.KINDS, texts.TASKS, [4000, 1000]))
    assert len(chosen) == len(set(chosen)) == 12 + 4
    assert {which[:2] for which in chosen[:12]} == {
        (k, t) for k in texts.KINDS for t in texts.TASKS
    }
    assert [task for _, task, size in chosen if size == 4000] == [
        "question", "continuation", "summary", "question"
    ]  # fmt: skip


ABOUT = {"device": "CPU", "torch": "9", "date": "2031-02-03T04:05:06+00:00"}


def test_tables_add_up_counts():
    way = {"top_k_keys": 64, "draft_length": 4, "reselect": True, "draft_weights": None}
    one = {"part": "acceptance", "status": "ok", "kind": "code", "task": "summary", **way,
           "tokens": 1000, "drafted": 10, "accepted": 9, "steps": 12, "passes": 3,
           "identical": True}  # fmt: skip
    other = {**one, "kind": "prose", "tokens": 2000, "drafted": 30, "accepted": 15, "passes": 9}
    failed = {"part": "speed", "status": "failed: no"}
    found = tables({"model": "m", "new_tokens": 9, **ABOUT}, [one, other, failed])
    row = next(line for line in found if line.startswith("| 64 keys"))
    assert row == "| 64 keys | 4 | yes | 90% | 50% | 90% | 50% | 60% | 70% | 2.00 | 2 of 2 |"
    assert found[-1].startswith("m, greedy, at most 9 tokens an answer; CPU, torch 9")

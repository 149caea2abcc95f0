"""Nothing grows from call to call; a small part of `python -m tests.reliability soak`."""

import pytest

from std_decode.passes import graphs
from std_decode.passes.engine import Engine
from std_decode.passes.pool import Engines
from tests.reliability.lossless import quiet
from tests.reliability.soak import grown, soak


@pytest.mark.parametrize("captured", [False, True])
def test_a_short_soak(captured):
    quiet()
    looks = soak(60, captured, windows=8)
    assert not grown(looks) and len(looks) > 4
    assert (max(look.passes for look in looks) > 0) == captured


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("captured", [False, True])
def test_a_long_soak(captured):
    quiet()
    assert not grown(soak(10_000, captured))


def keep_all_engines(monkeypatch):
    kept, plain = [], Engines.put_back

    def put_back(self, engine):
        kept.append([layer.keys for layer in engine.cache.layers])
        plain(self, engine)

    monkeypatch.setattr(Engines, "put_back", put_back)
    monkeypatch.setattr(Engine, "release", lambda self: None)


def keep_all_passes(monkeypatch):
    plain = graphs.Graphs.run

    def run(self, key, step):
        return plain(self, (key, self.captures, self.replays), step)  # never seen before

    monkeypatch.setattr(graphs, "list", lambda captured: [], raising=False)  # none is the oldest
    monkeypatch.setattr(graphs.Graphs, "run", run)


@pytest.mark.parametrize("leak", [keep_all_engines, keep_all_passes])
def test_a_leak_would_be_seen(monkeypatch, leak):
    quiet()
    leak(monkeypatch)
    found = grown(soak(40, captured=leak is keep_all_passes, windows=8))
    assert any("tensor" in line or "passes" in line for line in found)

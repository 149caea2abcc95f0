"""Parts of the round that the tokens cannot show, because the tokens never depend on them."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

import std_decode
from std_decode.model.cache import BufferLayer, SparseToDenseCache
from std_decode.model.selection_rules import plan_selection
from std_decode.passes.engine import Engine
from std_decode.rounds.noise import upcoming_noise
from std_decode.stats import Clock, DecodeStats


def test_importance_is_the_best_share_lately():
    """Scores are shares of their round; an earlier round's fade; the largest counts."""
    selection = plan_selection(
        torch.ones(1, 20, dtype=torch.bool), None, top_k_keys=2, new_tokens=20
    )
    cache = SimpleNamespace(prompt=0, capacity=32, most_drafts=4)
    cache.tail_start = torch.tensor([20], dtype=torch.int32)
    layers = cache.selecting_layers = [BufferLayer(cache, None) for _ in range(2)]
    engine = Engine(None, {}, cache, True)
    engine.clock, engine.reselects = Clock(DecodeStats(), torch.device("cpu")), True

    def chosen(*scores):
        for layer in layers:
            # Room for generated keys behind the prompt, which must not be selected.
            newest = torch.full((1, 1, 32 if cache.prompt else 20), 1e-3)
            newest[..., 20:] = 9.0
            for position, value in scores:
                newest[..., position] = value
            layer.weigh(newest) if cache.prompt else layer.weigh_prompt(newest, 2)
        if cache.prompt:
            engine.renew()
        engine.select(selection)
        cache.prompt = 20
        assert torch.equal(layers[0].indices, layers[1].indices)
        return layers[0].indices[0, 0].tolist()

    sinks = [0, 1, 2, 3]
    assert chosen((10, 5.0), (12, 4.0)) == [*sinks, 10, 12]
    # Ten times the scores are no more than the shares they make: 0.55 and 0.45.
    assert chosen((15, 50.0), (16, 40.0)) == [*sinks, 10, 15]
    assert chosen((17, 9.0)) == [*sinks, 15, 17]
    for _ in range(5):  # 17 fades from 1 to 0.59, and is still worth more than 0.4
        assert chosen((18, 6.0), (19, 4.0)) == [*sinks, 17, 18]
    for _ in range(5):
        last = chosen((18, 6.0), (19, 4.0))
    assert last == [*sinks, 18, 19]


def test_any_draft_length_may_follow_another(make_case):
    """Each verified row is scored by its own draft step's lse; dense steps leave all as it is."""
    case = make_case("llama")
    ids = case.inputs["input_ids"]
    prompt = ids.shape[1]
    with std_decode.patched(case.model):
        layers = case.model._std_decode.layers
    cache = SparseToDenseCache(case.model.config, prompt + 40, 1, ids.device, most_drafts=4)
    engine = Engine(case.model.config, layers, cache, reselect=True)
    selection = plan_selection(torch.zeros_like(ids, dtype=torch.bool), None, 8, prompt)
    engine.start(case.model.__call__, DynamicCache(), None, selection, DecodeStats())
    layer = cache.layers[0]
    drafted, estimates = [], []

    def note_lse(lse):
        drafted.append(lse.clone())
        BufferLayer.note_lse(layer, lse)

    def lse_estimate():
        estimates.append(BufferLayer.lse_estimate(layer))
        return estimates[-1]

    layer.note_lse, layer.lse_estimate = note_lse, lse_estimate
    with torch.no_grad():
        engine.prefill(input_ids=ids, position_ids=torch.arange(prompt)[None])
        for gamma in (4, 0, 1, 3, 0, 2):
            drafted.clear(), estimates.clear()
            before = layer.importance.clone()
            positions = cache.longest + torch.arange(gamma + 1)[None]
            engine.draft_and_verify(
                ids[:, :1], positions, gamma, lambda logits, _: logits.argmax(-1), {}
            )
            cache.advance(1, cache.longest + 1)
            assert engine.stats.calls["select"] == 1 + engine.stats.rounds
            assert torch.equal(before, layer.importance) == (gamma == 0)
            assert len(drafted) == gamma
            if gamma:
                assert torch.equal(estimates[0], torch.cat([*drafted, drafted[-1]], -1))
            else:
                assert not estimates
    assert engine.stats.rounds == 4


def test_the_clock_goes_by_the_stream_that_works_and_waits_for_it(monkeypatch):
    """The cache may be on another device than the current one; events by default are not."""
    device = torch.device("cuda", 1)

    class Event:
        stream, waited = None, False

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream=None):
            self.stream = stream

        def synchronize(self):
            self.waited = True

        def elapsed_time(self, end):
            assert end.waited and self.stream == end.stream == ("stream of", device)
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", device))
    stats = DecodeStats()
    clock = Clock(stats, device)
    for _ in range(2):
        with clock.timed("draft"):
            pass
    for _ in range(2):  # the second time there is nothing new
        clock.settle()
        assert stats.seconds["draft"] == 0.5 and stats.calls["draft"] == 2


@pytest.mark.parametrize("rows", [1, 3])
def test_upcoming_noise_is_what_multinomial_draws(rows):
    """argmax(p / q) with the peeked q is what torch.multinomial goes on to choose."""
    torch.manual_seed(3)
    probabilities = torch.rand(4, rows, 50).softmax(-1)
    before = torch.get_rng_state()
    noise = upcoming_noise(probabilities[0], 4)
    assert torch.equal(before, torch.get_rng_state())
    for p, q in zip(probabilities, noise):
        assert torch.equal((p / q).argmax(-1), torch.multinomial(p, 1)[:, 0])

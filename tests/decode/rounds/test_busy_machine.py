"""What draft_length="auto" loses and keeps on machines that have other work to do.

Against dense decoding on the same machine in the same states, see `Machine.worth`.
"""

import itertools
from functools import lru_cache
from statistics import mean

import pytest

from std_decode.rounds.policy import Policy
from tests.decode.machines import IDLE, Load, Machine, bursts, log_normal, pareto
from tests.decode.rounds.test_policy import best, workload

STEADY = {
    "idle": Load(),
    "a little": Load(noise=log_normal(0.3)),
    "much": Load(noise=log_normal(0.6)),
    "thin tail": Load(noise=pareto(3)),
    "heavy tail": Load(noise=pareto(2)),
    "tail of drafts": Load(draft_noise=pareto(2)),
    "bursts": Load(noise=bursts(0.05, 20)),
    "bursts in drafts": Load(draft_noise=bursts(0.2, 5)),
}
BUSY = {
    "all": (3.0, 3.0, 3.0),
    "all of it": (10.0, 10.0, 10.0),
    "drafts": (2.0, 10.0, 5.0),
    "dense": (10.0, 2.0, 5.0),
}
DRIFT = tuple((2 ** (i / 20), 1.0, (1 + 2 ** (i / 20)) / 2) for i in range(40, -1, -1))


def changing():
    """Loads that come and go, as many dense steps long, or are there first and go."""
    for name, busy in BUSY.items():
        for stretch, noise in ((30, 0.0), (100, 0.0), (100, 0.3), (400, 0.1)):
            yield f"{name}, {stretch}, {noise}", Load((IDLE, busy), stretch, log_normal(noise))
            yield f"{name} first, {stretch}", Load((busy, IDLE), stretch, log_normal(noise))
    yield "slowly less", Load(DRIFT + DRIFT[::-1], 12.0, log_normal(0.1))
    # Two busy processes on two cores: barriers wait for threads that do not run.
    yield "threads", Load(((3.0, 40.0, 20.0),), 0, log_normal(0.2), log_normal(0.6))


LOADS = STEADY | dict(changing())
# A draft step; verification of one token, and of each more. Drafts can hardly pay on the second.
MACHINES = ((0.1, (1.0, 0.01)), (0.9, (1.5, 0.1)))
ACCEPTANCES = (0.0, 0.6, 0.95, (0.95, 0.1), (0.1, 0.95))
SEEDS = range(8)
LENGTHS = (256, 512)


def decode(load, draft, acceptance, verify, seed, rows=1):
    first, then = acceptance if isinstance(acceptance, tuple) else (acceptance, acceptance)
    length = Policy().begin(workload(draft if seed % 2 else 0.15), rows)
    machine = Machine(draft, verify, load, seed, rows)
    return machine.go(length, first, 200).go(length, then, max(LENGTHS))


@lru_cache(maxsize=None)
def taken(name, draft, acceptance, verify):
    """Dense steps that could have been made for each token, at both lengths, on average."""
    runs = [decode(LOADS[name], draft, acceptance, verify, seed) for seed in SEEDS]
    return [mean(run.after(tokens) for run in runs) for tokens in LENGTHS]


@pytest.mark.parametrize("name", LOADS)
def test_no_load_makes_a_call_much_slower_than_dense(name):
    """Than 0.9 of its speed, with the same load at the same moments, of any cell."""
    for (draft, verify), acceptance in itertools.product(MACHINES, ACCEPTANCES):
        assert max(taken(name, draft, acceptance, verify)) <= 1 / 0.9, (draft, acceptance)


@pytest.mark.parametrize(
    "name", ["a little", "all, 100, 0.3", "dense first, 100", "drafts, 100, 0.3", "threads"]
)
def test_nor_a_call_of_several_rows(name):
    for (draft, verify), acceptance in itertools.product(MACHINES, ACCEPTANCES):
        runs = [decode(LOADS[name], draft, acceptance, verify, seed, 4) for seed in SEEDS]
        for tokens in LENGTHS:
            assert mean(run.after(tokens) for run in runs) <= 1 / 0.9, (draft, acceptance)


@pytest.mark.parametrize(
    "name, part", [("a little", 0.6), ("thin tail", 0.5), ("heavy tail", 0.3)]
)
def test_much_of_a_clear_gain_is_had_in_spite_of_noise(name, part):
    draft, verify = MACHINES[0]
    for acceptance in (0.6, 0.8, 0.95):
        gain = 1 / best(acceptance, draft, verify) - 1
        got = 1 / taken(name, draft, acceptance, verify)[-1] - 1
        assert gain >= 0.5 and got >= part * gain, (acceptance, got, gain)


@pytest.mark.parametrize("busy", [*BUSY.values(), (3.0, 40.0, 20.0), (1.5, 5.0, 3.0)])
def test_drafts_come_back_when_the_other_work_is_done(busy):
    """In short calls too, which have little to lose: five on the busy machine, then idle ones."""
    for draft, seed in itertools.product((0.1, 0.4), range(3)):
        policy, machine = Policy(), Machine(draft, (1.2, 0.05), Load((busy,)), seed)
        for call in range(25):
            if call == 5:
                machine.state = IDLE
            machine.start()
            length = policy.begin(workload(draft), 1)
            machine.go(length, 0.9, 64)
            length.end()
            if call == 20:
                worth, tokens = 0.0, 0
            if call >= 20:
                worth, tokens = worth + machine.worth, tokens + machine.tokens
        assert worth / tokens < (1 + best(0.9, draft, (1.2, 0.05))) / 2, (draft, seed)


@pytest.mark.parametrize("acceptance", [0.0, 0.03])
@pytest.mark.parametrize("name", ["idle", "a little", "heavy tail", "all, 100, 0.3"])
def test_drafts_that_are_nearly_always_rejected_are_given_up(name, acceptance):
    """As with a grammar whose state they lack. After 64 tokens: one round of 16 at the most."""
    for draft in (0.1, 0.4, 0.9):
        drafted, rounds = 0, 0
        for seed in SEEDS:
            run = decode(LOADS[name], draft, acceptance, (1.2, 0.05), seed)
            late = [gamma for gamma, (tokens, _) in zip(run.chosen, run.ends) if tokens > 64]
            drafted, rounds = drafted + sum(gamma > 0 for gamma in late), rounds + len(late)
            assert max(map(run.after, LENGTHS)) <= 1.06, (draft, seed)
        assert drafted <= rounds / 16, draft


def test_a_call_after_one_whose_drafts_were_rejected_begins_with_few():
    policy = Policy()
    for call in range(10):
        length = policy.begin(workload(0.1), 1)
        run = Machine(0.1, (1.2, 0.05), Load(), call).go(length, 0.0, 64)
        length.end()
        assert run.worth <= 64 + 4.0
    assert sum(gamma > 0 for gamma in run.chosen) <= 3

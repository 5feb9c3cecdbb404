"""The hub's rules one by one, without a hub."""

from __future__ import annotations

import itertools
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hub_support import Source, make_rollout, make_run
from hypothesis import given

from sgpo_async.config.schema import Evaluation
from sgpo_async.hub.actors import Actors, Meter
from sgpo_async.hub.admission import lowest_version, room
from sgpo_async.hub.balance import balance
from sgpo_async.hub.batch_metrics import figures
from sgpo_async.hub.learner_ranks import LearnerRanks
from sgpo_async.hub.leases import LeaseTable
from sgpo_async.hub.ledger import Ledger
from sgpo_async.hub.validation import other_tokenizer, refusal
from sgpo_async.rollout.completed import CompletedGroup
from sgpo_async.tasks.benchmarks import Benchmark
from sgpo_async.tasks.task_sampler import TaskSampler
from sgpo_async.wire import records as wire

# ---- ledger


def test_a_ledger_that_does_not_balance_is_a_programming_error():
    ledger = Ledger(dispatched=5, trained=2)
    ledger.drop("stale", 1)
    ledger.check(in_flight=1, buffered=1)
    with pytest.raises(AssertionError):
        ledger.check(in_flight=1, buffered=0)


# ---- admission


@pytest.mark.parametrize(
    ("live", "max_lag", "steps_left", "expected"),
    [(0, 0, 9, 4), (4, 0, 9, 0), (4, 2, 9, 8), (12, 2, 9, 0), (0, 2, 1, 4), (3, 2, 1, 1), (0, 2, 0, 0)],
)
def test_room_is_what_lag_and_remaining_steps_leave(live, max_lag, steps_left, expected):
    assert room(live=live, batch=4, max_lag=max_lag, steps_left=steps_left) == expected


@given(steps=st.integers(0, 50), buffered=st.integers(0, 40), running=st.integers(0, 40), eta=st.integers(0, 5))
def test_room_is_the_rule_of_areal(steps, buffered, running, eta):
    batch, accepted = 4, steps * 4 + buffered
    areal = accepted + running < (eta + steps + 1) * batch
    assert (room(live=buffered + running, batch=batch, max_lag=eta, steps_left=100) > 0) == areal


@given(version=st.integers(0, 9), batch=st.integers(1, 5), eta=st.integers(0, 4), data=st.data())
def test_tokens_of_the_lowest_version_are_not_stale_where_the_task_lands(version, batch, eta, data):
    ahead = data.draw(st.integers(0, (eta + 1) * batch - 1))
    lowest = lowest_version(version=version, ahead=ahead, batch=batch, max_lag=eta)
    lands_in = version + ahead // batch
    assert lands_in - lowest == eta and lowest <= version


# ---- balance


@given(weights=st.lists(st.integers(1, 50), max_size=8), ranks=st.integers(1, 4))
def test_balance_is_a_partition_within_grahams_bound(weights, ranks):
    shares = balance(weights, ranks)
    assert sorted(itertools.chain(*shares)) == list(range(len(weights)))
    assert sum(1 for share in shares if share) == min(ranks, len(weights))
    best = (
        min(
            max(sum(w for w, rank in zip(weights, chosen, strict=True) if rank == r) for r in range(ranks))
            for chosen in itertools.product(range(min(ranks, 3)), repeat=min(len(weights), 6))
            if len(chosen) == len(weights)
        )
        if len(weights) <= 6 and ranks <= 3
        else None
    )
    if best is not None:
        assert max(sum(weights[i] for i in share) for share in shares) <= best * (4 / 3 - 1 / (3 * ranks)) + 1e-9


# ---- figures


def group(number: int, rewards: list[float], guided_rewards: list[float], versions: tuple[int, ...]) -> CompletedGroup:
    lease = wire.Lease(
        task=number, attempt=0, purpose="train", problem="", answer="", verifier="", strategy="",
        autonomous=len(rewards), guided=len(guided_rewards), min_version=0, seed=0, temperature=1.0, top_p=1.0,
        max_new_tokens=8,
    )  # fmt: skip
    made = [
        make_rollout(lease, slot, versions=versions, reward=reward)
        for slot, reward in enumerate(rewards + guided_rewards)
    ]
    return CompletedGroup(number=number, attempt=0, rollouts=tuple(made))


def test_figures_of_a_batch():
    groups = [group(0, [0, 0], [1], (3,)), group(1, [1, 0], [1], (2, 4)), group(2, [1, 1], [0], (4,))]
    result = figures(groups, version=5)
    assert (result["pass_auto"], result["pass_guided"]) == (pytest.approx(0.5), pytest.approx(2 / 3))
    assert result["lag"]["histogram"] == {"1": 6 + 6, "2": 6, "3": 6}
    assert result["lag"]["max"] == 3 and result["lag"]["mean"] == pytest.approx((12 * 1 + 6 * 2 + 6 * 3) / 24)


def test_figures_without_guided_rollouts():
    assert figures([group(0, [1, 0], [], (0,))], version=0)["pass_guided"] is None


# ---- tasks and leases


def test_tasks_are_functions_of_their_number():
    task_sampler = TaskSampler(make_run(), Source(held_out=2, bare_every=3))
    assert task_sampler.task(4) == task_sampler.task(4)
    assert (task_sampler.task(3).guided, task_sampler.task(4).guided) == (0, 1)
    assert [task_sampler.task(n).problem.problem for n in (-1, -2, -3)] == ["held-out 0", "held-out 1", "held-out 0"]
    assert task_sampler.task(-1).seed == task_sampler.task(-3).seed != task_sampler.task(-2).seed
    assert task_sampler.task(0).seed != task_sampler.task(1).seed != task_sampler.task(-1).seed


def test_a_round_walks_over_held_out_problems_and_then_benchmarks():
    run = replace(make_run(), evaluation=Evaluation(samples=2, temperature=0.6, top_p=0.95))
    source = Source(held_out=2)
    hard = Benchmark(name="hard", problems=[source.training(i) for i in (7, 8, 9)], samples=4)
    task_sampler = TaskSampler(run, source, [hard])
    assert task_sampler.round_size == 5
    problems = [task_sampler.task(n).problem.problem for n in range(-1, -7, -1)]
    assert problems == ["held-out 0", "held-out 1", "training 7", "training 8", "training 9", "held-out 0"]
    held_out, task = task_sampler.task(-2), task_sampler.task(-3)
    assert (held_out.autonomous, held_out.guided, held_out.verifier) == (2, 2, "exact")
    assert (task.autonomous, task.guided, task.verifier) == (4, 0, "math")
    assert [task_sampler.benchmark(n) for n in (-2, -3, -5, -6, -8)] == [None, hard, hard, None, hard]
    lease = task.lease(attempt=0, min_version=0)
    assert (lease.temperature, lease.top_p, lease.max_new_tokens) == (0.6, 0.95, run.rollout.max_new_tokens)
    assert (task_sampler.task(0).sampling.temperature, task_sampler.task(0).sampling.top_p) == (1.0, 1.0)
    assert held_out.seed == TaskSampler(run, source).task(-2).seed


@pytest.fixture
def leases() -> LeaseTable:
    task_sampler, leases = TaskSampler(make_run(), Source()), LeaseTable()
    for number in (0, 1, 2):
        leases.add(task_sampler.task(number))
    return leases


def test_a_book_without_tokens_still_counts_them_and_their_versions():
    task_sampler, leases = TaskSampler(make_run(autonomous=1, guided=1), Source()), LeaseTable(keeps_tokens=False)
    leases.add(task_sampler.task(0))
    lease = leases.lease(b"a", min_version=0, now=0.0)
    for slot in (0, 1):
        leases.arrive(make_rollout(lease, slot, versions=(1, 2)), now=1.0)
    kept, _ = leases.complete[0].rollouts
    assert (leases.tokens, len(kept.prompt), len(kept.tokens), len(kept.logprobs)) == (8, 0, 0, 0)
    assert kept.token_versions().tolist() == [1, 1, 2, 2] and kept.reward == 1.0


def test_a_lost_lease_goes_before_younger_tasks_under_the_next_attempt(leases):
    first, second = (leases.lease(b"a", min_version=0, now=0.0) for _ in range(2))
    leases.arrive(make_rollout(first, 0), now=1.0)
    for number in (1, 0):
        leases.revoke(number, "lease_lost")
    again = [leases.lease(b"b", min_version=0, now=2.0) for _ in range(3)]
    assert [(lease.task, lease.attempt) for lease in again] == [(0, 1), (1, 1), (2, 0)]
    assert again[0].seed == first.seed and again[1].seed == second.seed
    assert leases.rollouts.dropped == {"lease_lost": 6} and not leases.tasks.dropped
    leases.check()


def test_late_and_double_rollouts_are_not_awaited(leases):
    lease = leases.lease(b"a", min_version=0, now=0.0)
    rollout = make_rollout(lease, 1)
    assert leases.awaits(b"b", rollout) is None
    assert leases.awaits(b"a", rollout)
    leases.arrive(rollout, now=0.0)
    assert leases.awaits(b"a", rollout) is None
    leases.revoke(0, "lease_lost")
    leases.lease(b"a", min_version=0, now=0.0)
    assert leases.awaits(b"a", make_rollout(lease, 2)) is None


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"slot": 3}, "slot"),
        ({"slot": -1}, "slot"),
        ({"guided": True}, "guided"),
        ({"versions": (1, 2)}, "older"),
        ({"versions": (2, 4)}, "does not exist"),
        ({"versions": (2, 3)}, None),
    ],
)
def test_misfits(leases, changes, fault):
    lease = leases.lease(b"a", min_version=2, now=0.0)
    rollout = make_rollout(lease, **{"slot": 0, "versions": (3,), "guided": False, **changes})
    found = leases.running[0].misfit(rollout, newest=3)
    assert fault in found if fault else found is None


# ---- members


def test_meter_reads_differences_and_survives_a_restart_of_the_counters():
    meter = Meter()
    assert meter.read(wire.Heartbeat(tokens=1000, busy_s=5, wall_s=10)) == (0, 0)
    assert meter.read(wire.Heartbeat(tokens=1300, busy_s=6, wall_s=14)) == (1, 4)
    assert (meter.tokens_per_s, meter.idle) == (75, 0.75)
    assert meter.read(wire.Heartbeat(tokens=5, busy_s=0, wall_s=1)) == (0, 0)
    assert meter.read(wire.Heartbeat(tokens=5, busy_s=1, wall_s=2)) == (1, 1)
    assert (meter.tokens_per_s, meter.idle) == (0, 0)


def test_the_actor_with_most_credit_and_weights_new_enough_is_picked():
    actors = Actors()
    for name, credit, version in (("a", 1, 5), ("b", 3, 4), ("c", 3, 5), ("d", 3, 5), ("e", 0, 9)):
        actors.join(name.encode(), name, now=0.0)
        actors[name.encode()].credit, actors[name.encode()].version = credit, version
    assert actors.pick(5).name == "c"
    assert actors.pick(4).name == "b"
    assert actors.pick(6) is None


def hello(**changes) -> wire.Hello:
    return wire.Hello(**{"role": "learner", "name": "learner-1", "rank": 1, "world_size": 2, **changes})


def world_of(size: int) -> LearnerRanks:
    world = LearnerRanks()
    world.reopen(size)
    world.join(b"m0", hello(name="learner-0", rank=0, world_size=size), now=0.0)
    return world


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "taken"}, ["'taken'", "choose another"]),
        ({"name": "n" * 65}, ["65 characters", "1 to 64"]),
        ({"name": ""}, ["0 characters", "1 to 64"]),
        ({"rank": 2}, ["rank 2", "torchrun"]),
        ({"world_size": 4}, ["4 ranks", "world of 2"]),
    ],
)
def test_refusals_say_what_and_how_to_mend_it(changes, words):
    reason = refusal(hello(**changes), taken={"taken"}, world=world_of(2))
    assert reason and all(word in reason for word in words) and "\n" not in reason


def test_a_fitting_hello_is_welcome():
    assert refusal(hello(), taken={"other"}, world=world_of(2)) is None
    assert refusal(hello(), taken=set(), world=None) is None


@pytest.mark.parametrize(("fingerprint", "learners"), [("abc", "abc"), ("", "abc"), ("abc", "")])
def test_a_tokenizer_fits_the_learners_or_is_not_known(fingerprint, learners):
    assert other_tokenizer("a", fingerprint, learners=learners) is None
    assert "model.path" in other_tokenizer("a", "f00", learners="abc")


def test_a_hello_of_a_present_rank_opens_a_new_world_unless_it_is_a_repetition():
    world = world_of(2)
    assert not world.opens_new(b"m0", hello(rank=0))
    assert world.opens_new(b"other", hello(rank=0))
    assert not world.opens_new(b"other", hello(rank=1))
    world.asked[0] = 7
    assert world.opens_new(b"m0", hello(rank=0))
    world.leave(0)
    assert world.opens_new(b"other", hello(rank=1))

"""The hub's rules, each tested on its own without a HubCore."""

from __future__ import annotations

import itertools
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hub_support import Driver, Source, make_rollout, make_run
from hypothesis import given

from sgpo_async.config.schema import Evaluation
from sgpo_async.hub.actors import Actors, Meter
from sgpo_async.hub.admission import free_capacity, lowest_version
from sgpo_async.hub.balance import balance
from sgpo_async.hub.batch_metrics import batch_metrics
from sgpo_async.hub.learner_ranks import LearnerRanks
from sgpo_async.hub.leases import LeaseTable
from sgpo_async.hub.ledger import Ledger
from sgpo_async.hub.validation import refusal_reason, tokenizer_mismatch
from sgpo_async.rollout.completed import CompletedGroup
from sgpo_async.tasks.benchmarks import Benchmark
from sgpo_async.tasks.task_sampler import TaskSampler
from sgpo_async.wire import records as wire

# ---- ledger


def test_a_ledger_that_does_not_balance_fails_its_check():
    ledger = Ledger(dispatched=5, trained=2)
    ledger.drop("stale", 1)
    ledger.check(in_flight=1, buffered=1)
    with pytest.raises(AssertionError):
        ledger.check(in_flight=1, buffered=0)


# ---- admission


def capacity(*, live: int, batch: int, max_lag: int, steps_left: int, late: int = 0, batches: int = 0) -> int:
    return free_capacity(
        fresh=live - late, live=live, batch=batch, max_lag=max_lag, batches=batches or max_lag + 1,
        steps_left=steps_left,
    )  # fmt: skip


@pytest.mark.parametrize(("late", "batches", "expected"), [(0, 4, 4), (3, 4, 7), (8, 4, 8), (3, 2, 0), (8, 9, 12)])
def test_late_tasks_leave_room_for_others_up_to_the_batches_that_may_be_in_flight(late, batches, expected):
    assert capacity(live=8, batch=4, max_lag=2, steps_left=100, late=late, batches=batches) == expected


@pytest.mark.parametrize(
    ("live", "max_lag", "steps_left", "expected"),
    [(0, 0, 9, 4), (4, 0, 9, 0), (4, 2, 9, 8), (12, 2, 9, 0), (0, 2, 1, 4), (3, 2, 1, 1), (0, 2, 0, 0)],
)
def test_free_capacity_is_limited_by_max_lag_and_the_remaining_steps(live, max_lag, steps_left, expected):
    assert capacity(live=live, batch=4, max_lag=max_lag, steps_left=steps_left) == expected


@given(steps=st.integers(0, 50), buffered=st.integers(0, 40), running=st.integers(0, 40), eta=st.integers(0, 5))
def test_free_capacity_follows_the_rule_of_areal(steps, buffered, running, eta):
    batch, accepted = 4, steps * 4 + buffered
    areal = accepted + running < (eta + steps + 1) * batch
    assert (capacity(live=buffered + running, batch=batch, max_lag=eta, steps_left=100) > 0) == areal


@given(version=st.integers(0, 9), batch=st.integers(1, 5), eta=st.integers(0, 4), data=st.data())
def test_tokens_of_the_lowest_version_are_not_stale_when_the_task_is_trained(version, batch, eta, data):
    ahead = data.draw(st.integers(0, (eta + 1) * batch - 1))
    lowest = lowest_version(version=version, ahead=ahead, batch=batch, max_lag=eta)
    trained_by = version + ahead // batch
    assert trained_by - lowest == eta and lowest <= version


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


# ---- batch metrics


def group(number: int, rewards: list[float], guided_rewards: list[float], versions: tuple[int, ...]) -> CompletedGroup:
    lease = wire.Lease(
        task=number, attempt=0, purpose="train", problem="", answer="", verifier="", strategy="",
        autonomous=len(rewards), guided=len(guided_rewards), min_version=0, seed=0, temperature=1.0, top_p=1.0,
        max_new_tokens=8,
    )  # fmt: skip
    rollouts = [
        make_rollout(lease, slot, versions=versions, reward=reward)
        for slot, reward in enumerate(rewards + guided_rewards)
    ]
    return CompletedGroup(number=number, attempt=0, rollouts=tuple(rollouts))


def test_batch_metrics_equal_values_computed_by_hand():
    groups = [group(0, [0, 0], [1], (3,)), group(1, [1, 0], [1], (2, 4)), group(2, [1, 1], [0], (4,))]
    result = batch_metrics(groups, version=5)
    assert (result["pass_auto"], result["pass_guided"]) == (pytest.approx(0.5), pytest.approx(2 / 3))
    assert result["lag"]["histogram"] == {"1": 6 + 6, "2": 6, "3": 6}
    assert result["lag"]["max"] == 3 and result["lag"]["mean"] == pytest.approx((12 * 1 + 6 * 2 + 6 * 3) / 24)


def test_pass_guided_is_none_without_guided_rollouts():
    assert batch_metrics([group(0, [1, 0], [], (0,))], version=0)["pass_guided"] is None


# ---- tasks and leases


def test_a_task_depends_only_on_its_number():
    task_sampler = TaskSampler(make_run(), Source(held_out=2, without_strategy_every=3))
    assert task_sampler.task(4) == task_sampler.task(4)
    assert (task_sampler.task(3).guided, task_sampler.task(4).guided) == (0, 1)
    assert [task_sampler.task(n).problem.problem for n in (-1, -2, -3)] == ["held-out 0", "held-out 1", "held-out 0"]
    assert task_sampler.task(-1).seed == task_sampler.task(-3).seed != task_sampler.task(-2).seed
    assert task_sampler.task(0).seed != task_sampler.task(1).seed != task_sampler.task(-1).seed


def test_a_round_contains_the_held_out_problems_and_then_the_benchmarks():
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


def test_a_lease_table_without_tokens_still_counts_them_and_keeps_their_versions():
    task_sampler, leases = TaskSampler(make_run(autonomous=1, guided=1), Source()), LeaseTable(keeps_tokens=False)
    leases.add(task_sampler.task(0))
    lease = leases.lease(b"a", min_version=0, now=0.0)
    for slot in (0, 1):
        leases.arrive(make_rollout(lease, slot, versions=(1, 2)), now=1.0)
    kept, _ = leases.complete[0].rollouts
    assert (leases.tokens, len(kept.prompt), len(kept.tokens), len(kept.logprobs)) == (8, 0, 0, 0)
    assert kept.token_versions().tolist() == [1, 1, 2, 2] and kept.reward == 1.0


def test_a_revoked_task_comes_before_younger_tasks_with_the_next_attempt(leases):
    first, second = (leases.lease(b"a", min_version=0, now=0.0) for _ in range(2))
    leases.arrive(make_rollout(first, 0), now=1.0)
    for number in (1, 0):
        leases.revoke(number)
    again = [leases.lease(b"b", min_version=0, now=2.0) for _ in range(3)]
    assert [(lease.task, lease.attempt) for lease in again] == [(0, 1), (1, 1), (2, 0)]
    assert again[0].seed == first.seed and again[1].seed == second.seed
    assert [lease.finished.tolist() for lease in again] == [[0], [], []]
    assert leases.rollouts.dispatched == 9 and not leases.rollouts.dropped and not leases.tasks.dropped
    leases.check()


def test_a_task_whose_tokens_have_become_too_old_starts_again(leases):
    first = leases.lease(b"a", min_version=2, now=0.0)
    leases.arrive(make_rollout(first, 0, versions=(3,)), now=1.0)
    leases.arrive(make_rollout(first, 1, versions=(2, 3)), now=1.0)
    leases.revoke(0)
    again = leases.lease(b"b", min_version=3, now=2.0)
    assert (again.task, again.finished.tolist(), again.partial) == (0, [], ())
    assert leases.rollouts.dropped == {"stale": 3} and leases.rollouts.dispatched == 6
    leases.check()


def test_a_task_with_an_invalid_rollout_starts_again(leases):
    first = leases.lease(b"a", min_version=0, now=0.0)
    leases.arrive(make_rollout(first, 0), now=1.0)
    leases.reject(0)
    assert leases.lease(b"b", min_version=0, now=2.0).finished.size == 0
    assert leases.rollouts.dropped == {"rejected": 3}
    leases.check()


def test_no_lease_expects_late_rollouts(leases):
    lease = leases.lease(b"a", min_version=0, now=0.0)
    rollout = make_rollout(lease, 1)
    assert leases.lease_of(b"b", rollout) is None
    assert leases.lease_of(b"a", rollout)
    leases.revoke(0)
    leases.lease(b"a", min_version=0, now=0.0)
    assert leases.lease_of(b"a", rollout) is None


# ---- members


def test_the_meter_uses_differences_and_ignores_a_restart_of_the_counters():
    meter = Meter()
    assert meter.update(wire.Heartbeat(tokens=1000, busy_s=5, wall_s=10)) == (0, 0, 0)
    assert meter.update(wire.Heartbeat(tokens=1300, busy_s=6, weights_s=2, wall_s=14)) == (1, 2, 4)
    assert (meter.tokens_per_s, meter.idle) == (75, 0.75)
    assert meter.update(wire.Heartbeat(tokens=5, busy_s=0, wall_s=1)) == (0, 0, 0)
    assert meter.update(wire.Heartbeat(tokens=5, busy_s=1, wall_s=2)) == (1, 0, 1)
    assert (meter.tokens_per_s, meter.idle) == (0, 0)


def test_the_meter_computes_no_infinite_speed() -> None:
    meter = Meter()
    meter.update(wire.Heartbeat())
    assert meter.update(wire.Heartbeat(tokens=2**53, wall_s=1e-300)) == (0, 0, 0)
    assert (meter.tokens_per_s, meter.idle) == (0, None)


def test_the_idle_time_of_the_engines_is_divided_by_cause() -> None:
    hub = Driver(make_run())
    hub.learner()
    hub.actor(b"a")
    assert hub.core.status()["engine_waits"] == {}
    hub.send(b"a", wire.Heartbeat(version=0))
    hub.send(b"a", wire.Heartbeat(version=0, busy_s=5, weights_s=2, wall_s=10))
    assert hub.core.status()["engine_waits"] == pytest.approx({"weights": 0.2, "leases": 0.3})
    assert hub.core.status()["engine_idle"] == 0.5


def test_groups_without_a_signal_and_cut_rollouts_are_counted() -> None:
    hub = Driver(make_run())
    hub.learner()
    hub.actor(b"a", credit=5)
    lease = hub.leases(b"a")[0]
    rewards = {0: (0.0, 1.0, 1.0), 1: (0.0, 0.0, 1.0)}
    groups = [
        CompletedGroup(
            number=number,
            attempt=0,
            rollouts=tuple(
                make_rollout(lease, slot, reward=reward, finish="length" if slot == number else "stop")
                for slot, reward in enumerate(own)
            ),
        )
        for number, own in rewards.items()
    ]
    found = batch_metrics([*groups, groups[0]], version=0)
    assert found["uniform"] == pytest.approx(1 / 3) and found["cut"] == pytest.approx(1 / 3)


def test_the_actor_with_the_most_credit_among_those_with_new_enough_weights_is_picked():
    actors = Actors()
    for name, credit, version in (("a", 1, 5), ("b", 3, 4), ("c", 3, 5), ("d", 3, 5), ("e", 0, 9)):
        actors.join(name.encode(), wire.Hello(role="actor", name=name), now=0.0)
        actors[name.encode()].credit, actors[name.encode()].version = credit, version
    assert actors.pick(5).name == "c"
    assert actors.pick(4).name == "b"
    assert actors.pick(6) is None


def hello(**changes) -> wire.Hello:
    return wire.Hello(**{"role": "learner", "name": "learner-1", "rank": 1, "world_size": 2, **changes})


def world_of(size: int) -> LearnerRanks:
    world = LearnerRanks()
    world.start_new_world(size)
    world.join(b"m0", hello(name="learner-0", rank=0, world_size=size), now=0.0)
    return world


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"name": "taken"},
            "the name 'taken' is taken by a connected member: "
            "choose another name, or wait until the hub removes that member",
        ),
        ({"name": "n" * 65}, "the name must have 1 to 64 characters, got 65: choose another name"),
        ({"name": ""}, "the name must have 1 to 64 characters, got 0: choose another name"),
        (
            {"name": "a\x1b[2J"},
            "the name must have printable characters only, got 'a\\x1b[2J': choose another name",
        ),
        ({"rank": 2}, "rank must be in [0, 1], got 2: start the learner with torchrun"),
        (
            {"world_size": 4},
            "the world size of learner-1 is 4, but the connected learner has a world size of 2: "
            "stop the connected learner first",
        ),
    ],
)
def test_a_refusal_says_what_is_wrong_and_how_to_fix_it(changes, reason):
    assert refusal_reason(hello(**changes), taken={"taken"}, world=world_of(2)) == reason


def test_a_valid_hello_is_not_refused():
    assert refusal_reason(hello(), taken={"other"}, world=world_of(2)) is None
    assert refusal_reason(hello(), taken=set(), world=None) is None


@pytest.mark.parametrize(("fingerprint", "learners"), [("abc", "abc"), ("", "abc"), ("abc", "")])
def test_an_equal_or_unknown_tokenizer_matches_the_learners(fingerprint, learners):
    assert tokenizer_mismatch("a", fingerprint, learners=learners) is None
    mismatch = "the tokenizer of a is f00, but the learner's is abc: set model.path of a to the learner's"
    assert tokenizer_mismatch("a", "f00", learners="abc") == mismatch


def test_a_hello_of_a_present_rank_starts_a_new_world_unless_it_is_repeated():
    world = world_of(2)
    assert not world.starts_new_world(b"m0", hello(rank=0))
    assert world.starts_new_world(b"other", hello(rank=0))
    assert not world.starts_new_world(b"other", hello(rank=1))
    world.requested[0] = (7, 0)
    assert world.starts_new_world(b"m0", hello(rank=0))
    world.leave(0)
    assert world.starts_new_world(b"other", hello(rank=1))

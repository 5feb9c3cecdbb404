"""The hub's core in complete scenarios: sequences of events, and the effects and the state that follow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hub_support import Driver, Source, make_part, make_rollout, make_run, train_one_step

from sgpo_async.config import from_plain
from sgpo_async.hub import HubCore
from sgpo_async.hub.core import FAIR_S, FINISH_GRACE_S, RETURN_S
from sgpo_async.hub.evaluation import without_problem_results
from sgpo_async.hub.events import (
    CloseSender,
    Disconnected,
    Interrupted,
    OpenSender,
    Rejected,
    SenderDown,
    SenderUp,
    Shutdown,
    Tick,
    Warn,
)
from sgpo_async.hub.snapshot import dump, load
from sgpo_async.tasks.benchmarks import Benchmark
from sgpo_async.wire import records as wire


@pytest.fixture
def hub() -> Driver:
    """See `ready_hub`, with the default run."""
    return ready_hub()


def ready_hub(**shape: int) -> Driver:
    """One rank has published version 0; the actor `b"a"` has done the first evaluation and has no credit."""
    driver = Driver(make_run(**shape))
    driver.learner()
    driver.actor(b"a", credit=1)
    driver.serve_evaluation(b"a")
    driver.core.actors[b"a"].credit = 0
    assert not driver.leases(b"a", "evaluate")
    for lease in driver.leases(b"a"):
        driver.send(b"a", wire.Release(task=lease.task, attempt=lease.attempt, reason="test"))
    return driver


def rollouts_in(driver: Driver) -> dict:
    return driver.core.status()["ledger"]["rollouts"]


# ---- actors


def test_an_actor_is_welcomed_when_its_weight_sender_is_up():
    driver = Driver()
    assert driver.send(b"a", wire.Hello(role="actor", name="a")) == [OpenSender(b"a", "a")]
    assert driver.send(b"a", wire.Hello(role="actor", name="a")) == [], "a repeated Hello changes nothing"
    driver.advance(100)
    assert b"a" in driver.core.actors, "an actor that waits for the hub does not time out"
    driver.handle(SenderUp(b"a", "10.0.0.1", 4000))
    welcome = driver.only(b"a", wire.Welcome)
    assert (welcome.session_host, welcome.session_port) == ("10.0.0.1", 4000)
    driver.advance(19)
    assert b"a" in driver.core.actors, "the timeout has not passed: the actor's only thread may be loading weights"
    driver.advance(2)
    assert not driver.core.actors and driver.senders_closed == [b"a"]


def test_an_actor_is_refused_if_its_weight_sender_fails_to_start():
    driver = Driver()
    driver.send(b"a", wire.Hello(role="actor", name="a"))
    driver.handle(SenderDown(b"a", "no port"))
    assert "no port" in driver.only(b"a", wire.Refused).reason
    driver.advance(RETURN_S + 0.1)
    assert not driver.core.actors
    assert driver.handle(SenderUp(b"a", "127.0.0.1", 1)) == [CloseSender(b"a")], "its actor is gone"


def test_a_name_is_free_again_after_its_member_has_left(hub):
    hub.send(b"other", wire.Hello(role="actor", name="a"))
    assert hub.only(b"other", wire.Refused).reason == (
        "the name 'a' is taken by a connected member: choose another name, or wait until the hub removes that member"
    )
    hub.handle(SenderDown(b"a", "killed"))
    hub.advance(RETURN_S + 0.1)
    hub.send(b"other", wire.Hello(role="actor", name="a"))
    assert not hub.take(b"other", wire.Refused)


def test_a_refusal_for_another_tokenizer_shows_both_fingerprints():
    driver = Driver()
    driver.send(b"r0", wire.Hello(role="learner", name="r0", tokenizer="aaaa"))
    driver.send(b"a", wire.Hello(role="actor", name="a", tokenizer="bbbb"))
    refused = driver.only(b"a", wire.Refused)
    assert "aaaa" in refused.reason and "bbbb" in refused.reason and refused.final
    assert driver.core.status()["refused"] == 1


def test_actors_with_another_tokenizer_are_removed_when_the_learner_joins():
    driver = Driver()
    for name, fingerprint in (("wrong", "bbbb"), ("right", "aaaa"), ("silent", "")):
        driver.send(name.encode(), wire.Hello(role="actor", name=name, tokenizer=fingerprint))
    driver.handle(SenderUp(b"wrong", "127.0.0.1", 4000))
    driver.send(b"r0", wire.Hello(role="learner", name="r0", tokenizer="aaaa"))
    driver.only(b"r0", wire.Welcome)
    refused = driver.only(b"wrong", wire.Refused)
    assert "aaaa" in refused.reason and "bbbb" in refused.reason and refused.final
    assert set(driver.core.actors) == {b"right", b"silent"} and driver.senders_closed == [b"wrong"]
    driver.send(b"late", wire.Hello(role="actor", name="late", tokenizer="cccc"))
    assert driver.only(b"late", wire.Refused).final


@pytest.mark.parametrize("how", ["sender down", "silence", "goodbye"])
def test_the_lease_of_a_lost_actor_is_issued_again(hub, how):
    """It goes to another actor, with what has arrived; rollouts that the lost actor sends later change nothing."""
    hub.send(b"a", wire.Ready(tasks=1, version=0))
    (lease,) = hub.leases(b"a")
    hub.send(b"a", make_rollout(lease, 0))
    hub.actor(b"b", credit=1)
    hub.leases(b"b")
    before = rollouts_in(hub)
    hub.send(b"b", wire.Ready(tasks=1, version=0))
    hub.core.actors[b"b"].credit = 0
    for other in hub.leases(b"b"):
        hub.serve(b"b", other)
    if how == "sender down":
        hub.handle(SenderDown(b"a", "killed"))
        hub.advance(RETURN_S + 0.1)
    elif how == "goodbye":
        hub.send(b"a", wire.Goodbye())
    else:
        hub.advance(19)
        hub.send(b"b", wire.Heartbeat(version=0))
        hub.advance(2)
    assert b"a" in hub.senders_closed and b"b" in hub.core.actors
    hub.send(b"b", wire.Ready(tasks=1, version=0))
    (again,) = hub.leases(b"b")
    assert (again.task, again.attempt, again.seed) == (lease.task, lease.attempt + 1, lease.seed)
    assert again.finished.tolist() == [0]
    assert rollouts_in(hub)["dropped"] == before["dropped"]
    for slot in (1, 2):
        hub.send(b"b", make_rollout(again, slot))
    assert again.task in hub.core.training.leases.complete
    buffered = rollouts_in(hub)
    hub.send(b"a", make_rollout(lease, 1))  # late, but acknowledged, so that the actor can delete it
    assert hub.take(b"a", wire.Ack)[-1].slot == 1
    assert rollouts_in(hub) == buffered
    assert hub.core.status()["duplicates"] == 1


def test_a_lease_that_times_out_is_issued_again_and_heartbeats_prevent_the_timeout(hub):
    hub.send(b"a", wire.Ready(tasks=2, version=0))
    renewed, lost = hub.leases(b"a")
    for _ in range(8):
        hub.advance(3)
        hub.send(b"a", wire.Heartbeat(version=0, tasks=[renewed.task]))
    assert list(hub.core.training.leases.running) == [renewed.task]
    assert hub.only(b"a", wire.Revoked) == wire.Revoked(task=lost.task, attempt=lost.attempt)
    assert hub.core.training.leases.carried.keys() == {lost.task}
    hub.send(b"a", wire.Ready(tasks=1, version=0))
    (again,) = hub.leases(b"a")
    assert (again.task, again.attempt) == (lost.task, lost.attempt + 1)


def test_a_released_lease_is_issued_to_another_actor(hub):
    hub.send(b"a", wire.Ready(tasks=3, version=0))
    leases = hub.leases(b"a")
    hub.actor(b"b")
    hub.send(b"a", wire.Release(task=leases[0].task, attempt=leases[0].attempt, reason="drains"))
    assert not hub.leases(b"a"), "a Release cancels the unused credit of the actor"
    hub.send(b"b", wire.Ready(tasks=1, version=0))
    (again,) = hub.leases(b"b")
    assert (again.task, again.attempt) == (leases[0].task, leases[0].attempt + 1)
    hub.send(b"a", wire.Release(task=again.task, attempt=again.attempt, reason="not mine"))
    assert again.task in hub.core.training.leases.running


def test_an_unservable_task_is_dropped_and_another_one_may_be_dispatched(hub):
    hub.send(b"a", wire.Ready(tasks=1, version=0))
    (lease,) = hub.leases(b"a")
    hub.send(b"a", wire.Release(task=lease.task, attempt=lease.attempt, reason="too long", servable=False))
    ledger = hub.core.status()["ledger"]
    assert ledger["dropped"] == {"unservable": 1}
    assert ledger["rollouts"]["dropped"]["unservable"] == lease.autonomous + lease.guided
    hub.send(b"a", wire.Ready(tasks=1, version=0))
    (other,) = hub.leases(b"a")
    assert other.task != lease.task


def test_an_evaluation_round_ends_without_its_unservable_problems():
    hub = Driver(source=Source(held_out=2))
    hub.learner()
    hub.actor(b"a", credit=2)
    long, other = hub.leases(b"a", "evaluate")
    assert {long.purpose, other.purpose} == {"evaluate"}
    hub.serve(b"a", other)
    hub.send(b"a", wire.Release(task=long.task, attempt=long.attempt, reason="too long", servable=False))
    (result,) = hub.core.status()["evaluations"]
    assert (result["version"], result["problems"]) == (0, 1)


def test_each_invalid_rollout_is_counted_as_rejected(hub):
    hub.send(b"a", wire.Ready(tasks=1, version=0))
    (lease,) = hub.leases(b"a")
    hub.send(b"a", make_rollout(lease, 0, task=4711))
    hub.send(b"a", make_rollout(lease, 0, purpose="evaluate"))
    assert lease.task in hub.core.training.leases.running
    hub.send(b"a", make_rollout(lease, 0, guided=True))
    status = hub.core.status()
    assert status["rejected_reasons"] == {
        "rollout of an unknown task": 2,
        "guided flag does not match the slot": 1,
    }
    assert (status["rejected"], len(hub.take(b"a", wire.Ack)) >= 3) == (3, True)
    assert status["ledger"]["rollouts"]["dropped"]["rejected"] == 3, "the lease is revoked: its slot would stay empty"


def test_a_task_is_dropped_after_three_invalid_leases(hub):
    attempts = []
    for _ in range(3):
        hub.send(b"a", wire.Ready(tasks=1, version=0))
        (lease,) = hub.leases(b"a")
        attempts.append((lease.task, lease.attempt))
        hub.send(b"a", make_rollout(lease, 0, guided=True))
    (task, first), *_ = attempts
    assert attempts == [(task, first + i) for i in range(3)]
    ledger = hub.core.status()["ledger"]
    assert ledger["dropped"] == {"invalid": 1}
    assert ledger["rollouts"]["dropped"] == {"rejected": 6, "invalid": 3}


def test_an_actor_that_continues_a_group_with_another_prompt_is_not_blamed(hub):
    """Either of the two actors may be wrong, so the group starts again from nothing."""
    hub.send(b"a", wire.Ready(tasks=1, version=0))
    (lease,) = hub.leases(b"a")
    hub.send(b"a", make_rollout(lease, 0, prompt=np.array([8, 9], np.int32)))
    hub.send(b"a", wire.Goodbye())
    hub.actor(b"b", credit=1)
    (again,) = hub.leases(b"b")
    assert again.finished.tolist() == [0]
    hub.send(b"b", make_rollout(again, 1))
    assert hub.only(b"b", wire.Revoked) == wire.Revoked(task=again.task, attempt=again.attempt)
    assert hub.core.actors[b"b"].invalid == 0
    assert hub.core.rejected == {"prompt differs from that of the group": 1}
    hub.send(b"b", wire.Ready(tasks=1, version=0))
    (anew,) = hub.leases(b"b")
    assert (anew.task, anew.finished.size, anew.partial) == (lease.task, 0, ())
    hub.serve(b"b", anew)
    assert lease.task in hub.core.training.leases.complete


INVALID = {
    "infinite log-probability": {"logprobs": np.array([-np.inf, -1.0], np.float32)},
    "log-probability that is not a number": {"logprobs": np.array([np.nan, -1.0], np.float32)},
    "reward that is not a number": {"reward": float("nan")},
    "token beyond the vocabulary": {"tokens": np.array([5, 999], np.int32)},
    "prompt beyond the vocabulary": {"prompt": np.array([5, 999], np.int32)},
}


@pytest.mark.parametrize("changes", INVALID.values(), ids=INVALID.keys())
def test_an_actor_that_returns_impossible_numbers_is_quarantined_and_its_tasks_start_again(changes):
    hub = Driver(make_run(batch=4, max_lag=0))
    hub.send(b"r0", wire.Hello(role="learner", name="r0", vocabulary=500))
    hub.send(b"r0", wire.Published(version=0))
    hub.actor(b"first", credit=2)
    hub.serve_evaluation(b"first")
    hub.send(b"first", wire.Goodbye())
    hub.actor(b"bad", credit=4)
    leases = hub.leases(b"bad")
    hub.send(b"bad", make_rollout(leases[3], 0))
    for lease in leases[:3]:
        hub.send(b"bad", make_rollout(lease, 0, **changes))
    refused = hub.only(b"bad", wire.Refused)
    assert refused.final and refused.reason.startswith("quarantined after 3 invalid messages, the last one: ")
    assert hub.core.status()["quarantined"].keys() == {"bad"}
    (warning,) = [effect.text for effect in hub.effects if isinstance(effect, Warn)]
    assert warning.startswith("bad is quarantined after 3 invalid messages")
    assert b"bad" not in hub.core.actors
    assert not hub.core.training.leases.running and not hub.core.training.leases.carried, "nothing of it is kept"
    hub.send(b"other", wire.Hello(role="actor", name="bad"))
    assert hub.only(b"other", wire.Refused).final, "its name is known"
    hub.actor(b"good", credit=4)
    again = hub.leases(b"good")
    assert [lease.task for lease in again] == [lease.task for lease in leases]
    for lease in again:
        assert not lease.finished.size and not lease.partial
        hub.serve(b"good", lease)
    assert len(hub.core.training.leases.complete) == 4


def test_a_report_with_impossible_numbers_ends_the_lease(hub):
    hub.send(b"a", wire.Ready(tasks=1, version=0))
    (lease,) = hub.leases(b"a")
    part = replace(make_part(0, 0, 2), logprobs=np.array([-1.0, np.nan], np.float32))
    hub.send(b"a", wire.Progress(task=lease.task, attempt=lease.attempt, purpose="train", partial=(part,)))
    assert hub.core.status()["rejected_reasons"] == {"report: logprobs must be in [-10000, 0]": 1}
    assert hub.take(b"a", wire.Revoked) == [wire.Revoked(task=lease.task, attempt=lease.attempt)]
    assert lease.task not in hub.core.training.leases.carried


def test_invalid_messages_are_counted_and_non_members_are_refused(hub):
    hub.handle(Rejected(b"x", "protocol 9"))
    hub.send(b"a", wire.Commit(step=0))
    hub.send(b"r0", wire.Ready(tasks=1, version=0))
    hub.send(b"a", wire.Ready(tasks=-1, version=0))
    assert hub.core.status()["rejected"] == 4
    hub.send(b"x", wire.Heartbeat())
    assert hub.only(b"x", wire.Refused).reason == "not a member, or removed after a timeout: send Hello first"
    hub.send(b"x", wire.StatusRequest())
    assert hub.only(b"x", wire.Status).status["rejected"] == 4
    hub.send(b"x", wire.SettingsRequest())
    assert from_plain(hub.only(b"x", wire.Settings).settings) == hub.run


def test_a_stranger_of_another_release_is_answered_and_a_member_is_not(hub):
    """A message of a member may only have been damaged. The other release cannot read the answer, and so knows."""
    for member in (b"x", b"a", b"r0"):
        hub.handle(Rejected(member, "protocol: the other side uses version 9", other_release=True))
    assert hub.only(b"x", wire.Refused) == wire.Refused(reason="protocol: the other side uses version 9")
    assert not hub.take(b"a", wire.Refused) and not hub.take(b"r0", wire.Refused)
    assert hub.core.status()["rejected"] == 3


def test_an_engine_with_weights_of_another_run_gets_no_lease_until_it_has_loaded_those_of_this_run(hub):
    hub.send(b"a", wire.Ready(tasks=1, version=57))
    hub.send(b"a", wire.Heartbeat(version=57))
    assert not hub.leases(b"a")
    hub.send(b"a", wire.Heartbeat(version=0))
    assert len(hub.leases(b"a")) == 1


# ---- batches


def test_with_max_lag_0_every_token_has_lag_0_and_tasks_are_trained_in_order():
    hub = ready_hub(max_lag=0, batch=2, steps=4)
    for step in range(4):
        hub.send(b"a", wire.Ready(tasks=5, version=step))
        hub.core.actors[b"a"].credit = 0
        leases = hub.leases(b"a")
        assert [lease.task for lease in leases] == [2 * step, 2 * step + 1]
        assert {lease.min_version for lease in leases} == {step}
        for lease in reversed(leases):
            hub.serve(b"a", lease)
        hub.send(b"r0", wire.BatchRequest(step=step))
        shard = hub.only(b"r0", wire.Shard)
        assert [r.task for r in shard.rollouts] == [2 * step] * 3 + [2 * step + 1] * 3
        hub.send(b"r0", wire.Commit(step=step))
        assert hub.only(b"r0", wire.Committed).status["lag"] == {"mean": 0.0, "max": 0, "histogram": {"0": 12}}
        hub.send(b"a", wire.Ready(tasks=1, version=step))
        assert not hub.leases(b"a"), "the tasks of the next batch wait for the next version"
        hub.core.actors[b"a"].credit = 0
        hub.send(b"r0", wire.Published(version=step + 1))
    assert hub.core.training.position == 8, "no task is dispatched that the remaining steps cannot train"


def test_a_batch_waits_for_every_rank_and_is_balanced_over_them():
    driver = Driver(make_run(batch=3))
    driver.learner(ranks=2)
    driver.actor(b"a", credit=20)
    driver.serve_evaluation(b"a")
    sizes = {0: 1, 1: 4, 2: 2}  # spans of two tokens each
    for lease in driver.leases(b"a"):
        if lease.task in sizes:
            driver.serve(b"a", lease, versions=(0,) * sizes[lease.task])
    driver.send(b"r1", wire.BatchRequest(step=0))
    assert not driver.take(b"r1", wire.Shard)
    driver.send(b"r0", wire.BatchRequest(step=0))
    first, second = driver.only(b"r0", wire.Shard), driver.only(b"r1", wire.Shard)
    assert {r.task for r in first.rollouts} == {1} and {r.task for r in second.rollouts} == {0, 2}
    assert (first.problems, second.problems) == (3, 3)
    driver.send(b"r1", wire.BatchRequest(step=0))
    assert repr(driver.only(b"r1", wire.Shard)) == repr(second), "a repeated request gets the same shard"
    driver.send(b"r1", wire.BatchRequest(step=1))  # before rank 0 sends its Commit
    driver.send(b"r0", wire.Commit(step=0))
    driver.send(b"r0", wire.Commit(step=0))
    assert [c.step for c in driver.take(b"r0", wire.Committed)] == [0, 0]
    assert driver.core.status()["ledger"]["trained"] == 3
    assert driver.core.learner_ranks.requested == {1: (1, 0)}
    driver.send(b"r0", wire.BatchRequest(step=0))
    assert driver.core.learner_ranks.requested == {1: (1, 0)}, (
        "a repeated request that arrives after the commit is ignored"
    )


def test_a_part_of_a_batch_is_sent_as_soon_as_its_groups_are_complete():
    driver = Driver(make_run(batch=5, parts=2, max_lag=1))
    driver.learner(ranks=2)
    driver.actor(b"a", credit=1)
    driver.serve_evaluation(b"a")
    driver.send(b"a", wire.Ready(tasks=5, version=0))
    leases = driver.leases(b"a")
    for rank in (b"r0", b"r1"):
        driver.send(rank, wire.BatchRequest(step=0))
    for lease in leases[3:5]:
        assert not driver.take(b"r0", wire.Shard)
        driver.serve(b"a", lease)
    first = [driver.only(rank, wire.Shard) for rank in (b"r0", b"r1")]
    assert [(shard.part, shard.problems, {r.task for r in shard.rollouts}) for shard in first] == [
        (0, 5, {leases[3].task}),
        (0, 5, {leases[4].task}),
    ]
    for lease in leases[:3]:
        driver.serve(b"a", lease)
    driver.send(b"r0", wire.BatchRequest(step=0, part=1))
    assert not driver.take(b"r0", wire.Shard), "rank 1 has not requested it"
    assert driver.core.status()["learner"]["training"] == 0
    driver.send(b"r0", wire.Commit(step=0))
    assert "no batch of step 0" in driver.only(b"r0", wire.Refused).reason
    driver.send(b"r1", wire.BatchRequest(step=0, part=1))
    second = [driver.only(rank, wire.Shard) for rank in (b"r0", b"r1")]
    assert {r.task for shard in second for r in shard.rollouts} == {lease.task for lease in leases[:3]}
    driver.send(b"r0", wire.Commit(step=0))
    assert driver.only(b"r0", wire.Committed).step == 0
    assert driver.core.status()["ledger"]["trained"] == 5


def test_a_learner_that_waits_for_the_rest_of_a_batch_is_not_said_to_train():
    driver = Driver(make_run(batch=2, parts=2))
    driver.learner()
    driver.actor(b"a", credit=1)
    driver.serve_evaluation(b"a")
    driver.send(b"a", wire.Ready(tasks=1, version=0))
    driver.serve(b"a", driver.leases(b"a")[0])
    driver.send(b"r0", wire.BatchRequest(step=0))
    driver.only(b"r0", wire.Shard)
    assert driver.core.status()["learner"]["training"] == 0
    driver.send(b"r0", wire.BatchRequest(step=0, part=1))
    assert driver.core.status()["learner"]["training"] is None


def test_stale_groups_are_dropped():
    hub = ready_hub(max_lag=1, batch=1, steps=9)
    hub.send(b"a", wire.Ready(tasks=2, version=0))
    slow, quick = hub.leases(b"a")
    hub.serve(b"a", quick)
    hub.send(b"r0", wire.BatchRequest(step=0))
    hub.send(b"r0", wire.Commit(step=0))
    hub.send(b"r0", wire.Published(version=1))
    hub.send(b"a", wire.Ready(tasks=1, version=1))
    (third,) = hub.leases(b"a")
    hub.serve(b"a", third)
    hub.send(b"r0", wire.BatchRequest(step=1))
    hub.send(b"r0", wire.Commit(step=1))
    assert hub.core.training.version == 2
    hub.serve(b"a", slow, versions=(0,))
    ledger = hub.core.status()["ledger"]
    assert (ledger["dropped"], ledger["rollouts"]["dropped"]["stale"], ledger["buffered"]) == ({"stale": 1}, 3, 0)


# ---- the learner


def test_after_a_crash_before_the_commit_the_next_learner_gets_the_same_batch(hub):
    hub.send(b"a", wire.Ready(tasks=2, version=0))
    for lease in hub.leases(b"a"):
        hub.serve(b"a", lease)
    hub.send(b"r0", wire.BatchRequest(step=0))
    before = [r.task for r in hub.only(b"r0", wire.Shard).rollouts]
    hub.send(b"new", wire.Hello(role="learner", name="new"))
    assert hub.only(b"r0", wire.Refused).reason == "new started a new learner world, which replaces this one"
    hub.send(b"r0", wire.Commit(step=0))
    assert hub.core.status()["ledger"]["trained"] == 0
    assert hub.only(b"new", wire.Welcome).version == 0
    hub.send(b"new", wire.Commit(step=0))
    assert hub.only(b"new", wire.Refused).reason == "the hub has sent no batch of step 0: it is at step 0"
    hub.send(b"new", wire.BatchRequest(step=0))
    assert [r.task for r in hub.only(b"new", wire.Shard).rollouts] == before


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_learner_may_come_back_with_another_world_size(hub, order):
    hub.send(b"a", wire.Ready(tasks=2, version=0))
    for lease in hub.leases(b"a"):
        hub.serve(b"a", lease)
    hub.send(b"r0", wire.BatchRequest(step=0))
    whole = hub.only(b"r0", wire.Shard).rollouts
    for rank in order:
        hub.send(b"n%d" % rank, wire.Hello(role="learner", name=f"n{rank}", rank=rank, world_size=2))
    hub.send(b"n0", wire.BatchRequest(step=0))
    assert not hub.take(b"n0", wire.Shard), "the batch of the old world is not handed out again"
    hub.send(b"n1", wire.BatchRequest(step=0))
    halves = [hub.only(member, wire.Shard).rollouts for member in (b"n0", b"n1")]
    assert [r.task for half in halves for r in half] == [r.task for r in whole]


def test_other_ranks_may_leave_before_rank_zero_commits():
    driver = Driver(make_run(batch=2))
    driver.learner(ranks=2)
    driver.actor(b"a", credit=9)
    driver.serve_evaluation(b"a")
    for lease in driver.leases(b"a"):
        driver.serve(b"a", lease)
    for rank in (b"r0", b"r1"):
        driver.send(rank, wire.BatchRequest(step=0))
    driver.send(b"r1", wire.Goodbye())
    driver.send(b"r0", wire.Commit(step=0))
    assert driver.core.training.step == 1
    driver.send(b"r0", wire.BatchRequest(step=1))
    assert len(driver.take(b"r0", wire.Shard)) == 1, "a broken world gets no more batches"


def test_a_learner_times_out_only_after_batch_timeout_s(hub):
    for _ in range(20):
        hub.advance(2.9)
        hub.send(b"a", wire.Heartbeat(version=0))
    assert hub.core.learner_ranks.complete
    hub.advance(3)
    assert not hub.core.learner_ranks.ranks


def test_a_learner_that_resumes_from_another_step_has_to_send_restore(hub):
    train_one_step(hub)
    hub.learner(publish=False)
    hub.send(b"r0", wire.BatchRequest(step=0))
    assert hub.only(b"r0", wire.Refused).reason == (
        "the learner requests a batch of step 0, but the hub is at step 1: "
        "send Restore with the hub state of the checkpoint first"
    )
    hub.send(b"r0", wire.Restore(state=b""))
    assert hub.only(b"r0", wire.Restored).version == 2, "version 1 has been used already"
    assert (hub.core.training.step, hub.core.training.position) == (0, 0)


def test_restore_goes_back_to_an_earlier_step_with_a_higher_version(hub):
    train_one_step(hub)
    hub.send(b"a", wire.Ready(tasks=4, version=1))
    done, open_ = hub.leases(b"a")[:2]
    hub.serve(b"a", done, versions=(1,))
    hub.send(b"a", make_rollout(open_, 0, versions=(1,)))
    hub.send(b"r0", wire.SnapshotRequest(step=1))
    state = hub.only(b"r0", wire.Snapshot).state
    at_snapshot = hub.core.status()["ledger"]
    hub.serve(b"a", open_, versions=(1,))
    hub.send(b"r0", wire.BatchRequest(step=1))
    hub.send(b"r0", wire.Commit(step=1))
    hub.learner(publish=False)
    hub.send(b"r0", wire.Restore(state=state))
    version = hub.only(b"r0", wire.Restored).version
    assert version == 3 and hub.core.training.step == 1
    ledger = hub.core.status()["ledger"]
    assert (ledger["trained"], ledger["buffered"]) == (at_snapshot["trained"], at_snapshot["buffered"])
    assert ledger["rollouts"]["dropped"]["resume"] == 3 * at_snapshot["in_flight"]
    (kept,) = hub.core.training.leases.complete.values()
    assert version - kept.oldest_version == 0, "its lag in optimiser steps is unchanged"
    hub.send(b"r0", wire.Published(version=version))
    hub.core.actors[b"a"].credit = 0
    hub.send(b"a", wire.Ready(tasks=1, version=2))
    assert not hub.leases(b"a"), "version 2 was made before the restore"
    hub.send(b"a", wire.Heartbeat(version=3))
    (again,) = hub.leases(b"a")
    assert again.task == open_.task and again.attempt > open_.attempt
    hub.send(b"a", make_rollout(open_, 1, versions=(1,)))
    assert hub.core.status()["rejected"] == 0


def test_a_new_hub_can_restore_a_snapshot(hub):
    train_one_step(hub)
    state = dump(hub.core.training, hub.core.evaluation)
    fresh = Driver(hub.run)
    fresh.learner(publish=False)
    fresh.send(b"r0", wire.Restore(state=state))
    assert fresh.only(b"r0", wire.Restored).version == 2
    old, new = hub.core.status(), fresh.core.status()
    for key in ("step", "evaluations", "tokens_trained", "tokens_generated"):
        assert new[key] == old[key]
    assert dump(fresh.core.training, fresh.core.evaluation) != b""


@pytest.mark.parametrize("damage", [b"\x00", b"garbage", b"\x81\xa6format\x01", b"\x81\xa6format\x09", b"\x90"])
def test_a_damaged_state_is_refused_and_changes_nothing(hub, damage):
    before = hub.core.status()
    hub.send(b"r0", wire.Restore(state=damage))
    assert hub.only(b"r0", wire.Refused).reason
    assert hub.core.status() == before


def test_a_state_with_another_number_of_held_out_problems_is_refused(hub):
    other = HubCore(hub.run, Source(held_out=5))
    hub.send(b"r0", wire.Restore(state=dump(other.training, other.evaluation)))
    assert hub.only(b"r0", wire.Refused).reason == (
        "tasks.held_out and evaluation.benchmarks must have 5 problems together, as in the run that wrote the "
        "checkpoint, got 2: use the same settings"
    )


def test_truncated_states_are_never_restored(hub):
    train_one_step(hub)
    state = dump(hub.core.training, hub.core.evaluation)
    for cut in range(1, len(state), 7):
        hub.send(b"r0", wire.Restore(state=state[:cut]))
        assert not hub.take(b"r0", wire.Restored)
    assert load(state, training=hub.core.training, evaluation=hub.core.evaluation)


# ---- evaluation


def test_the_first_version_is_evaluated_without_a_request_and_others_on_request():
    driver = Driver()
    driver.learner()
    driver.actor(b"a", credit=1)
    (first,) = driver.leases(b"a", "evaluate")
    assert (first.task, first.problem, first.autonomous, first.guided) == (-1, "held-out 0", 1, 1)
    driver.serve(b"a", first, reward=0.0)
    driver.send(b"a", wire.Ready(tasks=1, version=0))
    (second,) = driver.leases(b"a", "evaluate")
    driver.serve(b"a", second)
    expected = wire.Evaluated(
        version=0, pass_auto=0.5, pass_guided=0.5, problems=2, served_oldest=0, served_newest=0, lag=0.0
    )
    assert driver.only(b"r0", wire.Evaluated) == expected
    driver.send(b"r0", wire.Evaluate(version=0))
    assert driver.only(b"r0", wire.Evaluated) == expected, "the result is known already"
    train_one_step(driver)
    driver.send(b"r0", wire.Evaluate(version=1))
    driver.send(b"r0", wire.Evaluate(version=7))
    driver.core.actors[b"a"].credit = 0
    driver.send(b"a", wire.Ready(tasks=1, version=0))
    assert [lease.purpose for lease in driver.take(b"a", wire.Lease)] == ["train"], (
        "its weights are too old to evaluate version 1"
    )
    driver.send(b"a", wire.Ready(tasks=1, version=1))
    driver.serve_evaluation(b"a")
    assert driver.only(b"r0", wire.Evaluated).version == 1
    status = driver.core.status()
    assert [e["version"] for e in status["evaluations"]] == [0, 1]
    assert status["evaluation_ledger"]["trained"] == 4
    assert status["rejected_reasons"] == {"Evaluate of a version that does not exist": 1}


def test_every_round_includes_the_benchmarks():
    """The second round ends late and a newer version serves half of it; its lag refers to the learner's version."""
    source = Source(held_out=1)
    hard = Benchmark(name="hard", problems=[source.training(i) for i in (7, 8)], samples=2)
    driver = Driver(source=source, benchmarks=[hard])
    driver.learner()
    driver.actor(b"a", credit=3)
    held_out, first, second = driver.leases(b"a", "evaluate")
    driver.serve(b"a", held_out)
    driver.serve(b"a", first, reward=0.0)
    driver.send(b"a", make_rollout(second, 0, reward=1.0))
    driver.send(b"a", make_rollout(second, 1, reward=0.0))
    result = driver.only(b"r0", wire.Evaluated)
    assert (result.pass_auto, result.problems, result.served_oldest, result.served_newest) == (1.0, 1, 0, 0)
    (score,) = result.benchmarks
    assert (score.name, score.avg, score.low, score.high, score.samples, score.problems) == ("hard", 0.25, 0, 0.5, 2, 2)
    assert {k: one["mean"] for k, one in score.pass_at.items()} == {"1": 0.25, "2": 0.5}
    assert score.results.keys() == {"training 7", "training 8"}
    own = {"id": "training 8", "digest": hard.problems[1].digest, "timed_out": [], "texts": None}
    of_samples = {"correct": [True, False], "tokens": [2, 2], "finish": ["stop", "stop"]}
    assert score.results["training 8"] == own | of_samples
    train_one_step(driver)
    train_one_step(driver, step=1)
    driver.send(b"r0", wire.Evaluate(version=1))
    driver.core.actors[b"a"].credit = 0
    driver.send(b"a", wire.Ready(tasks=3, version=1))
    leases = driver.leases(b"a", "evaluate")
    for lease, versions in zip(leases, [(1,), (1, 2), (2,)], strict=True):
        driver.serve(b"a", lease, versions=versions)
    late = driver.only(b"r0", wire.Evaluated)
    assert (late.version, late.served_oldest, late.served_newest) == (1, 1, 2)
    # 2 rollouts of 2 tokens at version 1; 2 of 2 tokens at each version; 2 of 2 tokens at version 2; learner at 2
    assert late.lag == pytest.approx((4 + 4) / (4 + 8 + 4))
    (metrics,) = driver.core.status()["evaluations"][-1]["benchmarks"]
    assert (metrics["avg"], metrics["pass_at"]["2"]["mean"]) == (1.0, 1.0)
    assert "results" not in metrics, "the status is requested every second and has to stay small"
    state = driver.send(b"r0", wire.SnapshotRequest(step=2)) and driver.only(b"r0", wire.Snapshot).state
    again = Driver(source=source, benchmarks=[hard])
    again.learner()
    again.send(b"r0", wire.Restore(state=state))
    assert again.core.evaluation.results == [without_problem_results(result), without_problem_results(late)]
    other = Driver(source=source)
    other.learner()
    other.send(b"r0", wire.Restore(state=state))
    assert other.only(b"r0", wire.Refused).reason == (
        "tasks.held_out and evaluation.benchmarks must have 3 problems together, as in the run that wrote the "
        "checkpoint, got 1: use the same settings"
    )


def test_a_benchmark_without_servable_problems_has_no_score():
    source = Source(held_out=1)
    driver = Driver(source=source, benchmarks=[Benchmark(name="long", problems=[source.training(7)], samples=2)])
    driver.learner()
    driver.actor(b"a", credit=2)
    held_out, long = driver.leases(b"a", "evaluate")
    driver.serve(b"a", held_out)
    driver.send(b"a", wire.Release(task=long.task, attempt=0, reason="too long", servable=False))
    (score,) = driver.only(b"r0", wire.Evaluated).benchmarks
    assert score == wire.BenchmarkScore(name="long", avg=None, low=None, high=None, samples=2, problems=0)


# ---- the end


def test_the_hub_shuts_down_after_the_goodbyes_of_all_members(hub):
    hub.send(b"r0", wire.Finish())
    assert hub.only(b"a", wire.Stop).reason == "finished"
    hub.send(b"late", wire.Hello(role="actor", name="late"))
    assert hub.only(b"late", wire.Stop).reason == "finished"
    hub.send(b"other", wire.Hello(role="learner", name="other"))
    assert hub.only(b"other", wire.Refused).reason == "the run is over"
    hub.send(b"a", wire.Ready(tasks=1, version=0))
    assert not hub.take(b"a", wire.Lease)
    hub.send(b"a", wire.Goodbye())
    assert hub.shutdown is None
    hub.send(b"r0", wire.Goodbye())
    assert hub.shutdown == "finished"
    assert hub.send(b"a", wire.StatusRequest()) == []


def test_the_hub_shuts_down_at_the_deadline_without_the_goodbyes(hub):
    hub.send(b"r0", wire.Finish())
    hub.advance(FINISH_GRACE_S - 0.1)
    assert hub.shutdown is None
    hub.handle(Interrupted("SIGTERM"))
    hub.advance(0.2)
    assert hub.effects[-2:] == [CloseSender(b"a"), Shutdown("finished")]


def test_the_ledgers_balance_in_the_status_of_a_committed_message(hub):
    status = train_one_step(hub).status
    for ledger in (status["ledger"], status["ledger"]["rollouts"]):
        total = ledger["trained"] + sum(ledger["dropped"].values()) + ledger["in_flight"] + ledger["buffered"]
        assert ledger["dispatched"] == total
    assert (status["step"], status["version"], status["ledger"]["trained"]) == (1, 1, 2)
    assert status["tokens_trained"] == 12


# ---- tokens that become stale


def aged_hub(stale: str, **hub: Any) -> tuple[Driver, list[wire.Lease]]:
    """At version 3 with max_lag 1, the actor still works on the first of four tasks, whose tokens have version 0."""
    driver = Driver(make_run(batch=1, max_lag=1, steps=9, stale=stale, **hub))
    driver.learner()
    driver.actor(b"a", credit=1)
    driver.serve_evaluation(b"a")
    old, leases = None, []
    for step in range(3):
        driver.send(b"a", wire.Ready(tasks=2, version=step))
        leases += driver.leases(b"a")
        if old is None:
            old = leases.pop(0)
            parts = (make_part(0, 0, tokens=4),)
            driver.send(b"a", wire.Progress(task=old.task, attempt=0, purpose="train", partial=parts))
        driver.serve(b"a", leases.pop(0))
        driver.send(b"r0", wire.BatchRequest(step=step))
        driver.only(b"r0", wire.Shard)
        driver.send(b"r0", wire.Commit(step=step))
        driver.only(b"r0", wire.Committed)
        driver.send(b"r0", wire.Published(version=step + 1))
    driver.send(b"a", wire.Ready(tasks=0, version=3))
    return driver, [old, *leases]


def test_a_group_that_would_be_dropped_ends_early():
    driver, (old, *_) = aged_hub("drop")
    assert driver.take(b"a", wire.Revoked) == [wire.Revoked(task=old.task, attempt=0)]
    ledger = driver.core.status()["ledger"]
    assert ledger["dropped"] == {"stale": 1} and ledger["rollouts"]["dropped"] == {"stale": 3}


@pytest.mark.parametrize("stale", ["mask", "correct"])
def test_a_group_with_stale_tokens_is_trained_unless_all_of_it_is_stale(stale):
    driver, (old, *_) = aged_hub(stale)
    assert not driver.take(b"a", wire.Revoked)
    driver.serve(b"a", old, versions=(0, 2))
    driver.send(b"r0", wire.BatchRequest(step=3))
    assert {rollout.task for rollout in driver.only(b"r0", wire.Shard).rollouts} == {old.task}


@pytest.mark.parametrize(("stale", "dropped"), [("mask", {"stale": 1}), ("correct", {})])
def test_a_group_of_stale_tokens_alone_is_dropped_if_they_are_masked(stale, dropped):
    driver, (old, *_) = aged_hub(stale)
    driver.serve(b"a", old, versions=(0,))
    assert driver.core.status()["ledger"]["dropped"] == dropped


def test_another_actor_continues_a_rollout_whose_first_tokens_are_stale():
    driver, (old, *_) = aged_hub("correct")
    driver.actor(b"b", credit=1, version=3)
    driver.send(b"a", wire.Goodbye())
    (again,) = [lease for lease in driver.leases(b"b") if lease.task == old.task]
    assert [len(part.tokens) for part in again.partial] == [4] and again.min_version > 0
    driver.serve(b"b", again, versions=(0, 3))
    assert driver.core.status()["rejected"] == 0
    assert old.task in driver.core.training.leases.complete


@pytest.mark.parametrize(("batch_from", "trained"), [("complete", 1), ("begun", 0)])
def test_batches_take_what_is_complete_or_what_was_begun_first(batch_from, trained):
    driver = Driver(make_run(batch=1, max_lag=2, stale="correct", batch_from=batch_from))
    driver.learner()
    driver.actor(b"a", credit=1)
    driver.serve_evaluation(b"a")
    driver.send(b"a", wire.Ready(tasks=2, version=0))
    first, second, *_ = driver.leases(b"a")
    driver.send(b"r0", wire.BatchRequest(step=0))
    driver.serve(b"a", second)
    driver.serve(b"a", first)
    assert {rollout.task for rollout in driver.only(b"r0", wire.Shard).rollouts} == {trained}


@pytest.mark.parametrize(("in_flight", "tasks"), [(0, 1), (3, 2)])
def test_a_late_group_leaves_its_place_to_another(in_flight, tasks):
    driver, _ = aged_hub("correct", batches_in_flight=in_flight)
    driver.send(b"a", wire.Ready(tasks=9, version=3))
    running = len(driver.core.training.leases.running)
    assert running == 1 + tasks, "the late one, and as many as max_lag admits beside it"


# ---- evaluation beside training


def sharing_hub(share: float, *, leases: int) -> tuple[int, int]:
    """How many of an actor's leases are evaluation's and training's, if there are ten and eight tasks."""
    driver = Driver(make_run(batch=4, max_lag=1, share=share), Source(held_out=10))
    driver.learner()
    driver.actor(b"a", credit=leases)
    return len(driver.core.evaluation.leases.running), len(driver.core.training.leases.running)


@pytest.mark.parametrize(("share", "evaluated"), [(0.25, 2), (0.5, 4), (1.0, 8)])
def test_evaluation_gets_its_share_of_the_leases_and_training_the_others(share: float, evaluated: int) -> None:
    assert sharing_hub(share, leases=8) == (evaluated, 8 - evaluated)


def test_evaluation_gets_what_training_cannot_use() -> None:
    assert sharing_hub(0.25, leases=30) == (10, 8)


def test_a_small_share_is_at_least_one_lease() -> None:
    assert sharing_hub(0.01, leases=2) == (1, 1)


def test_weights_that_only_another_machine_has_are_rejected():
    driver = Driver(make_run())
    driver.learner(publish=False)
    driver.send(b"r0", wire.Published(version=0, store="tcp://10.0.0.2:4000"))
    assert driver.core.published == -1 and driver.core.status()["rejected"] == 1


def test_an_actor_whose_connection_has_ended_returns_in_time_or_is_lost() -> None:
    driver = Driver()
    driver.learner()
    for member in (b"a", b"b"):
        driver.actor(member, credit=1)
    held = {member: driver.only(member, wire.Lease) for member in (b"a", b"b")}
    for member in (b"a", b"b", b"stranger"):
        driver.handle(Disconnected(member))
    holds = np.array([held[b"a"].task, held[b"a"].attempt], np.int32)
    driver.send(b"a", wire.Hello(role="actor", name="a", holds=holds))
    driver.advance(RETURN_S + 0.1)
    assert set(driver.core.actors) == {b"a"}
    assert [table.held_by(b"a") for table in driver.core._lease_tables] != [[], []], "it keeps its lease"
    assert [table.held_by(b"b") for table in driver.core._lease_tables] == [[], []]


def test_an_actor_whose_connection_ends_before_its_weight_sender_is_up_is_not_welcomed_before_its_return() -> None:
    driver = Driver()
    driver.send(b"a", wire.Hello(role="actor", name="a"))
    driver.handle(Disconnected(b"a"))
    assert driver.handle(SenderUp(b"a", "127.0.0.1", 4000)) == [CloseSender(b"a")]
    assert OpenSender(b"a", "a") in driver.send(b"a", wire.Hello(role="actor", name="a"))
    driver.handle(SenderUp(b"a", "127.0.0.1", 4001))
    assert driver.only(b"a", wire.Welcome).session_port == 4001
    driver.advance(RETURN_S + 0.1)
    assert set(driver.core.actors) == {b"a"}


def test_an_actor_that_is_silent_and_overdue_is_removed_once() -> None:
    driver = Driver()
    driver.actor(b"a")
    actor = driver.core.actors[b"a"]
    actor.return_by = driver.now  # as no known sequence of events leaves a welcomed actor
    driver.advance(driver.run.hub.lease_timeout_s + 1)
    assert not driver.core.actors and driver.core.actors.left == 1


# ---- tasks that begin with new weights


def synchronous_hub() -> Driver:
    """Lag 0, four problems a step: the actors `b"a"` and `b"b"` could take three leases each, and serve version 0."""
    driver = ready_hub(batch=4, max_lag=0)
    driver.actor(b"b")
    driver.send(b"a", wire.Ready(tasks=4, version=0))
    for lease in driver.leases(b"a"):
        driver.serve(b"a", lease)
    driver.send(b"r0", wire.BatchRequest(step=0))
    driver.only(b"r0", wire.Shard)
    for member in (b"a", b"b"):
        driver.send(member, wire.Ready(tasks=3, version=0))
    driver.send(b"r0", wire.Commit(step=0))  # the driver publishes version 1
    assert not driver.leases(b"a") and not driver.leases(b"b")
    return driver


def serves(driver: Driver, member: bytes) -> int:
    """The actor tells that it serves version 1; returns how many leases it gets."""
    driver.send(member, wire.Heartbeat(state="serving", version=1))
    return len(driver.leases(member))


def test_the_first_actor_with_new_weights_leaves_the_others_their_share() -> None:
    driver = synchronous_hub()
    assert serves(driver, b"a") == 2
    for _ in range(3):
        assert serves(driver, b"a") == 0, "however often the rules are applied"
    assert serves(driver, b"b") == 2


def test_what_is_kept_for_an_actor_that_stays_behind_is_leased_after_a_while() -> None:
    driver = synchronous_hub()
    assert serves(driver, b"a") == 2
    driver.advance(FAIR_S + 0.1)
    assert len(driver.leases(b"a")) == 1, "what it still has credit for"
    assert serves(driver, b"b") == 1


@pytest.mark.parametrize("question", [wire.StatusRequest(), wire.SettingsRequest()])
def test_a_question_changes_nothing_although_time_has_passed(question: wire.Message) -> None:
    """It is not in the journal, so a restarted hub would not know of a lease that it led to."""
    driver = synchronous_hub()
    serves(driver, b"a")
    driver.now += FAIR_S + 0.1
    (answer,) = driver.send(b"a", question)
    assert isinstance(answer.message, wire.Status | wire.Settings)
    driver.handle(Tick())
    assert len(driver.leases(b"a")) == 1, "which are due since that time"


def test_nothing_is_kept_for_an_actor_that_has_left() -> None:
    driver = synchronous_hub()
    driver.send(b"b", wire.Goodbye())
    assert serves(driver, b"a") == 3


def test_nothing_is_kept_for_an_actor_that_misses_a_version() -> None:
    driver = synchronous_hub()
    assert serves(driver, b"a") == 2
    driver.advance(FAIR_S + 0.1)
    driver.send(b"a", wire.Ready(tasks=4, version=1))
    leases = [lease for _ in range(2) for lease in driver.leases(b"a")]
    assert len(leases) == 2, "the share of b, which still serves version 0"
    for member, lease in running(driver):
        driver.serve(member, lease, versions=(1,))
    driver.send(b"r0", wire.BatchRequest(step=1))
    driver.only(b"r0", wire.Shard)
    driver.send(b"r0", wire.Commit(step=1))
    driver.core.actors[b"a"].credit = 3
    driver.send(b"a", wire.Heartbeat(state="serving", version=2))
    assert len(driver.leases(b"a")) == 3, "all that it has credit for"


def running(driver: Driver) -> list[tuple[bytes, wire.Lease]]:
    """The training leases that are running, and whose they are."""
    leases = driver.core.training.leases.running.values()
    return [(lease.member, lease.task.lease(attempt=lease.attempt, min_version=lease.min_version)) for lease in leases]


@pytest.mark.parametrize(("actors", "period"), [(1, 1.0), (32, 1.0), (64, 2.0)])
def test_the_more_actors_there_are_the_less_often_each_is_asked_to_report(actors: int, period: float) -> None:
    """Reports of running rollouts are most of what many actors send."""
    driver = Driver(make_run(progress_s=1.0))
    driver.learner(ranks=1)
    for number in range(actors - 1):
        driver.actor(f"idle-{number}".encode())
    driver.actor(b"busy", credit=1)
    assert driver.only(b"busy", wire.Lease).report_s == period

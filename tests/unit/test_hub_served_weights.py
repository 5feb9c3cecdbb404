"""What the hub knows of the weights that engines serve: impossible digests, and the three alarms of the canary."""

from typing import Any

import numpy as np
import pytest
from hub_support import Driver, make_part, make_rollout, make_run

from sgpo_async.hub.core import MAX_INVALID
from sgpo_async.hub.events import Warn
from sgpo_async.hub.served_weights import (
    BFLOAT16_TOLERANCE,
    FLOAT32_TOLERANCE,
    MAX_ENGINES,
    UNKNOWN_DIGEST,
    ServedWeights,
    tolerance_of,
)
from sgpo_async.wire import records as wire
from sgpo_async.wire.records import OBSERVED

TOLERANCE = 0.01


def f4(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


def score(version: int, digest: int, *logprobs: float, engine: str = "") -> wire.Canary:
    return wire.Canary(engine=engine, version=version, digest=digest, logprobs=f4(*logprobs))


def served() -> ServedWeights:
    """Versions 0, 1 and 2 with the digests 10, 11 and 12; the canary moves by 0.5 nats with each."""
    made = ServedWeights()
    for version in range(3):
        made.publish(version, 10 + version, f4(-1 - 0.5 * version, -2), oldest=0)
    return made


def judge(weights: ServedWeights, *scores: wire.Canary, actor: str = "a") -> list[str]:
    """The alarms of the last score."""
    lines: list[str] = []
    for one in scores:
        lines = weights.judge(actor, one, tolerance=TOLERANCE)
    return lines


def test_an_engine_that_follows_the_learner_raises_no_alarm() -> None:
    weights = served()
    for version in (0, 1, 1, 2):
        assert judge(weights, score(version, 10 + version, -1.001 - 0.5 * version, -2)) == []
    found = weights.metrics()
    assert found["canary_alarms"] == {"differs": 0, "stuck": 0, "moved": 0}
    assert found["canary_max"] == pytest.approx(0.0005, rel=1e-3) == found["canary_mean"]


def test_an_engine_that_ignores_updates_is_stuck_and_differs() -> None:
    weights = served()
    assert judge(weights, score(0, 10, -1, -2)) == []
    differs, stuck = judge(weights, score(1, 11, -1, -2))
    assert "a at version 1, digest 00000000: its canary differs from the learner's by 0.25 nats" in differs
    assert "tolerance 0.01 (hub.canary_tolerance)" in differs and "start it again" in differs
    assert "the learner's canary moved by 0.25 nats per token, but that of the engine by 0:" in stuck
    assert judge(weights, score(2, 12, -1, -2)) == [], "each alarm of an engine is logged when it begins"
    assert weights.metrics()["canary_alarms"] == {"differs": 2, "stuck": 2, "moved": 0}
    assert judge(weights, score(2, 12, -2, -2)) != [], "now it moves without a version"
    assert judge(weights, score(2, 12, -2, -2)) == []
    assert weights.by_actor()["a"].difference == 0 and weights.metrics()["canary_alarms"]["differs"] == 2


def test_small_movements_add_up_until_an_engine_that_ignores_updates_is_stuck() -> None:
    weights, alarms = ServedWeights(), []
    for version in range(8):
        weights.publish(version, version, f4(-1 - 0.0006 * version, -2), oldest=0)
        alarms.append(judge(weights, score(version, version, -1, -2)))
    assert alarms[:4] == [[]] * 4
    assert [bool(lines) for lines in alarms].index(True) == 4, "after 4 * 0.0006 nats on one of two tokens"
    assert weights.alarms["differs"] == 0 < weights.alarms["stuck"]


def test_noise_of_an_engine_in_bfloat16_is_no_alarm_where_the_learner_hardly_moves() -> None:
    weights, noise = ServedWeights(), np.random.default_rng(0)
    for version in range(200):
        weights.publish(version, version, f4(*(-1 - 1e-5 * version - np.arange(24))), oldest=0)
        own = -1 - 1e-5 * version - np.arange(24) + noise.normal(0, 0.005, 24)
        assert judge(weights, score(version, version, *own)) == []


def test_an_engine_that_applied_half_of_the_tensors_differs() -> None:
    (line,) = judge(served(), score(0, 10, -1, -2), score(1, 11, -1.25, -2))
    assert "differs from the learner's by 0.12 nats" in line


def test_weights_that_move_without_a_version_are_an_alarm_also_where_the_learner_has_no_score() -> None:
    weights = served()
    weights.publish(3, 13, None, oldest=0)
    assert judge(weights, score(3, 13, -1, -2), score(3, 13, -1.01, -2)) == []
    (line,) = judge(weights, score(3, 13, -1.1, -2))
    assert "its canary moved by 0.045 nats per token while its version and digest did not" in line
    assert judge(weights, score(3, 13, -1.1, -2)) == []
    assert weights.by_actor()["a"].difference is None


def test_each_server_of_an_actor_is_judged_by_itself() -> None:
    weights = served()
    assert judge(weights, score(0, 10, -1, -2, engine="http://one"), score(0, 10, -1, -2, engine="http://two")) == []
    assert judge(weights, score(1, 11, -1.5, -2, engine="http://one")) == []
    assert "a (http://two) at version 1" in judge(weights, score(1, 11, -1, -2, engine="http://two"))[0]
    assert [(row["url"], row["version"], row["canary"]) for row in weights.by_actor()["a"].servers] == [
        ("http://one", 1, 0.0),
        ("http://two", 1, 0.25),
    ]
    assert weights.by_actor()["a"].difference == weights.metrics()["canary_max"] == 0.25
    weights.leave("a")
    assert weights.by_actor() == {} and weights.metrics()["canary_max"] is None


def test_a_version_that_was_published_twice_with_other_content_has_both_digests() -> None:
    weights = served()
    weights.publish(2, 99, f4(-7, -2), oldest=0)
    versions, digests = np.array([2, 2], np.int32), np.array([12, 99], np.int64)
    assert weights.objection(versions, digests) is None
    assert judge(weights, score(2, 12, -2, -2)) == judge(weights, score(2, 99, -7, -2)) == []


def test_only_published_weights_are_possible_and_an_observation_has_none() -> None:
    weights = served()
    for versions, digests, possible in (
        ([0, OBSERVED, 2], [10, 0, 12], True),
        ([0], [11], False),
        ([1], [0], False),
        ([0, OBSERVED], [10, 10], False),
        ([-2], [10], False),
    ):
        found = weights.objection(np.array(versions, np.int32), np.array(digests, np.int64))
        assert found == (None if possible else UNKNOWN_DIGEST), versions


def test_old_weights_are_forgotten() -> None:
    weights = served()
    weights.publish(3, 13, None, oldest=2)
    assert set(weights.published) == {(2, 12), (3, 13)}
    assert weights.canary_objection("a", score(1, 11, -1, -2)) is None, "a slow engine may still serve it"
    assert weights.canary_objection("a", score(3, 12, -1, -2)) == f"canary: {UNKNOWN_DIGEST}"
    assert "finite" in str(weights.canary_objection("a", score(3, 13, float("nan"), -2)))
    assert "as many" in str(weights.canary_objection("a", score(3, 13, -2)))
    weights.publish(3, 13, f4(-1, -2), oldest=2)
    weights.publish(3, 13, None, oldest=2)
    assert weights.published[3, 13] is not None, "sent again after a restart without its score"
    weights.publish(0, 10, None, oldest=2)
    assert set(weights.published) == {(2, 12), (3, 13)}, "sent again after a lost connection"
    assert weights.canary_objection("a", score(1, 11, -1, -2)) is None


def test_the_number_of_engines_of_an_actor_is_limited() -> None:
    weights = served()
    for number in range(MAX_ENGINES):
        one = score(0, 10, -1, -2, engine=f"http://{number}")
        assert weights.canary_objection("a", one) is None
        weights.judge("a", one, tolerance=TOLERANCE)
    assert weights.canary_objection("a", one) is None
    assert "at most" in str(weights.canary_objection("a", score(0, 10, -1, -2, engine="http://another")))
    assert weights.canary_objection("b", score(0, 10, -1, -2)) is None


def test_the_number_of_log_probabilities_is_the_learners_also_when_its_scores_are_forgotten() -> None:
    weights = served()
    weights.publish(9, 19, None, oldest=9)
    assert "as many" in str(weights.canary_objection("a", score(9, 19, -1)))


def test_scores_of_different_lengths_are_not_compared_before_the_learners_is_known() -> None:
    weights = ServedWeights()
    weights.publish(0, 10, None, oldest=0)
    for one in (score(0, 10, -1, -2, -3), score(0, 10, -1, -2)):
        assert weights.canary_objection("a", one) is None
        assert judge(weights, one) == []


def test_the_tolerance_follows_the_precision() -> None:
    run = make_run()
    assert tolerance_of(run, learner_bfloat16=False) == FLOAT32_TOLERANCE
    assert tolerance_of(run, learner_bfloat16=True) == BFLOAT16_TOLERANCE
    assert tolerance_of(make_run(canary_tolerance=0.3), learner_bfloat16=True) == 0.3


# ---- in the core


def begun(**changes: Any) -> tuple[Driver, list[wire.Lease]]:
    """A learner that has published version 0 with the digest 10, and an actor with leases."""
    hub = Driver(make_run(**changes))
    hub.learner(publish=False)
    hub.send(b"r0", wire.Published(version=0, digest=10, canary=f4(-1, -2)))
    hub.actor(b"a", credit=6)  # of which two are for the evaluation
    return hub, hub.leases(b"a")


def made_by(lease: wire.Lease, slot: int, version: int, digest: int) -> wire.Rollout:
    return make_rollout(lease, slot, versions=(version,), digests=np.array([digest], np.int64))


def test_rollouts_and_reports_of_unpublished_weights_are_refused_and_their_actor_is_quarantined() -> None:
    hub, leases = begun(max_lag=3)
    first, second, third = leases[:MAX_INVALID]
    hub.send(b"a", made_by(first, 0, 0, 10))
    assert hub.core.rejected.total() == 0
    hub.send(b"a", made_by(first, 1, 0, 11))
    assert hub.core.rejected[UNKNOWN_DIGEST] == 1
    part = make_part(0, 0, 2)  # of the digest 0
    hub.send(b"a", wire.Progress(task=second.task, attempt=0, purpose="train", partial=(part,)))
    assert hub.core.rejected[f"report: {UNKNOWN_DIGEST}"] == 1 and not hub.core.quarantined
    hub.send(b"a", made_by(third, 0, 0, 12))
    assert list(hub.core.quarantined) == [(b"", "a")] and UNKNOWN_DIGEST in hub.core.quarantined[b"", "a"]


def test_a_score_of_weights_that_were_never_published_is_refused() -> None:
    hub, _ = begun()
    hub.send(b"a", score(0, 11, -1, -2))
    assert hub.core.rejected == {f"canary: {UNKNOWN_DIGEST}": 1}
    hub.send(b"a", score(9, 11, -1, -2))
    assert hub.core.rejected.total() == 1, "of another run, before the engine has loaded weights of this one"


def test_what_arrives_before_its_publication_waits_for_it() -> None:
    """An engine may have loaded a version before the learner's message about it has reached the hub."""
    hub, leases = begun()
    hub.core.training.base += 1  # as after a commit
    one, other = leases[:2]
    early = made_by(one, 0, 1, 11)
    for message in (early, early, made_by(one, 1, 1, 12), score(1, 11, -3, -2)):
        hub.send(b"a", message)
    part = make_part(0, 0, 2, version=1)
    hub.send(b"a", wire.Progress(task=other.task, attempt=0, purpose="train", partial=(part,)))
    assert hub.take(b"a", wire.Ack) == [] and hub.core.rejected.total() == 0
    effects = hub.send(b"r0", wire.Published(version=1, digest=11, canary=f4(-1, -2)))
    assert [ack.slot for ack in hub.take(b"a", wire.Ack)] == [0, 1], "a repeated rollout is kept once"
    assert hub.core.rejected == {UNKNOWN_DIGEST: 1, f"report: {UNKNOWN_DIGEST}": 1}
    assert hub.core.training.leases.duplicates == 0
    assert [effect for effect in effects if isinstance(effect, Warn) and "differs" in effect.text]
    assert not hub.core.early


def test_what_arrives_before_a_publication_that_a_later_one_has_overtaken_waits_for_it() -> None:
    """After a lost connection, the learner sends the publications again that may be lost with it."""
    hub, leases = begun()
    hub.core.training.base += 2
    one, other = leases[:2]
    hub.send(b"r0", wire.Published(version=2, digest=12))
    for message in (made_by(one, 0, 1, 11), made_by(one, 1, 1, 12), made_by(one, 2, 2, 12), score(1, 11, -3, -2)):
        hub.send(b"a", message)
    part = make_part(0, 0, 2, version=1)
    hub.send(b"a", wire.Progress(task=other.task, attempt=0, purpose="train", partial=(part,)))
    assert [ack.slot for ack in hub.take(b"a", wire.Ack)] == [2] and hub.core.rejected.total() == 0
    effects = hub.send(b"r0", wire.Published(version=1, digest=11, canary=f4(-1, -2)))
    assert [ack.slot for ack in hub.take(b"a", wire.Ack)] == [0, 1]
    assert hub.core.rejected == {UNKNOWN_DIGEST: 1, f"report: {UNKNOWN_DIGEST}": 1}
    assert [effect for effect in effects if isinstance(effect, Warn) and "differs" in effect.text]
    assert hub.core.published == 2 and not hub.core.early


def test_of_the_early_scores_of_one_engine_the_last_is_kept() -> None:
    hub, _ = begun()
    hub.core.training.base += 1
    for engine, last in (("http://x", -9), ("http://y", -2), ("http://x", -2)):
        hub.send(b"a", score(1, 11, -1, last, engine=engine))
    assert len(hub.core.early) == 2
    hub.send(b"r0", wire.Published(version=1, digest=11, canary=f4(-1, -2)))
    assert [row["canary"] for row in hub.core.served.by_actor()["a"].servers] == [0, 0]


def test_a_restore_forgets_what_was_early() -> None:
    hub, leases = begun()
    hub.core.training.base += 1
    hub.send(b"a", made_by(leases[0], 0, 1, 11))
    hub.send(b"r0", wire.Restore(state=b"", id="once"))
    assert not hub.core.early


def test_scores_of_a_version_that_a_learner_never_announced_before_it_died_are_no_fault_of_the_actor() -> None:
    """It was in the store, so engines have it; the next learner resumes, and publishes the version after it."""
    hub, _ = begun()
    hub.core.training.base += 1
    hub.send(b"a", score(1, 11, -3, -2))
    hub.send(b"r0", wire.Restore(state=b"", id="once"))
    version = hub.only(b"r0", wire.Restored).version
    assert version == 2
    hub.send(b"r0", wire.Published(version=version, digest=12, canary=f4(-1, -2)))
    hub.send(b"a", score(1, 11, -3, -2))
    assert hub.core.rejected.total() == 0 and hub.core.served.alarms.total() == 0 and not hub.core.early


def test_publications_that_are_sent_again_make_lost_ones_known() -> None:
    hub, leases = begun()
    hub.core.training.base += 2
    hub.send(b"r0", wire.Published(version=2, digest=12))
    hub.send(b"r0", wire.Published(version=1, digest=11))
    assert hub.core.published == 2 and hub.core.rejected.total() == 0
    hub.send(b"a", made_by(leases[0], 0, 1, 11))
    assert hub.core.rejected.total() == 0 and len(hub.take(b"a", wire.Ack)) == 1


def test_digests_of_a_prefix_stay_known_as_long_as_it_may_be_continued() -> None:
    """Actor a has begun a rollout under version 0; b ends it eight versions later."""
    hub, leases = begun(stale="correct", steps=20, max_lag=1)
    slow = leases[-1]
    part = wire.PartialRollout(
        slot=0, start=0, tokens=np.arange(2, dtype=np.int32), logprobs=f4(-1, -1), versions=np.zeros(1, np.int32),
        digests=np.array([10], np.int64), ends=np.array([2], np.int32),
    )  # fmt: skip
    hub.send(b"a", wire.Progress(task=slow.task, attempt=0, purpose="train", partial=(part,)))
    hub.send(b"a", wire.Goodbye())
    for version in range(1, 9):
        hub.core.training.base += 1
        hub.send(b"r0", wire.Published(version=version, digest=10 + version))
    hub.actor(b"b", version=8, credit=8)
    (lease,) = [lease for lease in hub.leases(b"b") if lease.task == slow.task]
    assert lease.partial[0].digests.tolist() == [10]
    spans = {"versions": (0, 8), "digests": np.array([10, 18], np.int64)}
    hub.send(b"b", make_rollout(lease, 0, **spans))
    assert hub.core.rejected.total() == 0
    arrived = hub.core.training.leases.running[slow.task].arrived.rollouts[0]
    assert (arrived.versions.tolist(), arrived.digests.tolist()) == ([0, 8], [10, 18])
    assert (0, 10) in hub.core.served.published
    hub.send(b"b", wire.Goodbye())


def test_the_status_says_what_each_engine_serves() -> None:
    hub, _ = begun()
    hub.send(b"a", wire.Heartbeat(state="serving", version=0, digest=0x0123456789ABCDEF))
    hub.send(b"a", score(0, 10, -1, -2.5))
    status = hub.core.status()
    (row,) = status["actors"]
    assert (row["digest"], row["canary"], row["servers"]) == ("01234567", 0.25, [])
    assert status["canary_mean"] == status["canary_max"] == 0.25
    assert status["canary_alarms"] == {"differs": 1, "stuck": 0, "moved": 0}


class Counted(dict):
    """Counts how often all of its items are looked at."""

    passes = 0

    def items(self) -> Any:
        self.passes += 1
        return super().items()


def test_a_status_looks_at_the_engines_once_however_many_actors_there_are() -> None:
    hub, _ = begun()
    for name in (b"b", b"c", b"d"):
        hub.actor(name)
    hub.send(b"c", score(0, 10, -1, -2.5))
    hub.core.served.engines = engines = Counted(hub.core.served.engines)
    assert [row["canary"] for row in hub.core.status()["actors"]] == [None, None, 0.25, None]
    assert engines.passes == 1


def test_a_server_that_was_started_again_at_another_url_is_forgotten_at_its_old_one() -> None:
    hub, _ = begun(canary_s=2)
    hub.send(b"a", score(0, 10, -9, -9, engine="http://old"))
    hub.advance(8)
    hub.send(b"a", score(0, 10, -1, -2, engine="http://new"))
    hub.advance(1.9)
    assert [row["url"] for row in hub.core.served.by_actor()["a"].servers] == ["http://new", "http://old"]
    hub.advance(0.2)
    assert [row["url"] for row in hub.core.served.by_actor()["a"].servers] == ["http://new"]
    assert hub.core.status()["canary_max"] == 0


def test_an_alarm_does_not_end_the_work_of_an_actor() -> None:
    hub, leases = begun()
    for _ in range(2 * MAX_INVALID):
        hub.send(b"a", score(0, 10, -9, -9))
    for lease in leases:
        for slot in range(3):
            hub.send(b"a", made_by(lease, slot, 0, 10))
    hub.send(b"r0", wire.BatchRequest(step=0))
    hub.only(b"r0", wire.Shard)
    assert not hub.core.quarantined and hub.core.rejected.total() == 0

"""What a lost actor has sampled: how the hub keeps it, how another actor continues it, and why that is unbiased."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engines_models import engine_of, tiny
from hub_support import Driver, Source, make_part, make_run
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_support import TOKENIZER

from sgpo_async.config.schema import Tasks
from sgpo_async.hub.events import SenderDown
from sgpo_async.rollout.partial import Arrived, after, join
from sgpo_async.rollout.sampler import RolloutSampler, Sampled
from sgpo_async.wire import records as wire

# ---- parts of one completion


@st.composite
def completions(draw: st.DrawFn) -> wire.PartialRollout:
    """A whole completion with spans of several versions."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    versions = sorted(draw(st.sets(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes))))
    length, k = sum(sizes), draw(st.integers(0, 2))
    kept = draw(st.none() | st.lists(st.integers(0, 3), min_size=length, max_size=length))
    return wire.PartialRollout(
        slot=3,
        start=0,
        tokens=np.arange(100, 100 + length, dtype=np.int32),
        logprobs=-np.arange(length, dtype=np.float32),
        versions=np.array(versions, np.int32),
        digests=np.zeros(len(versions), np.int64),
        ends=np.cumsum(sizes, dtype=np.int32),
        top_tokens=np.arange(length * k, dtype=np.int32) if k else None,
        top_logprobs=-np.arange(length * k, dtype=np.float32) if k else None,
        kept=None if kept is None else np.arange(500, 500 + sum(kept), dtype=np.int32),
        kept_sizes=None if kept is None else np.array(kept, np.int32),
    )


def same(one: wire.PartialRollout, other: wire.PartialRollout) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one))


@given(whole=completions(), data=st.data())
@settings(deadline=None)
def test_the_parts_of_a_completion_join_to_the_whole(whole: wire.PartialRollout, data: st.DataObject) -> None:
    length = len(whole.tokens)
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4))) if length > 1 else []
    parts = []
    for begin, end in zip([0, *cuts], [*cuts, length], strict=True):
        seen = join([whole]) if end == length else _first(whole, end)  # what the engine had sampled at that time
        piece = after(seen, begin)
        assert piece is not None
        parts.append(piece)
    assert after(whole, length) is None
    arrived = Arrived(size=4)
    assert all(arrived.report(piece) for piece in parts)
    (joined,) = arrived.partial()
    assert same(joined, whole)


def _first(whole: wire.PartialRollout, end: int) -> wire.PartialRollout:
    """The first `end` tokens of a completion, written without the product's functions."""
    versions = np.repeat(whole.versions, np.diff(whole.ends, prepend=0))[:end]
    k = 0 if whole.top_tokens is None else len(whole.top_tokens) // len(whole.tokens)
    changes = [i + 1 for i in range(end) if i + 1 == end or versions[i] != versions[i + 1]]
    return wire.PartialRollout(
        slot=whole.slot,
        start=0,
        tokens=whole.tokens[:end],
        logprobs=whole.logprobs[:end],
        versions=versions[[i - 1 for i in changes]],
        digests=np.zeros(len(changes), np.int64),
        ends=np.array(changes, np.int32),
        top_tokens=whole.top_tokens[: end * k] if whole.top_tokens is not None else None,
        top_logprobs=whole.top_logprobs[: end * k] if whole.top_logprobs is not None else None,
        kept=None if whole.kept is None else whole.kept[: sum((whole.kept_sizes.tolist())[:end])],
        kept_sizes=None if whole.kept_sizes is None else whole.kept_sizes[:end],
    )


def test_spans_of_one_version_and_two_digests_stay_apart() -> None:
    """After the learner has resumed, a version may exist twice."""
    one, same_weights, other = make_part(0, 0, 2), make_part(0, 2, 2), make_part(0, 4, 2)
    joined = join([one, same_weights, replace(other, digests=np.array([7], np.int64))])
    assert (joined.versions.tolist(), joined.digests.tolist(), joined.ends.tolist()) == ([0, 0], [0, 7], [4, 6])
    assert after(joined, 3).digests.tolist() == [0, 7]  # type: ignore[union-attr]
    assert after(joined, 4).digests.tolist() == [7]  # type: ignore[union-attr]


def test_a_report_after_a_gap_is_ignored_and_one_from_the_beginning_replaces_all() -> None:
    arrived = Arrived(size=2)
    assert arrived.report(make_part(0, 0, 3))
    assert not arrived.report(make_part(0, 4, 1))
    assert not arrived.report(make_part(0, 2, 2))
    assert arrived.sampled(0) == 3
    assert arrived.report(make_part(0, 0, 2))
    assert arrived.sampled(0) == 2
    assert arrived.oldest_version == 0
    assert Arrived(size=2).oldest_version is None


# ---- from one actor to another, through the hub's core

VOCABULARY = 64


class Member:
    """An actor with a real engine, whose messages the test carries to the core."""

    def __init__(self, driver: Driver, name: bytes, *, version: int = 0) -> None:
        self.driver, self.name = driver, name
        tasks = Tasks(reward_workers=1)
        encode = TOKENIZER.encode
        tokenizer = type(TOKENIZER)(
            decode=TOKENIZER.decode, encode=lambda text, **_: [t % VOCABULARY for t in encode(text)]
        )
        model = tiny("qwen2", vocabulary=VOCABULARY, seed=version)
        self.engine = engine_of(model, slots=16, end_ids=range(2), version=version)
        driver.core.served.publish(version, self.engine.digest, None, oldest=0)
        driver.core.published = version  # without the evaluation that a first Published begins
        self.sampler = RolloutSampler(self.engine, tokenizer, tasks)
        driver.actor(name, credit=1, version=version)

    def start(self) -> wire.Lease:
        (lease,) = self.driver.leases(self.name)
        self.sampler.add(lease)
        return lease

    def step(self, steps: int) -> int:
        """Work so long; return how many rollouts were finished."""
        finished = 0
        for _ in range(steps):
            done = [one.rollout for one in self.sampler.step(0.0, 0.0) if isinstance(one, Sampled)]
            if done:
                self.report()
            for rollout in done:
                self.driver.send(self.name, rollout)
            finished += len(done)
        return finished

    def report(self) -> None:
        for progress in self.sampler.progress():
            self.driver.send(self.name, progress)


def hub(**changes: Any) -> Driver:
    run = make_run(batch=1, max_lag=0, steps=5, autonomous=5, guided=3, **changes)
    source = Source(held_out=1)
    source.verifier = "cues"
    driver = Driver(run, source)
    driver.learner(publish=False)
    return driver


def whole_group(kill_after: list[int]) -> tuple[list[wire.Rollout], list[wire.Lease]]:
    """The rollouts of task 0, whose actors are lost after these numbers of engine steps, and the leases."""
    driver, members, leases = hub(), [], []
    try:
        for number, steps in enumerate([*kill_after, 10**6]):
            member = Member(driver, b"actor-%d" % number)
            members.append(member)
            leases.append(member.start())
            while steps > 0 and 0 not in driver.core.training.leases.complete:
                member.step(1)
                steps -= 1
                if steps % 3 == 0:
                    member.report()
            if 0 in driver.core.training.leases.complete:
                break
            driver.handle(SenderDown(member.name, "killed"))
            driver.advance(10.0)
    finally:
        for member in members:
            member.sampler.close()
    return list(driver.core.training.leases.complete[0].rollouts), leases


@pytest.fixture(scope="module")
def uninterrupted() -> list[wire.Rollout]:
    return whole_group([])[0]


@pytest.mark.parametrize("kill_after", [[1], [4], [9], [6, 6], [2, 3, 4, 5], [25]], ids=str)
def test_a_group_whose_actors_are_killed_has_the_tokens_of_an_uninterrupted_one(
    kill_after: list[int], uninterrupted: list[wire.Rollout]
) -> None:
    rollouts, leases = whole_group(kill_after)
    assert len(leases) > 1, "no actor was killed"
    assert [lease.attempt for lease in leases] == list(range(len(leases)))
    for one, expected in zip(rollouts, uninterrupted, strict=True):
        assert one.tokens.tolist() == expected.tokens.tolist()
        np.testing.assert_allclose(one.logprobs, expected.logprobs, atol=1e-5)
        assert (one.reward, one.finish, one.guided) == (expected.reward, expected.finish, expected.guided)


def test_an_actor_that_hands_over_loses_no_token(uninterrupted: list[wire.Rollout]) -> None:
    """Its last report holds everything, so the next actor samples only what is missing."""
    driver = hub()
    first = Member(driver, b"first")
    lease = first.start()
    first.step(5)
    first.report()
    driver.send(b"first", wire.Release(task=lease.task, attempt=lease.attempt, reason="leaving"))
    sampled = complete_by_another(driver, first)
    assert sum(sampled) == sum(len(rollout.tokens) for rollout in uninterrupted)
    assert min(sampled) > 0


def test_a_continuation_under_another_version_keeps_the_digest_of_every_span() -> None:
    driver = hub(stale="correct")
    first = Member(driver, b"first")
    first.start()
    first.step(5)
    first.report()
    driver.handle(SenderDown(b"first", "killed"))
    driver.advance(10.0)
    driver.core.training.base += 1  # as after a step
    second = Member(driver, b"second", version=1)
    digests = [first.engine.digest, second.engine.digest]
    assert digests[0] != digests[1] and 0 not in digests
    try:
        lease = second.start()
        assert {tuple(part.digests.tolist()) for part in lease.partial} == {(digests[0],)}
        while 0 not in driver.core.training.leases.complete:
            second.step(1)
    finally:
        first.sampler.close()
        second.sampler.close()
    rollouts = driver.core.training.leases.complete[0].rollouts
    spans = {(tuple(one.versions.tolist()), tuple(one.digests.tolist())) for one in rollouts}
    assert ((0, 1), tuple(digests)) in spans
    assert spans <= {((0, 1), tuple(digests)), ((0,), (digests[0],)), ((1,), (digests[1],))}
    assert driver.core.rejected.total() == 0


def complete_by_another(driver: Driver, first: Member) -> list[int]:
    """Another actor completes the group of `first`; return how many tokens each of the two has sampled."""
    second = Member(driver, b"second")
    try:
        second.start()
        while 0 not in driver.core.training.leases.complete:
            second.step(1)
        return [member.engine.load_status().tokens for member in (first, second)]
    finally:
        first.sampler.close()
        second.sampler.close()


def tokens_lost(*, leaves: bool, period: int, steps: int) -> tuple[int, int]:
    """Tokens that are sampled again when an actor ends after so many engine steps: of the group, and of a new group.

    The actor reports every `period` steps. The second number is what was lost when groups started again.
    """
    driver = hub()
    first = Member(driver, b"first")
    lease = first.start()
    for step in range(1, steps + 1):
        first.step(1)
        if step % period == 0:
            first.report()
    if leaves:
        first.report()
        driver.send(b"first", wire.Release(task=lease.task, attempt=lease.attempt, reason="leaving"))
    else:
        driver.handle(SenderDown(b"first", "killed"))
        driver.advance(10.0)
    sampled = complete_by_another(driver, first)
    kept = sum(len(rollout.tokens) for rollout in driver.core.training.leases.complete[0].rollouts)
    return sum(sampled) - kept, sampled[0]


def test_a_killed_actor_loses_only_what_it_has_not_reported() -> None:
    for steps in (8, 11, 15):
        lost, before = tokens_lost(leaves=False, period=4, steps=steps)
        assert 0 <= lost <= 8 * (steps % 4)  # eight rollouts
        assert before > lost
        assert tokens_lost(leaves=True, period=4, steps=steps)[0] == 0


# ---- no length is favoured


def mean_length(*, rule: str, groups: int, seed: int, end: float = 0.1, size: int = 4) -> tuple[float, float]:
    """Mean length of rollouts of geometric length whose actors die at random times, and its standard error.

    `rule`, by which an actor reports what its rollouts have sampled, and delivers those that are finished:
        "together": both at fixed times only, which is what actors do whose engine would sample other tokens again
        "at once": finished ones are delivered when they are finished, with a report on the others
        "finished only": the same, but without reports: the others start again
        "whole groups": nothing is kept until the whole group is finished
    """
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    for _ in range(groups):
        finished: dict[int, int] = {}  # what the hub knows
        known = dict.fromkeys(range(size), 0)
        while len(finished) < size:
            now_finished, running = dict(finished), {slot: known[slot] for slot in range(size) if slot not in finished}
            for token in range(1, int(rng.geometric(0.15)) + 1):  # until the actor dies
                over = [slot for slot in running if rng.random() < end]
                running = {slot: length + 1 for slot, length in running.items()}
                now_finished |= {slot: running.pop(slot) for slot in over}
                delivers = {
                    "together": token % 4 == 0,
                    "at once": over or token % 4 == 0,
                    "finished only": over,
                    "whole groups": not running,
                }[rule]
                if delivers:
                    finished = dict(now_finished)
                    known |= running if rule in ("together", "at once") else {}
        lengths += finished.values()
    return float(np.mean(lengths)), float(np.std(lengths) / np.sqrt(len(lengths)))


def test_rollouts_that_are_delivered_and_reported_at_fixed_times_favour_no_length() -> None:
    mean, error = mean_length(rule="together", groups=20_000, seed=1)
    assert abs(mean - 10.0) < 4 * error, (mean, error)


@pytest.mark.parametrize("rule", ["at once", "finished only", "whole groups"])
def test_every_other_rule_favours_short_rollouts(rule: str) -> None:
    mean, error = mean_length(rule=rule, groups=2_000, seed=1)
    assert mean < 10.0 - 10 * error, (mean, error)


if __name__ == "__main__":
    period = 10
    for leaves in (False, True):
        found = [tokens_lost(leaves=leaves, period=period, steps=steps) for steps in range(11, 31)]
        after, before = (sum(column) / len(found) for column in zip(*found, strict=True))
        what = "SIGTERM" if leaves else "kill -9"
        print(
            f"{what}: {before:.0f} tokens lost when groups start again, {after:.0f} with reports every {period} tokens"
        )

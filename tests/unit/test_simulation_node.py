"""A simulated node: when its rollouts end, under which versions, and what becomes of revoked and long ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from sgpo_async.simulation import EngineRates, Lengths
from sgpo_async.simulation.node import Node
from sgpo_async.simulation.workload import Workload
from sgpo_async.wire import records as wire

STEP_S = 0.01


class Fixed(Workload):
    """Rollouts of these lengths, by task and slot."""

    def __init__(self, *tasks: tuple[int, ...]) -> None:
        super().__init__(Lengths(longest=1000, prompt=0, strategy=0), size=len(tasks[0]), seed=0)
        self.tasks = tasks

    def length(self, task: int, slot: int) -> int:
        return self.tasks[task][slot]

    def correct(self, task: int, slot: int, *, guided: bool) -> bool:
        return True


def lease(task: int, *, autonomous: int = 2, guided: int = 0, min_version: int = 0, attempt: int = 0) -> wire.Lease:
    return wire.Lease(
        task=task, attempt=attempt, purpose="train", problem="", answer="", verifier="exact", strategy="",
        autonomous=autonomous, guided=guided, min_version=min_version, seed=0, temperature=1.0, top_p=1.0,
        max_new_tokens=1000,
    )  # fmt: skip


class Played:
    """A node that has joined and has version 0, and what it has sent, with the times."""

    def __init__(self, *tasks: tuple[int, ...], updates: Any = "in-flight", **rates: Any) -> None:
        self.now = 0.0
        self.sent: list[tuple[float, wire.Message]] = []
        found = EngineRates(**{"slots": 4, "base_s": STEP_S, "context_s": 0.0} | rates)
        self.node = Node("node", found, Fixed(*tasks), size=len(tasks[0]), updates=updates)
        self.node.take(wire.Welcome(run_id=""), 0.0)
        self.node.offer(0, 0.0)
        self.until(rates.get("load_s", 0.0) + 1e-6)
        self.sent.clear()

    def take(self, message: wire.Message) -> None:
        self.node.take(message, self.now)
        self._collect()

    def offer(self, version: int) -> None:
        self.node.offer(version, self.now)
        self._collect()

    def until(self, time: float) -> None:
        """Let the time pass, from event to event."""
        while (due := min(self.node.due, time)) <= time and self.now < time:
            self.now = due
            self.node.advance(due)
            self._collect()

    def _collect(self) -> None:
        sent, self.node.outbox = self.node.outbox, []
        self.sent += [(self.now, message) for message in sent]

    def rollouts(self) -> dict[tuple[int, int], tuple[float, wire.Rollout]]:
        return {(m.task, m.slot): (time, m) for time, m in self.sent if isinstance(m, wire.Rollout)}


def test_rollouts_end_after_their_lengths_and_the_next_one_takes_the_slot() -> None:
    played = Played((100, 300), (200, 50), slots=3)
    begun = played.now
    for task in (0, 1):
        played.take(lease(task))
    played.until(100.0)
    ends = {key: time - begun for key, (time, _) in played.rollouts().items()}
    assert ends == pytest.approx({(0, 0): 1.0, (0, 1): 3.0, (1, 0): 2.0, (1, 1): 1.5})
    assert {key: len(rollout.tokens) for key, (_, rollout) in played.rollouts().items()} == {
        (0, 0): 100, (0, 1): 300, (1, 0): 200, (1, 1): 50,
    }  # fmt: skip


def test_the_more_tokens_the_sequences_hold_the_slower_they_are() -> None:
    played = Played((100, 100), context_s=1e-4)
    begun = played.now
    played.take(lease(0))
    played.until(100.0)
    expected = sum(STEP_S + 1e-4 * 2 * (step + 0.5) for step in range(100))
    assert [time - begun for time, _ in played.rollouts().values()] == pytest.approx([expected] * 2)


def test_running_rollouts_go_on_under_a_new_version_after_its_load() -> None:
    played = Played((100, 300), load_s=0.5)
    begun = played.now
    played.take(lease(0))
    played.until(begun + 0.4)
    played.offer(1)
    played.until(100.0)
    (first_end, first), (second_end, second) = played.rollouts().values()
    assert (first_end - begun, second_end - begun) == pytest.approx((1.5, 3.5))
    assert (first.versions.tolist(), first.ends.tolist()) == ([0, 1], [40, 100])
    assert (second.versions.tolist(), second.ends.tolist()) == ([0, 1], [40, 300])


def test_without_updates_in_flight_the_running_rollouts_end_first() -> None:
    played = Played((100, 300), (10, 10), updates="wait-for-batch")
    begun = played.now
    played.take(lease(0))
    played.until(begun + 0.4)
    played.offer(1)
    played.take(lease(1, min_version=0))
    played.until(100.0)
    found = played.rollouts()
    assert found[0, 1][1].versions.tolist() == [0]
    assert found[1, 0][1].versions.tolist() == [1]
    assert found[1, 0][0] - begun == pytest.approx(3.1, abs=1e-6)


def test_a_lease_waits_for_the_version_that_it_requires() -> None:
    played = Played((100, 100))
    played.take(lease(0, min_version=2))
    played.until(5.0)
    assert not played.rollouts()
    played.offer(2)
    played.until(10.0)
    assert [time for time, _ in played.rollouts().values()] == pytest.approx([6.0, 6.0], abs=1e-6)


def test_a_revoked_lease_is_given_up_and_another_one_requested() -> None:
    played = Played((100, 300))
    played.take(lease(0))
    played.until(0.5)
    played.sent.clear()
    played.take(wire.Revoked(task=0, attempt=0))
    played.until(100.0)
    assert not played.rollouts()
    assert [message.tasks for _, message in played.sent if isinstance(message, wire.Ready)] == [1]
    assert math.isinf(played.node.due)


def test_reports_hold_what_is_new_and_another_node_can_go_on() -> None:
    played = Played((100, 300))
    begun = played.now
    played.take(lease(0))
    played.until(begun + 0.405)
    played.node.report(played.now)
    played.until(begun + 0.805)
    played.node.report(played.now)
    played.until(begun + 0.81)
    first, second = (m for _, m in played.sent if isinstance(m, wire.Progress))
    assert [(part.slot, part.start, len(part.tokens)) for part in first.partial] == [(0, 0, 40), (1, 0, 40)]
    assert [(part.slot, part.start, len(part.tokens)) for part in second.partial] == [(0, 40, 40), (1, 40, 40)]
    other = Played((100, 300))
    begun = other.now
    whole = wire.PartialRollout(
        slot=1, start=0, tokens=np.zeros(80, np.int32), logprobs=np.zeros(80, np.float32),
        versions=np.array([0], np.int32), digests=np.zeros(1, np.int64), ends=np.array([80], np.int32),
    )  # fmt: skip
    from dataclasses import replace

    other.take(replace(lease(0, attempt=1), finished=np.array([0], np.int32), partial=(whole,)))
    other.until(100.0)
    ((end, rollout),) = other.rollouts().values()
    assert end - begun == pytest.approx(2.2) and len(rollout.tokens) == 300


def test_what_does_not_fit_into_memory_waits_and_loses_nothing() -> None:
    played = Played((300, 300), (300, 300), capacity=500.0)
    for task in (0, 1):
        played.take(lease(task))
    played.until(100.0)
    assert {key: len(rollout.tokens) for key, (_, rollout) in played.rollouts().items()} == {
        (task, slot): 300 for task in (0, 1) for slot in (0, 1)
    }
    assert max(time for time, _ in played.rollouts().values()) > 300 * STEP_S, "they could not all run at once"


def test_every_slot_second_is_busy_or_has_a_cause() -> None:
    played = Played((100, 300))
    played.node.advance(played.now)
    played.node.cut()
    begun = played.now
    played.take(lease(0))
    played.until(begun + 5.0)
    idle, busy, empty, tokens = played.node.cut()
    assert busy == pytest.approx(1.0 + 3.0) and tokens == pytest.approx(400)
    assert sum(idle.values()) + busy == pytest.approx(4 * 5.0)
    assert empty == pytest.approx(2.0)

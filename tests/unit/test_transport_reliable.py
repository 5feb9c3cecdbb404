"""ReliableSender over a link that loses, duplicates and reorders messages, with a receiver that drops duplicates."""

from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sgpo_async.transport import ReliableSender
from sgpo_async.wire.records import Ack, Rollout

WINDOW, RESEND = 3, 5.0
ROLLOUT = Rollout(
    task=0,
    attempt=0,
    slot=0,
    purpose="train",
    guided=False,
    prompt=np.array([1], np.int32),
    tokens=np.array([2], np.int32),
    logprobs=np.array([-1], np.float32),
    versions=np.array([0], np.int32),
    digests=np.zeros(1, np.int64),
    ends=np.array([1], np.int32),
    reward=0.0,
    finish="stop",
)


def rollout(number: int) -> Rollout:
    return replace(ROLLOUT, task=number // 4, attempt=0, slot=number % 4)


def ack(item: Rollout) -> Ack:
    return Ack(task=item.task, attempt=item.attempt, slot=item.slot)


def keys(items: list[Rollout]) -> list[tuple[int, int]]:
    return [(item.task, item.slot) for item in items]


class LossyLink(RuleBasedStateMachine):
    """Hypothesis chooses which messages are offered, sent, lost, duplicated and delayed, and how much time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.sender = ReliableSender(window=WINDOW, resend_after_s=RESEND)
        self.now = 0.0
        self.offered = 0
        self.to_hub: list[Rollout] = []  # in flight to the hub
        self.to_actor: list[Ack] = []  # in flight to the actor
        self.arrived: Counter[tuple[int, int]] = Counter()  # copies of each rollout that the hub has received
        self.trained: list[tuple[int, int]] = []  # rollouts that the hub keeps, without duplicates
        self.acknowledged: set[tuple[int, int]] = set()

    @rule()
    def offer(self) -> None:
        self.sender.offer(rollout(self.offered))
        self.offered += 1

    @rule(seconds=st.floats(0, 2 * RESEND))
    def send(self, seconds: float) -> None:
        self.now += seconds
        due = self.sender.due(self.now)
        assert len(due) <= WINDOW
        assert not self.acknowledged & set(keys(due)), "sent again after it was acknowledged"
        self.to_hub += due

    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        if self.to_hub:
            self.receive(self.to_hub.pop(data.draw(st.integers(0, len(self.to_hub) - 1))))

    @rule(data=st.data(), copy=st.booleans())
    def lose_or_duplicate(self, data: st.DataObject, copy: bool) -> None:
        if self.to_hub:
            at = data.draw(st.integers(0, len(self.to_hub) - 1))
            self.to_hub[at : at + 1] = [self.to_hub[at]] * (2 if copy else 0)

    @rule(data=st.data())
    def deliver_ack(self, data: st.DataObject) -> None:
        if self.to_actor:
            self.take_ack(self.to_actor.pop(data.draw(st.integers(0, len(self.to_actor) - 1))))

    @rule(data=st.data(), copy=st.booleans())
    def lose_or_duplicate_ack(self, data: st.DataObject, copy: bool) -> None:
        if self.to_actor:
            at = data.draw(st.integers(0, len(self.to_actor) - 1))
            self.to_actor[at : at + 1] = [self.to_actor[at]] * (2 if copy else 0)

    @rule()
    def reconnect(self) -> None:
        self.to_hub.clear()
        self.to_actor.clear()

    def receive(self, item: Rollout) -> None:
        key = (item.task, item.slot)
        self.arrived[key] += 1
        if self.arrived[key] == 1:
            self.trained.append(key)
        self.to_actor.append(ack(item))

    def take_ack(self, item: Ack) -> None:
        key = (item.task, item.slot)
        assert self.sender.acknowledge(item) == (key not in self.acknowledged)
        self.acknowledged.add(key)

    @invariant()
    def no_rollout_is_lost(self) -> None:
        assert len(self.sender) == self.offered - len(self.acknowledged)
        assert self.acknowledged <= set(self.trained)

    def teardown(self) -> None:
        """When the link works again, all rollouts arrive within a bounded number of exchanges."""
        for _ in range(self.offered + 1):
            self.now += RESEND
            self.to_hub += self.sender.due(self.now)
            while self.to_hub:
                self.receive(self.to_hub.pop(0))
            while self.to_actor:
                self.take_ack(self.to_actor.pop(0))
        assert len(self.sender) == 0
        assert sorted(self.trained) == sorted(keys([rollout(n) for n in range(self.offered)]))


LossyLink.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestLossyLink = LossyLink.TestCase


def sender_of(count: int) -> ReliableSender:
    sender = ReliableSender(window=WINDOW, resend_after_s=RESEND)
    for number in range(count):
        sender.offer(rollout(number))
    return sender


def test_due_returns_the_oldest_first_and_at_most_the_window() -> None:
    sender = sender_of(5)
    assert keys(sender.due(0.0)) == [(0, 0), (0, 1), (0, 2)]
    assert sender.due(0.0) == []
    sender.acknowledge(ack(rollout(1)))
    assert keys(sender.due(1.0)) == [(0, 3)]


def test_a_rollout_is_due_again_after_resend_after_s_and_not_before() -> None:
    sender = sender_of(1)
    sender.due(0.0)
    assert sender.due(RESEND - 0.1) == []
    assert keys(sender.due(RESEND)) == [(0, 0)]

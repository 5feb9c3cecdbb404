"""ReliableSender over a link that loses, doubles and reorders, against a receiver that deduplicates."""

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
    """Hypothesis chooses what is offered, sent, lost, doubled and delayed, and how time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.sender = ReliableSender(window=WINDOW, resend_after_s=RESEND)
        self.now = 0.0
        self.offered = 0
        self.there: list[Rollout] = []  # on their way to the hub
        self.back: list[Ack] = []  # on their way to the actor
        self.arrived: Counter[tuple[int, int]] = Counter()  # at the hub, copies counted
        self.trained: list[tuple[int, int]] = []  # at the hub, after deduplication
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
        self.there += due

    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        if self.there:
            self.receive(self.there.pop(data.draw(st.integers(0, len(self.there) - 1))))

    @rule(data=st.data(), copy=st.booleans())
    def lose_or_double(self, data: st.DataObject, copy: bool) -> None:
        if self.there:
            at = data.draw(st.integers(0, len(self.there) - 1))
            self.there[at : at + 1] = [self.there[at]] * (2 if copy else 0)

    @rule(data=st.data())
    def deliver_ack(self, data: st.DataObject) -> None:
        if self.back:
            self.take_ack(self.back.pop(data.draw(st.integers(0, len(self.back) - 1))))

    @rule(data=st.data(), copy=st.booleans())
    def lose_or_double_ack(self, data: st.DataObject, copy: bool) -> None:
        if self.back:
            at = data.draw(st.integers(0, len(self.back) - 1))
            self.back[at : at + 1] = [self.back[at]] * (2 if copy else 0)

    @rule()
    def reconnect(self) -> None:
        self.there.clear()
        self.back.clear()

    def receive(self, item: Rollout) -> None:
        key = (item.task, item.slot)
        self.arrived[key] += 1
        if self.arrived[key] == 1:
            self.trained.append(key)
        self.back.append(ack(item))

    def take_ack(self, item: Ack) -> None:
        key = (item.task, item.slot)
        assert self.sender.acknowledge(item) == (key not in self.acknowledged)
        self.acknowledged.add(key)

    @invariant()
    def nothing_is_forgotten(self) -> None:
        assert len(self.sender) == self.offered - len(self.acknowledged)
        assert self.acknowledged <= set(self.trained)

    def teardown(self) -> None:
        """On a link that has become good, everything arrives in a bounded number of exchanges."""
        for _ in range(self.offered + 1):
            self.now += RESEND
            self.there += self.sender.due(self.now)
            while self.there:
                self.receive(self.there.pop(0))
            while self.back:
                self.take_ack(self.back.pop(0))
        assert len(self.sender) == 0
        assert sorted(self.trained) == sorted(keys([rollout(n) for n in range(self.offered)]))


LossyLink.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestLossyLink = LossyLink.TestCase


def sender_of(count: int) -> ReliableSender:
    sender = ReliableSender(window=WINDOW, resend_after_s=RESEND)
    for number in range(count):
        sender.offer(rollout(number))
    return sender


def test_oldest_first_and_no_more_than_the_window() -> None:
    sender = sender_of(5)
    assert keys(sender.due(0.0)) == [(0, 0), (0, 1), (0, 2)]
    assert sender.due(0.0) == []
    sender.acknowledge(ack(rollout(1)))
    assert keys(sender.due(1.0)) == [(0, 3)]


def test_sent_again_when_time_is_up_and_not_before() -> None:
    sender = sender_of(1)
    sender.due(0.0)
    assert sender.due(RESEND - 0.1) == []
    assert keys(sender.due(RESEND)) == [(0, 0)]

"""The faults of a run are a function of the seed; what a fault does to messages is one of the fault."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

from sgpo_async.chaos.attack import LEARNED, table
from sgpo_async.chaos.proxy import WITHIN_S, MessageFaults, RoutedMessage
from sgpo_async.chaos.schedule import KINDS, LAST_STEPS, Fault, schedule

COMMITTED = Path(__file__).resolve().parents[2] / "docs/results/chaos"


def messages(*numbers: int) -> list[RoutedMessage]:
    return [(b"a", [b"head %d" % number, b"body"]) for number in numbers]


def fault(action: str, **changes) -> Fault:
    (one,) = schedule(seed=0, faults=1, steps=10)
    return replace(one, action=action, seconds=2.0, messages=2, **changes)


def faults_of(action: str) -> MessageFaults:
    found = MessageFaults()
    found.begin(fault(action), now=0.0)
    return found


def test_the_schedule_is_a_function_of_the_seed() -> None:
    one, again, other = (schedule(seed=seed, faults=200, steps=120) for seed in (3, 3, 4))
    assert one == again != other
    assert [fault.step for fault in one] == sorted(fault.step for fault in one)
    assert {fault.step for fault in one} <= set(range(1, 120 - LAST_STEPS + 1))


def test_every_kind_occurs_equally_often() -> None:
    counts = Counter((fault.action, fault.target) for fault in schedule(seed=1, faults=200, steps=120))
    assert counts.keys() == set(KINDS)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_duplicated_message_comes_twice() -> None:
    assert faults_of("duplicate").let_through(messages(1, 2, 3), 0.0) == messages(1, 1, 2, 2, 3)


def test_a_reordered_message_comes_after_the_next_ones_or_at_the_end_of_the_fault() -> None:
    overtaken = faults_of("reorder")
    assert overtaken.let_through(messages(1, 2, 3, 4), 0.0) == messages(3, 1, 2, 4)
    late = faults_of("reorder")
    assert late.let_through(messages(1), 0.0) == []
    assert late.let_through([], 2.0) == messages(1)


def test_delayed_messages_come_in_their_order() -> None:
    slow = faults_of("delay")
    assert slow.let_through(messages(1, 2), 0.0) == slow.let_through(messages(3), 1.9) == []
    assert slow.let_through(messages(4), 2.0) == messages(1, 2, 3, 4)


def test_a_truncated_message_lacks_its_end_and_a_corrupted_one_differs_in_one_byte() -> None:
    (member, frames), second, third = faults_of("truncate").let_through(messages(1, 2, 3), 0.0)
    assert (member, frames) == (b"a", [b"head 1"]) and second[1] == [b"head 2"] and [third] == messages(3)
    (_, changed), *_ = faults_of("corrupt").let_through(messages(1), 0.0)
    before = b"".join(messages(1)[0][1])
    assert sum(a != b for a, b in zip(b"".join(changed), before, strict=True)) == 1
    assert list(map(len, changed)) == [6, 4]


def test_after_its_time_a_fault_hits_nothing() -> None:
    assert faults_of("truncate").let_through(messages(1), WITHIN_S) == messages(1)


def test_the_table_has_a_row_for_each_kind_and_says_what_is_wrong() -> None:
    plain = {"missed": False, "messages": None}
    faults = [{"kind": "kill hub", "recovered_s": seconds, **plain} for seconds in (1.0, 3.0, 8.0)]
    faults.append({"kind": "corrupt actor", "recovered_s": 0.5, "missed": False, "messages": 4})
    report = {
        "seed": 7, "steps": 20, "wall_s": 99.4, "faults": faults, "starts": {"hub": 4}, "audit": {"events": 9},
        "violations": ["event 3: lost"], "pass_auto_last": 0.95,
    }  # fmt: skip
    text = table(report, bar=0.9)
    assert "seed 7: 4 faults in 20 steps, 99 s" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["kill", "hub", "3", "3.0", "8.0"] in rows and ["corrupt", "actor", "1", "4", "0.5", "0.5"] in rows
    assert "VIOLATION: event 3: lost" in text
    assert "ledger and journal disagree; pass rate 95.0%, bar 90%" in text


def test_the_committed_table_is_that_of_the_committed_report() -> None:
    report = json.loads((COMMITTED / "chaos.json").read_text())
    assert (COMMITTED / "chaos.txt").read_text() == table(report, bar=LEARNED)

"""`sgpo-async chaos` in two minutes: a dozen faults, and an audit that finds nothing; and the relay by itself."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgpack
import psutil
import pytest
from run_support import PATIENCE_S, real_run, until

from sgpo_async.chaos import proxy
from sgpo_async.chaos.attack import audited
from sgpo_async.chaos.processes import FullDisk
from sgpo_async.chaos.proxy import Relay
from sgpo_async.chaos.run import SlowDisk, end_over
from sgpo_async.chaos.schedule import Fault
from sgpo_async.config import load
from sgpo_async.errors import HubError, RunFailed, WireError
from sgpo_async.metrics import read_metrics, read_summary
from sgpo_async.transport import Dealer, Mailbox, Router, RouterMailbox
from sgpo_async.wire.records import Ack, Ready

pytestmark = [pytest.mark.process, pytest.mark.timeout(1200)]
STEPS, FAULTS = 20, 12
SMALL = (f"steps={STEPS}", "learner.problems_per_step=4", "local.ranks=1", "tasks.held_out=8", "evaluation.every=100")


def test_a_run_under_faults_reaches_its_end_and_its_ledgers_agree(tmp_path: Path) -> None:
    to = tmp_path / "chaos"
    with real_run(tmp_path / "other") as run:
        options = ["--seed", "5", "--faults", str(FAULTS), "--bar", "0", "--to", str(to)]
        command = ["-m", "sgpo_async.cli", "chaos", "builtin:demo", *SMALL, *options]
        chaos = run.start("chaos", *command)
        assert chaos.wait(900) == 0, chaos.output[-5000:]
        until(lambda: not run.processes(), "the end of all processes")
    report = json.loads((to / "chaos.json").read_text())
    assert len(report["faults"]) == FAULTS and report["violations"] == []
    happened = [one for one in report["faults"] if not one["missed"]]
    assert len(happened) >= FAULTS // 2, "a run may be too fast for the last ones"
    assert all(one["recovered_s"] is not None for one in happened)
    assert report["audit"]["commits"] >= STEPS
    assert "ledger and journal agree, event by event" in chaos.output
    assert (to / "chaos.txt").read_text() in chaos.output
    assert_a_doctored_journal_is_found(to)


def assert_a_doctored_journal_is_found(to: Path) -> None:
    """Without some of the rollouts, or with another ledger in the metrics, the audit has something to say."""
    settings = load(str(to / "chaos.yaml"), [])
    lines, summary = read_metrics(settings.folder), read_summary(settings.folder)
    assert audited(settings, lines, summary).violations == []
    lines[-1]["ledger"]["trained"] -= 1
    assert "has a ledger that the journal does not have" in audited(settings, lines, summary).violations[0]
    lines[-1]["ledger"]["trained"] += 1
    with sqlite3.connect(Path(settings.folder, "history", "hub.journal")) as database:
        for table in ("history", "entries"):  # before and after the hub's last save
            entries = database.execute(f"SELECT number, event FROM {table} ORDER BY number").fetchall()
            rollouts = [(number,) for number, event in entries if msgpack.unpackb(event)[0] == "Rollout"]
            # Several, because the hub may have refused a single one: it was sent twice, or too late.
            database.executemany(f"DELETE FROM {table} WHERE number = ?", rollouts[::5])
    database.close()
    assert audited(settings, lines, summary).violations


def test_of_two_overlapping_faults_of_one_process_the_later_end_counts(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as started:
        process = psutil.Process(started.pid)
        before = process.rlimit(psutil.RLIMIT_FSIZE)
        lasting = [(4.0, FullDisk.begin(process)), (5.0, SlowDisk.begin(tmp_path, 0.1))]
        lasting += [(2.0, FullDisk.begin(process)), (6.0, SlowDisk.begin(tmp_path, 0.2))]
        lasting = end_over(lasting, 3.0)
        assert process.rlimit(psutil.RLIMIT_FSIZE)[0] == 0
        lasting = end_over(lasting, 5.0)
        assert process.rlimit(psutil.RLIMIT_FSIZE) == (before[1], before[1])
        assert len(lasting) == 1 and lasting[0][1].file.exists()
        assert end_over(lasting, 6.0) == [] and not list(tmp_path.iterdir())
        started.kill()


def fault(action: str, number: int = 0) -> Fault:
    return Fault(
        number=number, step=1, after_s=0, action=action, target="actor", pick=0, seconds=1.0, messages=1,
        to_hub=True, seed=1,
    )  # fmt: skip


@contextmanager
def relayed() -> Iterator[tuple[RouterMailbox, Relay, Mailbox]]:
    hub = RouterMailbox(Router("tcp://127.0.0.1:0", max_bytes=2**20))
    relay = Relay(hub.router.address)
    member = Mailbox(Dealer(relay.address("a"), identity=b"member", max_bytes=2**20))
    member.dealer.wait_connected(PATIENCE_S)
    yield hub, relay, member
    member.close()
    relay.close()
    hub.close()


def received(hub: RouterMailbox, count: int) -> list:
    found: list = []
    deadline = time.monotonic() + PATIENCE_S
    while len(found) < count and time.monotonic() < deadline:
        found += hub.receive(0.1)
    return found


def test_the_relay_carries_messages_both_ways_under_the_identity_of_the_member() -> None:
    with relayed() as (hub, _, member):
        for number in range(50):
            member.send(Ready(tasks=number, version=0))
        assert received(hub, 50) == [(b"member", Ready(tasks=number, version=0)) for number in range(50)]
        hub.send(b"member", Ack(task=1, attempt=2, slot=3))
        assert member.receive(PATIENCE_S) == [Ack(task=1, attempt=2, slot=3)]


def test_the_relay_does_to_messages_what_the_fault_says() -> None:
    with relayed() as (hub, relay, member):
        relay.inject(fault("duplicate"), "a")
        member.send(Ready(tasks=1, version=0))
        assert received(hub, 2) == [(b"member", Ready(tasks=1, version=0))] * 2
        relay.inject(fault("truncate", 1), "a")
        member.send(Ready(tasks=2, version=0))
        member.send(Ready(tasks=3, version=0))
        broken, whole = received(hub, 2)
        assert isinstance(broken[1], WireError) and broken[0] == b"member"
        assert whole == (b"member", Ready(tasks=3, version=0))


def test_a_relay_waits_for_an_address_that_another_process_has_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(address: str, *, max_bytes: int) -> Router:
        raise HubError(f"hub.address: {address} is in use")

    with relayed() as (hub, relay, member):
        with monkeypatch.context() as patch:
            patch.setattr(proxy, "Router", taken)
            relay.inject(fault("reset"), "a")
            relay.inject(fault("duplicate", 1), "a")  # begins a turn of the thread later, which has met the error
        until(lambda: member.receive(0.05) or member.connections == 2, "the second connection")
        member.send(Ready(tasks=1, version=0))
        assert received(hub, 2) == [(b"member", Ready(tasks=1, version=0))] * 2
        with monkeypatch.context() as patch:
            patch.setattr(proxy, "Router", taken)
            patch.setattr(proxy, "REOPEN_S", 0.0)
            relay.inject(fault("reset", 2), "a")
            until(lambda: relay.failure, "the failure of the relay")
        with pytest.raises(RunFailed, match="chaos: the relay has failed: hub.address: .* is in use"):
            relay.inject(fault("reset", 3), "a")


def test_a_reset_ends_both_sides_and_the_member_connects_again() -> None:
    with relayed() as (hub, relay, member):
        member.send(Ready(tasks=1, version=0))
        assert len(received(hub, 1)) == 1
        relay.inject(fault("reset"), "a")
        until(lambda: member.receive(0.05) or member.connections == 2, "the second connection")
        until(lambda: hub.receive(0.05) or hub.router.gone() == [b"member"], "the end of the first at the hub")
        member.send(Ready(tasks=2, version=0))
        assert received(hub, 1) == [(b"member", Ready(tasks=2, version=0))]


def test_a_hub_that_starts_again_is_noticed_by_the_member() -> None:
    with relayed() as (hub, _, member):
        member.send(Ready(tasks=1, version=0))
        assert len(received(hub, 1)) == 1
        address = hub.router.address
        hub.close()
        again = RouterMailbox(Router(address, max_bytes=2**20))
        until(lambda: member.receive(0.05) or member.connections == 2, "the second connection")
        until(lambda: member.send(Ready(tasks=2, version=0)) and again.receive(0.2), "a message to the second hub")
        again.close()

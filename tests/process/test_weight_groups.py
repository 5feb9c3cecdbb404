"""Weight-update groups with real processes: every bit arrives, and the session names and survives every failure.

The timeout of a phase is SHORT_S in a test that expects the timeout. Otherwise it is LONG_S, longer than any test
waits: a phase that ends earlier has ended without its timeout.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch

from sgpo_async.errors import SessionError, Superseded, WeightsError
from sgpo_async.session import (
    Deadlines,
    ReceiverDown,
    SenderDown,
    SenderUp,
    VersionAnnounced,
    WeightReceiver,
    WeightSender,
)
from sgpo_async.weights import BroadcastPlan, StoreFile, StoreReader, StoreWriter, digest

pytestmark = pytest.mark.process

PATIENCE_S = 120.0
SHORT_S = 5.0
LONG_S = 2 * PATIENCE_S
HERE = Path(__file__).parent


def model(version: int) -> list[tuple[str, torch.Tensor]]:
    """Return tensors that take several broadcasts: a float32 after an odd number of bfloat16 begins a new one."""
    return [
        ("embed", torch.full((300, 70), float(version))),
        ("norm", torch.arange(701).bfloat16() + version),
        ("head", torch.full((70, 300), float(version)).t()),
        ("bias", torch.arange(3).bfloat16() * version),
        ("step", torch.tensor(version)),
    ]


def large(version: int) -> list[tuple[str, torch.Tensor]]:
    """Return five broadcasts of 24 MB: far more than a socket buffers for a member that does not read."""
    parts = []
    for n in range(5):
        parts += [(f"part{n}", torch.full((6 * 10**6,), float(version + n))), (f"odd{n}", torch.ones(1).bfloat16())]
    return parts


def total(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, *, note: str = "") -> dict[str, Any]:
    """Sum each tensor; a function for `compute`."""
    if note == "refuse":
        raise WeightsError("refused")
    return {"note": note, **{name: float(t.to(dtype).sum()) for name, t in tensors.items()}}


JOBS = [f"{total.__module__}:total"]


class Member:
    """A process that is one rank of a group; it joins after the first line that it gets."""

    def __init__(self, rank: int, address: tuple[str, int], world_size: int, group: str) -> None:
        host, port = address
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "group_member.py"), str(rank), host, str(port), str(world_size), group],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path.cwd()), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            text=True,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        assert self.line() == "started"

    def send(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def line(self) -> str:
        return self._lines.get(timeout=PATIENCE_S)

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._lines.put(line.strip())

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Session:
    """A store with a writer, a weight sender, a weight receiver that pulls only on request, and members."""

    def __init__(self, tensors: list[tuple[str, torch.Tensor]], phase_s: float) -> None:
        deadlines = Deadlines(group_s=phase_s)
        self.file = StoreFile("/nowhere")
        self.writer = StoreWriter(self.file.path)
        self.manifest = self.writer.publish(0, tensors)
        self.local = StoreFile("/nowhere")
        self.receiver = WeightReceiver("a-1", store=self.local.path, pulls=False, deadlines=deadlines)
        self.sender = WeightSender(self.file.path, "a-1", "127.0.0.1", jobs=JOBS)
        self.members: list[Member] = []
        self.events: list[Any] = []
        self.groups = self.receiver.groups

    def connect(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            connection.wait([self.sender], PATIENCE_S)
            for event in self.sender.poll():
                assert isinstance(event, SenderUp), event
                self.receiver.connect("127.0.0.1", event.port, event.secret)
                return

    def poll(self, seconds: float = 0.02) -> None:
        connection.wait([self.receiver], seconds)
        self.events += self.receiver.poll()
        assert not [e for e in self.sender.poll() if isinstance(e, SenderDown)]

    def until(self, done: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, f"not within {seconds} s; {self.events}"
            self.poll()

    def result(self, future: Future[Any], seconds: float = PATIENCE_S) -> Any:
        self.until(future.done, seconds)
        return future.result()

    def announced(self, version: int) -> VersionAnnounced:
        found = []

        def was_announced() -> bool:
            found[:] = [e for e in self.events if isinstance(e, VersionAnnounced) and e.version == version]
            return bool(found)

        self.until(was_announced)
        return found[0]

    def opened(self, group: str, ranks: int = 1) -> list[Member]:
        """Open a group and return its members, which have not joined yet."""
        address = self.result(self.groups.open(group, backend="gloo", world_size=1 + ranks))
        members = [Member(rank, address, 1 + ranks, group) for rank in range(1, 1 + ranks)]
        self.members += members
        return members

    def joined(self, group: str, ranks: int = 1) -> list[Member]:
        """Return the members of a new group that has been joined by all ranks."""
        members = self.opened(group, ranks)
        for member in members:
            member.send("join")
        self.result(self.groups.join(group))
        assert [m.line() for m in members] == ["joined"] * ranks
        return members

    def assert_works(self, group: str) -> None:
        """Assert that a new group receives the newest version."""
        (member,) = self.joined(group)
        plan = self.result(self.groups.plan(self.writer.version or 0))
        member.send(json.dumps(plan.to_plain()))
        self.result(self.groups.broadcast(group, plan))
        assert received(member, plan) == plan.digest

    def close(self) -> None:
        for member in self.members:
            member.close()
        self.sender.stop()
        self.receiver.stop()
        self.file.close()
        self.local.close()


def received(member: Member, plan: BroadcastPlan) -> str:
    for broadcast in plan.broadcasts:
        assert member.line() == " ".join(("received", *broadcast.names))
    label, value = member.line().split()
    assert label == "holds"
    return value


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Session]]:
    """Return a function that starts a connected session whose store holds the given tensors as version 0."""
    sessions = []
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{Path.cwd()}")  # `compute` imports a function of this file

    def start(tensors: list[tuple[str, torch.Tensor]], phase_s: float = LONG_S) -> Session:
        sessions.append(Session(tensors, phase_s))
        sessions[-1].connect()
        return sessions[-1]

    yield start
    for session in sessions:
        session.close()


def test_every_version_arrives_bit_for_bit_in_every_group(start: Callable[..., Session]) -> None:
    session = start(model(0))
    event = session.announced(0)
    assert (event.digest, event.nbytes) == (session.manifest.digest, session.manifest.nbytes)
    groups = {"one": session.joined("one"), "two": session.joined("two", ranks=2)}
    for version in (0, 1, 2):
        if version:
            session.writer.publish(version, model(version))
        plan = session.result(session.groups.plan(session.announced(version).version))
        assert plan.digest == digest(model(version))
        assert len(plan.broadcasts) == 3
        for members in groups.values():
            for member in members:
                member.send(json.dumps(plan.to_plain()))
        for future in [session.groups.broadcast(name, plan) for name in groups]:
            session.result(future)
        assert {received(m, plan) for members in groups.values() for m in members} == {plan.digest}
    session.groups.close("one")
    with pytest.raises(SessionError, match="group one: is not open, or was closed after a failure; open it again"):
        session.result(session.groups.join("one"))
    session.assert_works("three")


def test_a_join_fails_when_the_member_is_dead(start: Callable[..., Session]) -> None:
    session = start(model(0), SHORT_S)
    (member,) = session.opened("g")
    member.signal(signal.SIGKILL)
    with pytest.raises(SessionError, match="group g: join: "):
        session.result(session.groups.join("g"))
    session.assert_works("h")


@pytest.mark.slow
def test_a_rank_that_joins_stops_waiting_when_the_join_fails(start: Callable[..., Session]) -> None:
    session = start(model(0), SHORT_S)
    first, second = session.opened("g", ranks=2)
    second.signal(signal.SIGSTOP)
    first.send("join")
    with pytest.raises(SessionError, match="group g: join: "):
        session.result(session.groups.join("g"))
    assert first.line().startswith("failed ")
    session.assert_works("h")


@pytest.mark.slow
def test_closing_ends_a_join_at_both_ends(start: Callable[..., Session]) -> None:
    session = start(model(0))
    first, _ = session.opened("g", ranks=2)
    future = session.groups.join("g")
    first.send("join")
    session.poll(1.0)
    session.groups.close("g")
    with pytest.raises(SessionError, match="group g: join: "):
        session.result(future)
    assert first.line().startswith("failed ")


@pytest.mark.slow
def test_a_rank_stops_waiting_when_another_rank_stops_during_the_broadcast(start: Callable[..., Session]) -> None:
    session = start(large(0), SHORT_S)
    first, second = session.joined("g", ranks=2)
    plan = session.result(session.groups.plan(0))
    first.send(json.dumps(plan.to_plain()))
    second.send(json.dumps(BroadcastPlan(plan.version, plan.digest, plan.broadcasts[:1]).to_plain()))
    future = session.groups.broadcast("g", plan)
    assert second.line() == "received part0 odd0"
    second.signal(signal.SIGSTOP)
    with pytest.raises(SessionError, match="group g: broadcast: "):
        session.result(future)
    while (line := first.line()).startswith("received"):
        pass
    assert line.startswith("failed ")


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_broadcast_fails_when_a_member_is_lost(start: Callable[..., Session], number: signal.Signals) -> None:
    """A broken connection fails the broadcast at once, a stopped member at the deadline."""
    session = start(large(0), LONG_S if number == signal.SIGKILL else SHORT_S)
    (member,) = session.joined("g")
    (other,) = session.joined("other")
    plan = session.result(session.groups.plan(0))
    assert len(plan.broadcasts) > 2
    some = BroadcastPlan(plan.version, plan.digest, plan.broadcasts[:1])  # it reads the first broadcast and no more
    member.send(json.dumps(some.to_plain()))
    future = session.groups.broadcast("g", plan)
    assert member.line() == "received part0 odd0"
    session.poll(0.5)
    assert not future.done()
    member.signal(number)
    with pytest.raises(SessionError, match="group g: broadcast: "):
        session.result(future)
    other.send(json.dumps(plan.to_plain()))
    session.result(session.groups.broadcast("other", plan))
    assert received(other, plan) == plan.digest
    session.assert_works("h")


def test_a_member_stops_waiting_when_rank_0_refuses_the_plan(start: Callable[..., Session]) -> None:
    session = start(model(0))
    (member,) = session.joined("g")
    plan = session.result(session.groups.plan(0))
    member.send(json.dumps(plan.to_plain()))
    other = BroadcastPlan(0, "0" * 32, plan.broadcasts)
    reason = "the tensors of weights version 0 differ from the requested plan; request the plan again"
    with pytest.raises(WeightsError, match=f"group g: broadcast: {reason}"):
        session.result(session.groups.broadcast("g", other))
    assert member.line().startswith("failed ")  # it has received nothing


def test_an_overwritten_version_is_not_sent(start: Callable[..., Session]) -> None:
    session = start(model(0))
    plan = session.result(session.groups.plan(0))
    session.joined("g")
    for version in (1, 2):
        session.writer.publish(version, model(version))
    with pytest.raises(Superseded, match="weights version 0"):
        session.result(session.groups.broadcast("g", plan))
    with pytest.raises(Superseded, match="weights version 0"):
        session.result(session.groups.plan(0))
    session.assert_works("h")


@pytest.mark.slow
def test_closing_ends_a_broadcast(start: Callable[..., Session]) -> None:
    session = start(large(0))
    session.joined("g")  # a member that reads nothing
    future = session.groups.broadcast("g", session.result(session.groups.plan(0)))
    session.poll(1.0)
    assert not future.done()
    session.groups.close("g")
    with pytest.raises(SessionError, match="group g: broadcast: the group was closed meanwhile"):
        session.result(future)
    session.assert_works("h")


def test_a_broadcast_fails_when_its_version_is_overwritten(start: Callable[..., Session]) -> None:
    session = start(large(0))
    (member,) = session.joined("g")
    plan = session.result(session.groups.plan(0))
    member.send(json.dumps(BroadcastPlan(plan.version, plan.digest, plan.broadcasts[:1]).to_plain()))
    future = session.groups.broadcast("g", plan)
    assert member.line() == "received part0 odd0"
    for version in (1, 2):  # rank 0 has read one broadcast ahead, and waits for the member
        session.writer.publish(version, large(version))
    member.send(json.dumps(BroadcastPlan(plan.version, plan.digest, plan.broadcasts[1:]).to_plain()))
    with pytest.raises(Superseded, match="group g: broadcast: weights version 0"):
        session.result(future)
    while not (line := member.line()).startswith("failed "):
        assert line.startswith(("holds", "received part1", "received part2"))
    session.assert_works("h")


def test_the_weight_sender_computes_and_the_weight_receiver_pulls_on_request(start: Callable[..., Session]) -> None:
    session = start(model(0))
    session.writer.publish(1, model(1))
    session.announced(1)
    note = "x" * 200_000  # more than a pipe takes at once
    expected = {"note": note, **{name: float(t.double().sum()) for name, t in model(1)}}
    for _ in range(2):
        assert session.result(session.groups.compute(1, total, torch.float64, note=note)) == expected
    with pytest.raises(WeightsError, match="^refused$"):
        session.result(session.groups.compute(1, total, torch.float64, note="refuse"))
    with pytest.raises(SessionError, match="weights version 1: compute: internal error: TypeError"):
        session.result(session.groups.compute(1, total))
    for _ in range(2):  # the second time the store already holds it
        path = session.result(session.receiver.pull(1))
        assert digest(StoreReader(path).tensors(1).items()) == digest(model(1))
    with pytest.raises(Superseded, match="the newest is 1"):
        session.result(session.receiver.pull(0))
    assert [type(e) for e in session.events] == [VersionAnnounced] * len(session.events)


def test_futures_fail_when_the_session_ends(start: Callable[..., Session]) -> None:
    session = start(model(0))
    session.opened("g")
    waiting = session.groups.join("g")
    session.poll(0.5)
    os.kill(session.sender.pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while not waiting.done() and time.monotonic() < deadline:
        session.events += session.receiver.poll()
        time.sleep(0.02)
    with pytest.raises(SessionError, match="g: join: weight receiver of a-1"):
        waiting.result(0)
    assert isinstance(session.events[-1], ReceiverDown)
    with pytest.raises(SessionError, match="the weight sender is gone"):
        session.groups.plan(0).result(0)
    assert wait([session.groups.join("g")], PATIENCE_S).not_done == set()


def test_nccl_without_a_gpu_raises_a_session_error(start: Callable[..., Session]) -> None:
    session = start(model(0))
    reason = "backend nccl needs a GPU on the hub's machine that the weight sender may use; use gloo"
    with pytest.raises(SessionError, match=f"group g: listen: {reason}"):
        session.result(session.groups.open("g", backend="nccl", world_size=2))

"""Weight-update groups over real links, nodes and members: bits arrive, and every loss is noticed, named and survived.

A phase that must end by its deadline has SHORT_S. Every other one has LONG_S, more than a test waits for anything: what
ends before is noticed by itself.
"""

import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
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
    """Of several broadcasts: after an odd number of bfloat16, a float32 begins a new one."""
    return [
        ("embed", torch.full((300, 70), float(version))),
        ("norm", torch.arange(701).bfloat16() + version),
        ("head", torch.full((70, 300), float(version)).t()),
        ("bias", torch.arange(3).bfloat16() * version),
        ("step", torch.tensor(version)),
    ]


def large(version: int) -> list[tuple[str, torch.Tensor]]:
    """Of five broadcasts of 24 MB: far more than a socket keeps for a member that does not read."""
    parts = []
    for n in range(5):
        parts += [(f"part{n}", torch.full((6 * 10**6,), float(version + n))), (f"odd{n}", torch.ones(1).bfloat16())]
    return parts


def total(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, *, note: str = "") -> dict[str, Any]:
    """A function of the tensors, for `compute`."""
    if note == "refuse":
        raise WeightsError("refused")
    return {"note": note, **{name: float(t.to(dtype).sum()) for name, t in tensors.items()}}


class Member:
    """A member process, started but not yet joining."""

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

    def say(self, line: str) -> None:
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
    """A store with a writer, a link, a node that does not pull by itself, and members."""

    def __init__(self, tensors: list[tuple[str, torch.Tensor]], phase_s: float) -> None:
        deadlines = Deadlines(group_s=phase_s)
        self.file = StoreFile("/nowhere")
        self.writer = StoreWriter(self.file.path)
        self.manifest = self.writer.publish(0, tensors)
        self.node = WeightReceiver("a-1", pulls=False, deadlines=deadlines)
        self.link = WeightSender(self.file.path, "a-1", "127.0.0.1")
        self.members: list[Member] = []
        self.events: list[Any] = []
        self.groups = self.node.groups

    def connect(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            select.select([self.link], [], [], PATIENCE_S)
            for event in self.link.poll():
                assert isinstance(event, SenderUp), event
                self.node.connect("127.0.0.1", event.port)
                return

    def poll(self, seconds: float = 0.02) -> None:
        select.select([self.node], [], [], seconds)
        self.events += self.node.poll()
        assert not [e for e in self.link.poll() if isinstance(e, SenderDown)]

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

        def there() -> bool:
            found[:] = [e for e in self.events if isinstance(e, VersionAnnounced) and e.version == version]
            return bool(found)

        self.until(there)
        return found[0]

    def opened(self, group: str, ranks: int = 1) -> list[Member]:
        """Members that are ready to join."""
        address = self.result(self.groups.open(group, backend="gloo", world_size=1 + ranks))
        members = [Member(rank, address, 1 + ranks, group) for rank in range(1, 1 + ranks)]
        self.members += members
        return members

    def joined(self, group: str, ranks: int = 1) -> list[Member]:
        """Members of a group that stands."""
        members = self.opened(group, ranks)
        for member in members:
            member.say("join")
        self.result(self.groups.join(group))
        assert [m.line() for m in members] == ["joined"] * ranks
        return members

    def serves(self, group: str) -> None:
        """Assert that a new group works."""
        (member,) = self.joined(group)
        plan = self.result(self.groups.plan(self.writer.version or 0))
        member.say(json.dumps(plan.to_plain()))
        self.result(self.groups.broadcast(group, plan))
        assert received(member, plan) == plan.digest

    def close(self) -> None:
        for member in self.members:
            member.close()
        self.link.stop()
        self.node.stop()
        self.file.close()


def received(member: Member, plan: BroadcastPlan) -> str:
    for broadcast in plan.broadcasts:
        assert member.line() == " ".join(("received", *broadcast.names))
    word, value = member.line().split()
    assert word == "holds"
    return value


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Session]]:
    """Starts connected sessions whose store holds the tensors as version 0."""
    sessions = []
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{Path.cwd()}")  # `compute` names a function of this file

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
                member.say(json.dumps(plan.to_plain()))
        for future in [session.groups.broadcast(name, plan) for name in groups]:
            session.result(future)
        assert {received(m, plan) for members in groups.values() for m in members} == {plan.digest}
    session.groups.close("one")
    with pytest.raises(SessionError, match="group one: is not open"):
        session.result(session.groups.join("one"))
    session.serves("three")


def test_nobody_comes_to_join(start: Callable[..., Session]) -> None:
    session = start(model(0), SHORT_S)
    (member,) = session.opened("g")
    member.signal(signal.SIGKILL)
    with pytest.raises(SessionError, match="group g: join: "):
        session.result(session.groups.join("g"))
    session.serves("h")


def test_one_of_two_ranks_comes_and_is_freed_when_the_join_fails(start: Callable[..., Session]) -> None:
    session = start(model(0), SHORT_S)
    first, second = session.opened("g", ranks=2)
    second.signal(signal.SIGSTOP)
    first.say("join")
    with pytest.raises(SessionError, match="group g: join: "):
        session.result(session.groups.join("g"))
    assert first.line().startswith("failed ")
    session.serves("h")


def test_closing_ends_a_join_at_both_ends(start: Callable[..., Session]) -> None:
    session = start(model(0))
    first, _ = session.opened("g", ranks=2)
    future = session.groups.join("g")
    first.say("join")
    session.poll(1.0)
    session.groups.close("g")
    with pytest.raises(SessionError, match="group g: join: "):
        session.result(future)
    assert first.line().startswith("failed ")


def test_the_other_rank_is_freed_when_one_stops_during_the_broadcast(start: Callable[..., Session]) -> None:
    session = start(large(0), SHORT_S)
    first, second = session.joined("g", ranks=2)
    plan = session.result(session.groups.plan(0))
    first.say(json.dumps(plan.to_plain()))
    second.say(json.dumps(BroadcastPlan(plan.version, plan.digest, plan.broadcasts[:1]).to_plain()))
    future = session.groups.broadcast("g", plan)
    assert second.line() == "received part0 odd0"
    second.signal(signal.SIGSTOP)
    with pytest.raises(SessionError, match="group g: broadcast: "):
        session.result(future)
    while (line := first.line()).startswith("received"):
        pass
    assert line.startswith("failed ")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_member_is_lost_during_the_broadcast(start: Callable[..., Session], number: signal.Signals) -> None:
    """A connection that breaks is noticed at once, a member that stands still by the deadline."""
    session = start(large(0), LONG_S if number == signal.SIGKILL else SHORT_S)
    (member,) = session.joined("g")
    (other,) = session.joined("other")
    plan = session.result(session.groups.plan(0))
    assert len(plan.broadcasts) > 2
    some = BroadcastPlan(plan.version, plan.digest, plan.broadcasts[:1])  # it reads the first broadcast and no more
    member.say(json.dumps(some.to_plain()))
    future = session.groups.broadcast("g", plan)
    assert member.line() == "received part0 odd0"
    session.poll(0.5)
    assert not future.done()
    member.signal(number)
    with pytest.raises(SessionError, match="group g: broadcast: "):
        session.result(future)
    other.say(json.dumps(plan.to_plain()))
    session.result(session.groups.broadcast("other", plan))
    assert received(other, plan) == plan.digest
    session.serves("h")


def test_a_member_is_freed_when_rank_0_stops_sending(start: Callable[..., Session]) -> None:
    session = start(model(0))
    (member,) = session.joined("g")
    plan = session.result(session.groups.plan(0))
    member.say(json.dumps(plan.to_plain()))
    other = BroadcastPlan(0, "0" * 32, plan.broadcasts)
    with pytest.raises(WeightsError, match="group g: broadcast: weights version 0 has other tensors"):
        session.result(session.groups.broadcast("g", other))
    assert member.line().startswith("failed ")  # without a byte of it


def test_a_version_that_is_gone_is_not_sent(start: Callable[..., Session]) -> None:
    session = start(model(0))
    plan = session.result(session.groups.plan(0))
    session.joined("g")
    for version in (1, 2):
        session.writer.publish(version, model(version))
    with pytest.raises(Superseded, match="weights version 0"):
        session.result(session.groups.broadcast("g", plan))
    with pytest.raises(Superseded, match="weights version 0"):
        session.result(session.groups.plan(0))
    session.serves("h")


def test_closing_ends_a_broadcast(start: Callable[..., Session]) -> None:
    session = start(large(0))
    session.joined("g")  # a member that reads nothing
    future = session.groups.broadcast("g", session.result(session.groups.plan(0)))
    session.poll(1.0)
    assert not future.done()
    session.groups.close("g")
    with pytest.raises(SessionError, match="group g: broadcast: the group was left"):
        session.result(future)
    session.serves("h")


def test_a_version_that_goes_during_its_broadcast_is_not_mixed(start: Callable[..., Session]) -> None:
    session = start(large(0))
    (member,) = session.joined("g")
    plan = session.result(session.groups.plan(0))
    member.say(json.dumps(BroadcastPlan(plan.version, plan.digest, plan.broadcasts[:1]).to_plain()))
    future = session.groups.broadcast("g", plan)
    assert member.line() == "received part0 odd0"
    for version in (1, 2):  # rank 0 has read one broadcast ahead, and waits for the member
        session.writer.publish(version, large(version))
    member.say(json.dumps(BroadcastPlan(plan.version, plan.digest, plan.broadcasts[1:]).to_plain()))
    with pytest.raises(Superseded, match="group g: broadcast: weights version 0"):
        session.result(future)
    while not (line := member.line()).startswith("failed "):
        assert line.startswith(("holds", "received part1", "received part2"))
    session.serves("h")


def test_the_link_computes_and_the_node_pulls_on_demand(start: Callable[..., Session]) -> None:
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
    for _ in range(2):  # the second time it is there
        path = session.result(session.node.pull(1))
        assert digest(StoreReader(path).tensors(1).items()) == digest(model(1))
    with pytest.raises(Superseded, match="the newest is 1"):
        session.result(session.node.pull(0))
    assert [type(e) for e in session.events] == [VersionAnnounced] * len(session.events)


def test_futures_end_with_the_session(start: Callable[..., Session]) -> None:
    session = start(model(0))
    session.opened("g")
    waiting = session.groups.join("g")
    session.poll(0.5)
    os.kill(session.link.pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while not waiting.done() and time.monotonic() < deadline:
        session.events += session.node.poll()
        time.sleep(0.02)
    with pytest.raises(SessionError, match="g: join: node of a-1"):
        waiting.result(0)
    assert isinstance(session.events[-1], ReceiverDown)
    with pytest.raises(SessionError, match="the link is gone"):
        session.groups.plan(0).result(0)
    assert wait([session.groups.join("g")], PATIENCE_S).not_done == set()


def test_a_gpu_that_is_not_there_is_named(start: Callable[..., Session]) -> None:
    session = start(model(0))
    with pytest.raises(SessionError, match="group g: listen: nccl needs a GPU"):
        session.result(session.groups.open("g", backend="nccl", world_size=2))

"""Whole sessions over Torch RPC on loopback: weights arrive, and every kind of loss is noticed and named."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sgpo_async.session import (
    Deadlines,
    NodeControl,
    ReceiverDown,
    SenderDown,
    SenderUp,
    VersionReceived,
    VersionRejected,
    WeightReceiver,
    WeightSender,
)
from sgpo_async.weights import StoreFile, StoreReader, StoreWriter, digest

pytestmark = pytest.mark.process

PATIENCE_S = 120.0
Handle = WeightSender | WeightReceiver


def wait_for(handle: Handle, kind: type[Any], accept: Callable[[Any], bool] = lambda _: True) -> Any:
    """The first event of `kind` that is accepted; others before it are dropped, a loss is an error."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        select.select([handle], [], [], max(0.0, deadline - time.monotonic()))
        for event in handle.poll():
            if isinstance(event, kind) and accept(event):
                return event
            assert not isinstance(event, SenderDown | ReceiverDown), event
    raise AssertionError(f"no {kind.__name__} within {PATIENCE_S} s")


def listening(pid: int) -> set[str]:
    """Addresses on which a process accepts TCP connections."""
    connections = psutil.Process(pid).net_connections("tcp")
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


def model(version: int) -> list[tuple[str, torch.Tensor]]:
    return [
        ("embed", torch.full((300, 70), float(version))),
        ("norm", torch.arange(700).bfloat16() + version),
        ("head", torch.full((70, 300), float(version)).t()),
    ]


class Session:
    """A store with a writer, a link and a node."""

    def __init__(self, deadlines: Deadlines) -> None:
        self.file = StoreFile("/nowhere")
        self.writer = StoreWriter(self.file.path, bucket_bytes=10_000)
        self.node = WeightReceiver("a-1", deadlines=deadlines)
        self.link = WeightSender(self.file.path, "a-1", "127.0.0.1", deadlines=deadlines)

    def connect(self) -> None:
        self.node.connect("127.0.0.1", wait_for(self.link, SenderUp).port)

    def arrives(self, version: int) -> VersionReceived:
        event = wait_for(self.node, VersionReceived, lambda e: e.version >= version)
        assert event.version == version
        found = StoreReader(event.path).tensors(version)
        assert digest(found.items()) == event.digest == digest(model(version))
        return event

    def close(self) -> None:
        self.link.stop()
        self.node.stop()
        self.file.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Session]]:
    sessions = []

    def make(**deadlines: float) -> Session:
        sessions.append(Session(Deadlines(**deadlines)))
        return sessions[-1]

    yield make
    for session in sessions:
        session.close()


def test_versions_arrive_whole_and_words_are_passed_on(make: Callable[..., Session]) -> None:
    session = make()
    session.connect()  # before the first publication
    for version in (0, 1, 2, 7):
        published = session.writer.publish(version, model(version))
        event = session.arrives(version)
        assert event.digest == published.digest
        assert event.nbytes == published.nbytes
        assert event.published_at == published.published_at
    for version in range(8, 40):  # faster than they can be pulled
        session.writer.publish(version, model(version))
    wait_for(session.node, VersionReceived, lambda e: e.version == 39)
    session.link.control("drain")
    assert wait_for(session.node, NodeControl) == NodeControl("drain")
    assert listening(session.link.pid) == {"127.0.0.1"}
    assert listening(session.node.pid) == {"127.0.0.1"}


def test_a_damaged_version_is_rejected_and_the_next_one_arrives(make: Callable[..., Session]) -> None:
    session = make()
    manifest = session.writer.publish(0, model(0))
    session.writer.publish(1, model(1))
    content = model(0)[0][1].numpy().tobytes()
    place = Path(session.file.path).read_bytes().index(content)
    newest = place + Path(session.file.path).read_bytes()[place + 1 :].index(model(1)[0][1].numpy().tobytes()) + 1
    with Path(session.file.path).open("r+b") as store:
        store.seek(newest + manifest.buckets[2].offset)
        store.write(b"\xff")
    session.connect()
    rejected = wait_for(session.node, VersionRejected)
    assert rejected.version == 1
    assert "bucket 2 does not match its checksum" in rejected.reason
    session.writer.publish(2, model(2))
    session.arrives(2)


@pytest.mark.parametrize("victim", ["link", "node"])
def test_a_killed_peer_ends_the_session_with_a_reason(make: Callable[..., Session], victim: str) -> None:
    session = make()
    session.writer.publish(0, model(0))
    session.connect()
    event = session.arrives(0)
    reader = StoreReader(event.path)
    assert reader.version() == 0
    if victim == "node":
        os.kill(session.node.pid, signal.SIGKILL)
        assert "a-1" in (reason := wait_for(session.link, SenderDown).reason)
        assert "the node is gone" in reason
        assert "SIGKILL" in wait_for(session.node, ReceiverDown).reason
        assert not Path(event.path).exists()
        assert digest(reader.tensors(0).items()) == event.digest  # who holds it keeps it
    else:
        os.kill(session.link.pid, signal.SIGKILL)
        assert "a-1" in (reason := wait_for(session.node, ReceiverDown).reason)
        assert "the link is gone" in reason
        assert "SIGKILL" in wait_for(session.link, SenderDown).reason


@pytest.mark.parametrize("victim", ["link", "node"])
def test_a_stopped_peer_is_given_up_by_the_deadline(make: Callable[..., Session], victim: str) -> None:
    session = make(call_s=5.0)
    session.writer.publish(0, model(0))
    session.connect()
    session.arrives(0)
    if victim == "node":
        os.kill(session.node.pid, signal.SIGSTOP)
        assert "the node gave no answer within" in wait_for(session.link, SenderDown).reason
    else:
        os.kill(session.link.pid, signal.SIGSTOP)
        assert "the link gave no answer within" in wait_for(session.node, ReceiverDown).reason


def test_nobody_comes_to_the_rendezvous(make: Callable[..., Session]) -> None:
    session = make(join_s=2.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        session.node.connect("127.0.0.1", silent.getsockname()[1])
        wait_for(session.link, SenderUp)
        assert "link of a-1: rendezvous with the node" in wait_for(session.link, SenderDown).reason
        assert "node of a-1: rendezvous with the link at 127.0.0.1" in wait_for(session.node, ReceiverDown).reason


def test_a_host_that_is_not_ours_is_named() -> None:
    link = WeightSender("/nowhere", "a-1", "no-such-host.invalid")
    try:
        assert "no-such-host.invalid" in wait_for(link, SenderDown).reason
    finally:
        link.stop()


PARENT = """
import select, time
from sgpo_async.session import WeightSender, WeightReceiver
link = WeightSender("/nowhere", "a-1", "127.0.0.1")
lonely = WeightSender("/nowhere", "a-2", "127.0.0.1")  # stays inside its rendezvous
node = WeightReceiver("a-1")
def wait(handle):
    select.select([handle], [], [])
    return handle.poll()[0]
node.connect("127.0.0.1", wait(link).port)
wait(lonely)
link.control("hello")
assert wait(node).word == "hello"
print(link.pid, lonely.pid, node.pid, flush=True)
time.sleep(600)
"""


def test_nothing_outlives_its_parent() -> None:
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as parent:
        assert parent.stdout
        children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
        _, alive = psutil.wait_procs(children, timeout=PATIENCE_S)
    assert len(children) == 3
    assert alive == []

"""Complete sessions over Torch RPC on loopback: weights arrive, and the events name every kind of failure."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sgpo_async.session import (
    Deadlines,
    ReceiverDown,
    SenderDown,
    SenderUp,
    VersionReceived,
    VersionRejected,
    WeightReceiver,
    WeightSender,
)
from sgpo_async.session.settings import Deltas
from sgpo_async.session.uploader_process import Uploaded, WeightUploader
from sgpo_async.weights import StoreFile, StoreReader, StoreWriter, digest
from sgpo_async.wire.records import Road

pytestmark = pytest.mark.process

PATIENCE_S = 120.0
Handle = WeightSender | WeightReceiver


def wait_for(handle: Handle, kind: type[Any], accept: Callable[[Any], bool] = lambda _: True) -> Any:
    """Return the first event of `kind` that is accepted; skip others, but fail if the session ends."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        connection.wait([handle], max(0.0, deadline - time.monotonic()))
        for event in handle.poll():
            if isinstance(event, kind) and accept(event):
                return event
            assert not isinstance(event, SenderDown | ReceiverDown), event
    raise AssertionError(f"no {kind.__name__} within {PATIENCE_S} s")


def listening(pid: int) -> set[str]:
    """Return the addresses on which a process accepts TCP connections."""
    connections = psutil.Process(pid).net_connections("tcp")
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


def model(version: int) -> list[tuple[str, torch.Tensor]]:
    return [
        ("embed", torch.full((300, 70), float(version))),
        ("norm", torch.arange(700).bfloat16() + version),
        ("head", torch.full((70, 300), float(version)).t()),
    ]


class Session:
    """A store with a writer, a weight sender and a weight receiver."""

    def __init__(self, deadlines: Deadlines, deltas: Deltas = "auto", road: Road = "rpc") -> None:
        self.file = StoreFile("/nowhere")
        self.writer = StoreWriter(self.file.path, bucket_bytes=10_000)
        self.local = StoreFile("/nowhere")
        self.receiver = WeightReceiver("a-1", store=self.local.path, road=road, deltas=deltas, deadlines=deadlines)
        self.sender = WeightSender(self.file.path, "a-1", "127.0.0.1", road=road, deadlines=deadlines)

    def connect(self) -> None:
        up = wait_for(self.sender, SenderUp)
        self.receiver.connect("127.0.0.1", up.port, up.secret)

    def arrives(self, version: int) -> VersionReceived:
        event = wait_for(self.receiver, VersionReceived, lambda e: e.version >= version)
        assert event.version == version
        found = StoreReader(event.path).tensors(version)
        assert digest(found.items()) == event.digest == digest(model(version))
        return event

    def close(self) -> None:
        self.sender.stop()
        self.receiver.stop()
        self.file.close()
        self.local.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Session]]:
    sessions = []

    def make(*, deltas: Deltas = "auto", road: Road = "rpc", **deadlines: float) -> Session:
        sessions.append(Session(Deadlines(**deadlines), deltas, road))
        return sessions[-1]

    yield make
    for session in sessions:
        session.close()


def test_versions_arrive_complete_and_no_port_stays_open(make: Callable[..., Session]) -> None:
    session = make()
    up = wait_for(session.sender, SenderUp)
    assert listening(session.sender.pid) == {"127.0.0.1"}, "the rendezvous"
    session.receiver.connect("127.0.0.1", up.port, up.secret)  # before the first publication
    for version in (0, 1, 2, 7):
        published = session.writer.publish(version, model(version))
        event = session.arrives(version)
        assert event.digest == published.digest
        assert event.nbytes == published.nbytes
        assert event.published_at == published.published_at
    for version in range(8, 40):  # faster than they can be pulled
        session.writer.publish(version, model(version))
    wait_for(session.receiver, VersionReceived, lambda e: e.version == 39)
    assert listening(session.sender.pid) == listening(session.receiver.pid) == set()


def test_over_sockets_only_the_weight_sender_listens(make: Callable[..., Session]) -> None:
    session = make(road="sockets")
    session.connect()
    for version in range(3):
        session.writer.publish(version, model(version))
        session.arrives(version)
        assert listening(session.sender.pid) == {"127.0.0.1"}
        assert listening(session.receiver.pid) == set()
    for version in range(3, 30):  # faster than they can be pulled
        session.writer.publish(version, model(version))
    wait_for(session.receiver, VersionReceived, lambda e: e.version == 29)


def test_a_bucket_of_many_parts_arrives_over_sockets(make: Callable[..., Session]) -> None:
    session = make(road="sockets")
    values = torch.randn(5_000_000, generator=torch.Generator().manual_seed(0))
    StoreWriter(session.file.path, bucket_bytes=7 * 2**20 + 1).publish(0, [("w", values)])
    session.connect()
    event = wait_for(session.receiver, VersionReceived)
    assert torch.equal(StoreReader(event.path).tensors(0)["w"], values)


def test_who_does_not_know_the_secret_gets_no_weights_over_sockets(make: Callable[..., Session]) -> None:
    session = make(road="sockets", join_s=5.0)
    session.writer.publish(0, model(0))
    up = wait_for(session.sender, SenderUp)
    session.receiver.connect("127.0.0.1", up.port, bytes(32))
    assert "rendezvous with the weight sender" in wait_for(session.receiver, ReceiverDown).reason
    assert "rendezvous with the weight receiver: not done" in wait_for(session.sender, SenderDown).reason
    assert StoreReader(session.local.path).offered() is None


@pytest.mark.parametrize(("deltas", "road"), [("always", "rpc"), ("auto", "rpc"), ("always", "sockets")])
def test_small_steps_arrive_as_differences_from_another_machine(
    make: Callable[..., Session], deltas: Deltas, road: Road
) -> None:
    """On the sender's own machine, `auto` copies whole versions."""
    session = make(deltas=deltas, road=road)
    values = torch.randn(40_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    session.connect()
    received = []
    for version in range(3):
        values[version::500] += 1
        session.writer.publish(version, [("w", values)])
        event = wait_for(session.receiver, VersionReceived, lambda event, version=version: event.version == version)
        assert torch.equal(StoreReader(event.path).tensors(version)["w"], values)
        received.append(event.received)
    assert received[0] == event.nbytes
    assert all((size < event.nbytes / 20) if deltas == "always" else (size == event.nbytes) for size in received[1:])


@pytest.mark.parametrize("road", ["rpc", "sockets"])
def test_a_damaged_version_is_rejected_and_the_next_one_arrives(make: Callable[..., Session], road: Road) -> None:
    session = make(road=road)
    manifest = session.writer.publish(0, model(0))
    session.writer.publish(1, model(1))
    content = model(0)[0][1].numpy().tobytes()
    oldest = Path(session.file.path).read_bytes().index(content)
    newest = oldest + Path(session.file.path).read_bytes()[oldest + 1 :].index(model(1)[0][1].numpy().tobytes()) + 1
    with Path(session.file.path).open("r+b") as store:
        store.seek(newest + manifest.buckets[2].offset)
        store.write(b"\xff")
    session.connect()
    rejected = wait_for(session.receiver, VersionRejected)
    assert rejected.version == 1
    assert "bucket 2 does not match its checksum" in rejected.reason
    session.writer.publish(2, model(2))
    session.arrives(2)


@pytest.mark.parametrize("victim", ["sender", "receiver"])
def test_a_killed_peer_ends_the_session_with_a_reason(make: Callable[..., Session], victim: str) -> None:
    session = make()
    session.writer.publish(0, model(0))
    session.connect()
    event = session.arrives(0)
    reader = StoreReader(event.path)
    assert reader.version() == 0
    if victim == "receiver":
        os.kill(session.receiver.pid, signal.SIGKILL)
        assert "a-1" in (reason := wait_for(session.sender, SenderDown).reason)
        assert "the weight receiver is gone" in reason
        assert "SIGKILL" in wait_for(session.receiver, ReceiverDown).reason
        assert digest(reader.tensors(0).items()) == event.digest, "the store outlives the process that writes it"
    else:
        os.kill(session.sender.pid, signal.SIGKILL)
        assert "a-1" in (reason := wait_for(session.receiver, ReceiverDown).reason)
        assert "the weight sender is gone" in reason
        assert "SIGKILL" in wait_for(session.sender, SenderDown).reason


def test_another_session_continues_with_the_store_of_a_killed_receiver(make: Callable[..., Session]) -> None:
    first = make()
    first.writer.publish(0, model(0))
    first.connect()
    first.arrives(0)
    os.kill(first.receiver.pid, signal.SIGKILL)
    wait_for(first.receiver, ReceiverDown)
    first.receiver.stop()
    first.sender.stop()
    first.sender = WeightSender(first.file.path, "a-1", "127.0.0.1")
    first.receiver = WeightReceiver("a-1", store=first.local.path)
    first.connect()
    assert first.arrives(0).received == 0, "the version is reported, but not pulled again"
    first.writer.publish(1, model(1))
    first.arrives(1)


def test_other_content_under_the_same_version_replaces_that_of_the_store(make: Callable[..., Session]) -> None:
    session = make()
    StoreWriter(session.local.path).publish(3, model(2))
    session.receiver.stop()
    session.receiver = WeightReceiver("a-1", store=session.local.path)
    session.writer.publish(3, model(3))
    session.connect()
    session.arrives(3)


@pytest.mark.parametrize(
    ("victim", "road"),
    [
        ("receiver", "rpc"),
        ("sender", "sockets"),
        pytest.param("sender", "rpc", marks=pytest.mark.slow),
        pytest.param("receiver", "sockets", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_peer_ends_the_session_at_the_deadline(make: Callable[..., Session], victim: str, road: Road) -> None:
    session = make(call_s=5.0, road=road)
    session.writer.publish(0, model(0))
    session.connect()
    session.arrives(0)
    if victim == "receiver":
        os.kill(session.receiver.pid, signal.SIGSTOP)
        assert "the weight receiver did not answer within" in wait_for(session.sender, SenderDown).reason
    else:
        os.kill(session.sender.pid, signal.SIGSTOP)
        assert "the weight sender did not answer within" in wait_for(session.receiver, ReceiverDown).reason


def test_a_rendezvous_without_a_peer_ends_at_the_deadline(make: Callable[..., Session]) -> None:
    session = make(join_s=2.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        session.receiver.connect("127.0.0.1", silent.getsockname()[1], b"secret")
        wait_for(session.sender, SenderUp)
        assert (
            "weight sender of a-1: rendezvous with the weight receiver" in wait_for(session.sender, SenderDown).reason
        )
        assert (
            "weight receiver of a-1: rendezvous with the weight sender at 127.0.0.1"
            in wait_for(session.receiver, ReceiverDown).reason
        )


def test_the_error_for_an_unknown_host_names_it() -> None:
    sender = WeightSender("/nowhere", "a-1", "no-such-host.invalid")
    try:
        assert "no-such-host.invalid" in wait_for(sender, SenderDown).reason
    finally:
        sender.stop()


PARENT = """
import select, time
import torch
from sgpo_async.session import VersionReceived, WeightSender, WeightReceiver
from sgpo_async.weights import StoreFile, StoreWriter
file = StoreFile("/nowhere")
StoreWriter(file.path).publish(0, [("a", torch.ones(3))])
sender = WeightSender(file.path, "a-1", "127.0.0.1")
waiting = WeightSender(file.path, "a-2", "127.0.0.1")  # stays inside its rendezvous
receiver = WeightReceiver("a-1", store=StoreFile("/nowhere").path)
def wait(handle):
    select.select([handle], [], [])
    return handle.poll()[0]
up = wait(sender)
receiver.connect("127.0.0.1", up.port, up.secret)
wait(waiting)
assert isinstance(wait(receiver), VersionReceived)
print(sender.pid, waiting.pid, receiver.pid, flush=True)
time.sleep(600)
"""


def test_no_session_process_outlives_its_parent() -> None:
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as parent:
        assert parent.stdout
        children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
        _, alive = psutil.wait_procs(children, timeout=PATIENCE_S)
    assert len(children) == 3
    assert alive == []


def test_versions_arrive_through_a_folder(tmp_path: Path) -> None:
    files = StoreFile("/nowhere"), StoreFile("/nowhere")
    url = f"file://{tmp_path}/weights"
    writer = StoreWriter(files[0].path, bucket_bytes=10_000)
    receiver = WeightReceiver("a-1", store=files[1].path, road="folder")
    receiver.open_folder(url)  # before anything is there
    uploader = WeightUploader(files[0].path, url)
    try:
        for version in (0, 1, 5):
            manifest = writer.publish(version, model(version))
            event = wait_for(receiver, VersionReceived, lambda e, version=version: e.version == version)
            assert event.digest == manifest.digest
            assert digest(StoreReader(event.path).tensors(version).items()) == digest(model(version))
        uploads = [event for event in uploader.poll() if isinstance(event, Uploaded)]
        assert [event.version for event in uploads] == [0, 1, 5]
        assert listening(receiver.pid) == set()
    finally:
        receiver.stop()
        uploader.stop()
        for file in files:
            file.close()


def test_a_folder_that_cannot_be_read_ends_the_receiver_with_a_reason() -> None:
    file = StoreFile("/nowhere")
    receiver = WeightReceiver("a-1", store=file.path, road="folder")
    receiver.open_folder("nonsense://bucket/run")
    try:
        assert "hub.weight_folder: cannot open nonsense://bucket/run" in wait_for(receiver, ReceiverDown).reason
    finally:
        receiver.stop()
        file.close()

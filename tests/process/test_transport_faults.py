"""The hub's endpoint against hostile and dying peers in other processes, and against a second hub."""

import socket as network
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from sgpo_async.errors import HubError, WireError
from sgpo_async.transport import Dealer, Mailbox, Router, RouterMailbox
from sgpo_async.wire.records import Ack, Goodbye, Message, Ready, Rollout

pytestmark = pytest.mark.process

PATIENCE = 120.0
LIMIT = 2**20

FLOOD = """
import random, sys, zmq
socket = zmq.Context().socket(zmq.DEALER)
socket.connect(sys.argv[1])
rng = random.Random(0)
for _ in range(5000):
    socket.send_multipart([rng.randbytes(rng.randint(0, 99)) for _ in range(rng.randint(1, 4))])
socket.close(linger=60_000)
socket.context.term()
"""

STREAM = """
import itertools, sys
import numpy as np
from sgpo_async.transport import Dealer, Mailbox
from sgpo_async.wire.records import Rollout

n = 20_000
dealer = Dealer(sys.argv[1], identity=b"victim", max_bytes=2**20)
mailbox = Mailbox(dealer)
for slot in itertools.count():
    rollout = Rollout(
        task=1, attempt=0, slot=slot, purpose="train", guided=False, prompt=np.ones(9, np.int32),
        tokens=np.full(n, slot, np.int32), logprobs=np.zeros(n, np.float32),
        versions=np.zeros(1, np.int32),
        digests=np.zeros(1, np.int64), ends=np.full(1, n, np.int32), reward=0.0, finish="stop",
    )
    while not mailbox.send(rollout):
        dealer.socket.poll(10)
"""


@pytest.fixture
def hub() -> Iterator[RouterMailbox]:
    mailbox = RouterMailbox(Router("tcp://127.0.0.1:0", max_bytes=LIMIT))
    yield mailbox
    mailbox.close()


@contextmanager
def member(address: str, identity: bytes = b"good") -> Iterator[Mailbox]:
    mailbox = Mailbox(Dealer(address, identity=identity, max_bytes=LIMIT))
    yield mailbox
    mailbox.close()


@contextmanager
def child(script: str, address: str) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, "-c", script, address])
    yield process
    process.kill()
    process.wait(PATIENCE)


def until(
    hub: RouterMailbox, enough: Callable[[list[tuple[bytes, Message | WireError]]], bool]
) -> list[tuple[bytes, Message | WireError]]:
    """Everything that the hub receives until `enough` is true."""
    received: list[tuple[bytes, Message | WireError]] = []
    deadline = time.monotonic() + PATIENCE
    while not enough(received):
        assert time.monotonic() < deadline, f"{len(received)} messages, then silence: {received[-1:]}"
        received += hub.receive(1.0)
    return received


def test_the_hub_counts_malformed_messages_and_serves_a_good_member(hub: RouterMailbox) -> None:
    address = hub.router.address
    with child(FLOOD, address), member(address) as good:
        for step in range(100):
            assert good.send(Ready(tasks=1, version=step))
        received = until(hub, lambda seen: len(seen) == 5100)
        assert [m for sender, m in received if sender == b"good"] == [
            Ready(tasks=1, version=step) for step in range(100)
        ]
        assert sum(isinstance(m, WireError) for _, m in received) == 5000
        assert hub.send(b"good", Ack(task=1, attempt=1, slot=1))
        assert good.receive(PATIENCE) == [Ack(task=1, attempt=1, slot=1)]


def test_connections_that_are_not_zeromq_do_not_disturb_a_good_member(hub: RouterMailbox) -> None:
    host, port = hub.router.address.removeprefix("tcp://").split(":")
    for noise in (b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 4000, b"\xff" + b"\0" * 8 + b"\x7f" * 999):
        with network.create_connection((host, int(port)), timeout=PATIENCE) as stranger:
            try:
                stranger.sendall(noise)
            except ConnectionError:
                continue  # the hub closed the connection before the end
    with member(hub.router.address) as good:
        good.send(Goodbye())
        assert until(hub, bool) == [(b"good", Goodbye())]


def test_an_oversized_message_counts_as_one_rejection(hub: RouterMailbox) -> None:
    with member(hub.router.address) as good:
        good.dealer.send([b"x" * (LIMIT + 1)])
        good.send(Goodbye())
        (_, error), (_, message) = until(hub, lambda seen: len(seen) == 2)
        assert isinstance(error, WireError) and "larger than" in str(error)
        assert message == Goodbye()


def test_zeromq_drops_a_far_too_large_message_and_its_sender_reconnects(hub: RouterMailbox) -> None:
    with member(hub.router.address) as good:
        good.dealer.send([b"x" * (8 * LIMIT)])
        good.send(Goodbye())
        assert until(hub, bool) == [(b"good", Goodbye())]
        good.receive(0)
        assert good.dealer.connections == 2


def test_a_member_killed_while_sending_leaves_only_complete_messages(hub: RouterMailbox) -> None:
    address = hub.router.address
    with member(address) as good, child(STREAM, address) as victim:
        received = until(hub, lambda seen: len(seen) >= 30)
        victim.kill()
        victim.wait(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while hub.send(b"victim", Ack(task=1, attempt=0, slot=0)):
            assert time.monotonic() < deadline, "the hub did not notice that the member died"
            received += hub.receive(0.01)
        good.send(Goodbye())
        received += until(hub, lambda seen: any(sender == b"good" for sender, _ in seen))
        assert [message for sender, message in received if sender == b"good"] == [Goodbye()]
        rollouts = [message for sender, message in received if sender == b"victim"]
        assert all(isinstance(message, Rollout) for message in rollouts)
        assert [r.slot for r in rollouts] == [int(r.tokens[-1]) for r in rollouts] == list(range(len(rollouts)))
        assert not any(isinstance(message, WireError) for _, message in received)


def test_a_second_hub_on_the_same_port_raises_and_the_first_goes_on(hub: RouterMailbox) -> None:
    with pytest.raises(
        HubError, match=f"{hub.router.address} is in use; stop the other process or choose another port"
    ):
        Router(hub.router.address, max_bytes=LIMIT)
    with member(hub.router.address) as good:
        good.send(Goodbye())
        assert until(hub, bool) == [(b"good", Goodbye())]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (
            "tcp://192.0.2.1:5757",
            "cannot listen at .*; choose an address of this machine",
        ),  # reserved for documentation
        ("tcp://no-such-host.invalid:5757", "host no-such-host.invalid in .* is unknown"),
    ],
)
def test_an_address_of_another_machine_raises(address: str, reason: str) -> None:
    with pytest.raises(HubError, match=f"hub.address: {reason}"):
        Router(address, max_bytes=LIMIT)


def test_a_router_binds_to_a_host_name() -> None:
    router = Router("tcp://localhost:0", max_bytes=LIMIT)
    with member(router.address) as good:
        good.send(Goodbye())
        assert until(RouterMailbox(router), bool) == [(b"good", Goodbye())]
    router.close()


def test_a_member_reconnects_to_a_restarted_hub() -> None:
    first = Router("tcp://127.0.0.1:0", max_bytes=LIMIT)
    dealer = Dealer(first.address, identity=b"good", max_bytes=LIMIT)
    dealer.wait_connected(PATIENCE)
    first.close()
    deadline = time.monotonic() + PATIENCE
    while dealer.connected and time.monotonic() < deadline:
        dealer.poll(0.01)
    assert not dealer.connected
    second = Router(first.address, max_bytes=LIMIT)
    dealer.wait_connected(PATIENCE)
    assert dealer.connections == 2
    dealer.send([b"again"])
    assert second.poll(PATIENCE) == [(b"good", [b"again"], b"")]
    dealer.close()
    second.close()


def test_waiting_for_a_missing_hub_raises_one_line() -> None:
    with network.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, but not listening
        dealer = Dealer(f"tcp://127.0.0.1:{free.getsockname()[1]}", max_bytes=LIMIT)
        with pytest.raises(HubError, match=r"no hub answered at tcp://127.* within 0.2 s; check that it is running"):
            dealer.wait_connected(0.2)
        assert dealer.send([b"queued"])
        dealer.close(linger_s=0.2)  # returns although the frame cannot be sent
        dealer.close()


def test_close_with_linger_sends_the_queued_messages_first(hub: RouterMailbox) -> None:
    with member(hub.router.address) as leaving:
        for step in range(200):
            leaving.send(Ready(tasks=1, version=step))
        leaving.send(Goodbye(reason="drained"))
        leaving.close(linger_s=PATIENCE)
    received = until(hub, lambda seen: len(seen) == 201)
    assert received[-1] == (b"good", Goodbye(reason="drained"))


def end_of_messages(hub: RouterMailbox) -> None:
    """Wait until ZeroMQ has told of an end, before any message is read."""
    monitor, deadline = hub.router._monitor, time.monotonic() + PATIENCE  # type: ignore[attr-defined]
    while not monitor.poll(100):
        assert time.monotonic() < deadline
    time.sleep(0.2)  # the beginning was told earlier


def test_a_member_that_dies_before_its_messages_are_read_is_gone(hub: RouterMailbox) -> None:
    with member(hub.router.address) as good:
        good.send(Goodbye())
        good.close(linger_s=PATIENCE)
    end_of_messages(hub)
    assert until(hub, bool) == [(b"good", Goodbye())]
    assert gone(hub) == [b"good"]


def test_the_end_of_a_member_is_not_missed_if_another_one_gets_its_descriptor(hub: RouterMailbox) -> None:
    with member(hub.router.address) as good:
        good.send(Ready(tasks=1, version=0))
        until(hub, bool)
        for step in range(400):
            good.send(Ready(tasks=1, version=step))
        good.close(linger_s=PATIENCE)
    end_of_messages(hub)
    with member(hub.router.address, b"other") as other:
        other.send(Goodbye())
        received = until(hub, lambda seen: len(seen) == 401)
        assert gone(hub) == [b"good"]
        other.send(Goodbye())
        received += until(hub, bool)
        assert [sender for sender, _ in received].count(b"other") == 2 and hub.gone() == []
    assert gone(hub) == [b"other"]


def gone(hub: RouterMailbox) -> list[bytes]:
    """The members that are gone next."""
    deadline = time.monotonic() + PATIENCE
    while not (found := hub.gone()):
        assert time.monotonic() < deadline
        assert hub.receive(0.1) == []
    return found

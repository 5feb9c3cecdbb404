"""Mailboxes over the in-memory transport."""

import threading

import pytest

from sgpo_async.errors import HubError, ProtocolMismatch, WireError
from sgpo_async.transport import Mailbox, MemoryRouter, RouterMailbox, memory_pair, request_settings
from sgpo_async.transport.base import BATCH, HIGH_WATER
from sgpo_async.wire.records import Ack, Goodbye, Ready, Stop


def test_messages_arrive_in_both_directions() -> None:
    router, dealer = memory_pair(b"actor")
    hub, actor = RouterMailbox(router), Mailbox(dealer)
    assert actor.send(Ready(tasks=2, version=1))
    assert hub.receive(0) == [(b"actor", Ready(tasks=2, version=1))]
    assert hub.send(b"actor", Stop())
    assert actor.receive(0) == [Stop()]


def test_a_mailbox_passes_over_unreadable_messages_and_knows_of_another_release() -> None:
    router, dealer = memory_pair(b"actor")
    hub, actor = RouterMailbox(router), Mailbox(dealer)
    for frames in ([], [b"\xc1"], [b"\x63\x80"]):
        dealer.send(frames)
        router.send(b"actor", frames)
    assert actor.receive(0) == []
    assert actor.mismatch.startswith("protocol: the other side uses version 99, this side ")
    actor.send(Goodbye())
    hub.send(b"actor", Stop())
    read = [message for _, message in hub.receive(0)]
    assert [type(message) for message in read] == [WireError, WireError, ProtocolMismatch, Goodbye]
    assert actor.receive(0) == [Stop()]
    assert actor.mismatch == "", "the hub has sent what can be read"


def test_who_asks_a_hub_of_another_release_for_the_settings_is_told_at_once() -> None:
    router, dealer = memory_pair(b"actor")
    router.send(b"actor", [b"\x63\x80"])
    with pytest.raises(HubError, match="^hub memory: protocol: .* version 99, .* install the same sgpo-async on both"):
        request_settings(Mailbox(dealer), name="a", timeout_s=60.0)


def test_sending_a_message_that_is_too_large_raises_at_the_sender() -> None:
    router = MemoryRouter(max_bytes=100)
    actor = Mailbox(router.dealer(b"actor"))
    with pytest.raises(WireError, match=r"Goodbye of \d+ bytes is larger than 100; raise hub.max_message_mb"):
        actor.send(Goodbye(reason="x" * 100))
    with pytest.raises(WireError, match="larger than 100"):
        RouterMailbox(router).send(b"actor", Stop(reason="x" * 100))
    assert router.poll(0) == []


def test_a_memory_poll_returns_at_most_a_batch() -> None:
    router, dealer = memory_pair()
    for _ in range(BATCH + 1):
        dealer.send([b"x"])
    assert [len(router.poll(0)) for _ in range(3)] == [BATCH, 1, 0]


def test_memory_queues_are_bounded() -> None:
    router, dealer = memory_pair(b"member")
    assert [dealer.send([b"x"]) for _ in range(HIGH_WATER + 1)] == [True] * HIGH_WATER + [False]
    assert [router.send(b"member", [b"x"]) for _ in range(HIGH_WATER + 1)] == [True] * HIGH_WATER + [False]


def test_a_memory_poll_wakes_up_when_another_thread_sends() -> None:
    router, dealer = memory_pair(b"member")
    hub, actor = RouterMailbox(router), Mailbox(dealer)
    echo = threading.Thread(target=lambda: [hub.send(*item) for item in hub.receive(60)])
    echo.start()
    actor.send(Ack(task=1, attempt=2, slot=3))
    assert actor.receive(60) == [Ack(task=1, attempt=2, slot=3)]
    echo.join()

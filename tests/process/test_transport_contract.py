"""Both transports fulfil the same interface: in memory, and ZeroMQ on loopback."""

import time
from collections.abc import Callable, Iterator

import pytest

from sgpo_async.transport import Dealer, DealerEnd, MemoryRouter, Router, RouterEnd
from sgpo_async.transport.base import Frames

pytestmark = pytest.mark.process

PATIENCE = 120.0
LIMIT = 2**20
Connect = Callable[[bytes], DealerEnd]


@pytest.fixture(params=["memory", "zeromq"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[RouterEnd, Connect]]:
    """A router, and a function that connects a dealer with a given identity to it."""
    if request.param == "memory":
        memory = MemoryRouter()
        yield memory, memory.dealer
        return
    router = Router("tcp://127.0.0.1:0", max_bytes=LIMIT)
    dealers: list[Dealer] = []

    def connect(identity: bytes) -> Dealer:
        dealers.append(Dealer(router.address, identity=identity, max_bytes=LIMIT))
        dealers[-1].wait_connected(PATIENCE)
        return dealers[-1]

    yield router, connect
    for end in (*dealers, router):
        end.close()


def exactly(count: int, poll: Callable[[float], list]) -> list:
    """Poll until `count` items have arrived, and return them."""
    items: list = []
    while len(items) < count:
        arrived = poll(PATIENCE)
        assert arrived, f"{len(items)} of {count} arrived"
        items += arrived
    return items


def test_frames_arrive_complete_and_in_order_with_the_identity(ends: tuple[RouterEnd, Connect]) -> None:
    router, connect = ends
    a, b = connect(b"a"), connect(b"b")
    sent: list[Frames] = [[bytes([n]), b"", b"x" * n] for n in range(200)]
    assert all(a.send(frames) and b.send(frames) for frames in sent)
    received = exactly(400, router.poll)
    for name in (b"a", b"b"):
        assert [frames for member, frames, _ in received if member == name] == sent


def test_a_reply_reaches_only_its_member(ends: tuple[RouterEnd, Connect]) -> None:
    router, connect = ends
    a, b = connect(b"a"), connect(b"b")
    a.send([b"hello"])
    exactly(1, router.poll)
    assert router.send(b"a", [b"for a", b""])
    assert exactly(1, a.poll) == [[b"for a", b""]]
    assert b.poll(0.05) == []


def test_a_poll_without_messages_returns_in_time(ends: tuple[RouterEnd, Connect]) -> None:
    router, connect = ends
    assert router.poll(0.05) == [] == connect(b"a").poll(0.05)
    assert router.poll(0) == []


def test_sending_to_an_unknown_member_returns_false(ends: tuple[RouterEnd, Connect]) -> None:
    router, _ = ends
    assert not router.send(b"unknown", [b"x"])


def test_sending_to_a_closed_member_returns_false(ends: tuple[RouterEnd, Connect]) -> None:
    router, connect = ends
    member = connect(b"a")
    member.send([b"x"])
    exactly(1, router.poll)
    member.close()
    send_until_false(router, b"a", [b"y"])


def test_a_member_that_does_not_read_does_not_block_the_others(ends: tuple[RouterEnd, Connect]) -> None:
    router, connect = ends
    member = connect(b"slow")
    member.send([b"x"])
    exactly(1, router.poll)
    send_until_false(router, b"slow", [b"y" * 10_000])
    other = connect(b"other")
    other.send([b"x"])
    assert exactly(1, router.poll) == [(b"other", [b"x"], b"")]
    assert router.send(b"other", [b"z"])
    assert exactly(1, other.poll) == [[b"z"]]


def test_a_new_connection_with_a_known_identity_replaces_the_old_one(ends: tuple[RouterEnd, Connect]) -> None:
    router, connect = ends
    for generation in (b"1", b"2", b"3"):
        member = connect(b"a")
        member.send([generation])
        assert exactly(1, router.poll) == [(b"a", [generation], b"")]
        assert router.send(b"a", [b"to", generation])
        assert exactly(1, member.poll) == [[b"to", generation]]


def test_a_member_whose_connection_has_ended_is_gone_until_it_comes_back(ends: tuple[RouterEnd, Connect]) -> None:
    router, connect = ends
    members = {name: connect(name) for name in (b"a", b"b")}
    for member in members.values():
        member.send([b"hello"])
    exactly(2, router.poll)
    assert router.gone() == []
    members[b"a"].close()
    deadline = time.monotonic() + PATIENCE
    while not (gone := router.gone()):
        assert time.monotonic() < deadline
    assert gone == [b"a"]
    connect(b"a").send([b"again"])
    exactly(1, router.poll)
    members[b"b"].send([b"still here"])
    exactly(1, router.poll)
    assert router.gone() == []


def send_until_false(router: RouterEnd, member: bytes, frames: Frames) -> None:
    """Send until the router returns False; the queues hold far fewer messages than these."""
    assert any(not router.send(member, frames) for _ in range(1_000_000))

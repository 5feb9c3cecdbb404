"""CURVE: the hub accepts the right keys, and refuses every other connection with the reason."""

import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from sgpo_async.errors import HubError
from sgpo_async.transport import Dealer, Router, create_keys
from sgpo_async.transport.base import RANDOM_BYTES
from sgpo_async.transport.keys import add_actors, key_pair, public_key, revoke
from sgpo_async.transport.router import end_connection
from sgpo_async.transport.sockets import close_socket, open_socket

pytestmark = pytest.mark.process

PATIENCE = 120.0
LIMIT = 2**20
GOOD, OTHER = b"good".ljust(RANDOM_BYTES, b"."), b"other".ljust(RANDOM_BYTES, b".")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    create_keys(tmp_path / "hub")
    create_keys(tmp_path / "stranger")
    return tmp_path


@pytest.fixture
def router(keys: Path) -> Iterator[Router]:
    router = Router("tcp://127.0.0.1:0", keys=keys / "hub", max_bytes=LIMIT)
    yield router
    router.close()


def error_with(dealer: Dealer, words: str) -> str:
    """The error message of a dealer that cannot connect, once it contains `words`."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with pytest.raises(HubError) as caught:
            dealer.wait_connected(0.5)
        if words in str(caught.value):
            return str(caught.value)
    raise AssertionError(f"no error with {words!r}, but: {caught.value}")


def refusal(dealer: Dealer) -> str:
    """The error message of a dealer that the hub refuses, once the hub has refused it."""
    return error_with(dealer, "refuses")


def test_an_actor_connects_with_three_of_the_six_key_files(router: Router, keys: Path) -> None:
    folder = keys / "copied"
    folder.mkdir()
    for name in ("server.key", "actor.key", "actor.key_secret"):
        shutil.copy(keys / "hub" / name, folder)
    dealer = Dealer(router.address, identity=GOOD, keys=folder, max_bytes=LIMIT)
    dealer.wait_connected(PATIENCE)
    dealer.send([b"hello", b"x" * 100_000])
    key = public_key(keys / "hub", "actor")
    assert router.poll(PATIENCE) == [(key + GOOD, [b"hello", b"x" * 100_000], key)]
    assert router.send(key + GOOD, [b"welcome"])
    assert dealer.poll(PATIENCE) == [[b"welcome"]]
    dealer.close()


def unknown_client(keys: Path) -> Path:
    """Keys of a client that has the hub's public key, but a client key that the hub does not know."""
    shutil.copy(keys / "hub" / "server.key", keys / "stranger")
    return keys / "stranger"


@pytest.mark.parametrize(
    ("mistake", "reason"),
    [
        ("unknown client key", "it does not know this side's key"),
        ("wrong server key", "the handshake broke off: wrong server.key, or keys on one side only"),
        ("no keys", ".*keys on one side only"),
    ],
)
def test_wrong_keys_are_refused_with_the_reason(router: Router, keys: Path, mistake: str, reason: str) -> None:
    folder = {
        "unknown client key": lambda: unknown_client(keys),
        "wrong server key": lambda: keys / "stranger",
        "no keys": lambda: "",
    }[mistake]()
    stranger = Dealer(router.address, identity=b"stranger", keys=folder, max_bytes=LIMIT)
    stranger.send([b"let me in"])
    message = refusal(stranger)
    remedy = r"give the hub and all members the same hub\.keys"
    assert re.search(rf"hub.address: {router.address} refuses the connection: {reason}.*; {remedy}", message)
    assert router.poll(0.2) == []
    assert not router.send(b"stranger", [b"x"])
    good = Dealer(router.address, keys=keys / "hub", max_bytes=LIMIT)
    good.wait_connected(PATIENCE)
    stranger.close()
    good.close()


def test_a_lasting_refusal_raises_long_before_the_deadline(router: Router, keys: Path) -> None:
    stranger = Dealer(router.address, keys=unknown_client(keys), max_bytes=LIMIT)
    began = time.monotonic()
    with pytest.raises(HubError, match="refuses the connection"):
        stranger.wait_connected(10 * PATIENCE)
    assert time.monotonic() - began < PATIENCE
    with pytest.raises(HubError, match="refuses the connection"):
        stranger.check_refused()
    stranger.close()


def test_a_hub_without_keys_refuses_a_member_with_keys(keys: Path) -> None:
    router = Router("tcp://127.0.0.1:0", max_bytes=LIMIT)
    dealer = Dealer(router.address, keys=keys / "hub", max_bytes=LIMIT)
    assert "keys on one side only" in refusal(dealer)
    dealer.close()
    router.close()


def test_a_broken_handshake_is_no_refusal_once_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program may have the port for a moment before the hub starts, or a hub may end in mid-handshake."""
    monkeypatch.setattr("sgpo_async.transport.dealer.REFUSED_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        dealer = Dealer(address, max_bytes=LIMIT)
        other.accept()[0].close()
        assert "the handshake broke off" in refusal(dealer)
    error_with(dealer, "no hub answered")
    router = Router(address, max_bytes=LIMIT)
    dealer.wait_connected(PATIENCE)
    dealer.check_refused()
    dealer.close()
    router.close()


# ---- a key for each node


@pytest.fixture
def nodes(keys: Path, router: Router) -> Iterator[Callable[[str, bytes], Dealer]]:
    """Connects with the key of a node, which is made while the hub runs."""
    dealers = []

    def connect(node: str, identity: bytes) -> Dealer:
        new = not (keys / "hub" / f"actor-{node}.key").exists()
        if new:
            add_actors(keys / "hub", [node])
        deadline = time.monotonic() + PATIENCE
        while new and not router._admission.callback("*", public_key(keys / "hub", f"actor-{node}")):
            assert router.poll(0.1) == [] and time.monotonic() < deadline
        dealers.append(Dealer(router.address, identity=identity, keys=keys / "hub", name=node, max_bytes=LIMIT))
        return dealers[-1]

    yield connect
    for dealer in dealers:
        dealer.close()


def received(router: Router) -> list[tuple[bytes, list[bytes], bytes]]:
    """The next messages."""
    deadline = time.monotonic() + PATIENCE
    while not (messages := router.poll(0.2)):
        assert time.monotonic() < deadline
    return messages


def test_a_key_that_is_made_while_the_hub_runs_is_known_and_its_identities_are_its_own(
    router: Router, keys: Path, nodes: Callable[[str, bytes], Dealer]
) -> None:
    first = nodes("n1", GOOD)
    first.send([b"1"])
    key = public_key(keys / "hub", "actor-n1")
    assert received(router) == [(key + GOOD, [b"1"], key)]
    thief = nodes("n2", OTHER)
    thief.send([b"2"])
    own = public_key(keys / "hub", "actor-n2")
    assert received(router) == [(own + OTHER, [b"2"], own)]
    # It knows the identity of the first one, with all its random digits.
    with raw_dealer(router, keys / "hub", "actor-n2", first.identity) as raw:
        raw.send(b"as n1")
        deadline, expelled = time.monotonic() + PATIENCE, []
        while not expelled or first.connections < 2:
            assert router.poll(0.1) == [] and time.monotonic() < deadline
            first.poll(0.0)
            expelled += router.expelled()
        reason = "the key n2 was used with the identity of a member with another key"
        assert expelled == [(own, reason)]
        first.send([b"still n1"])
        assert received(router) == [(key + GOOD, [b"still n1"], key)]
        assert "it does not know this side's key" in refusal(nodes("n2", OTHER))


@contextmanager
def raw_dealer(router: Router, keys: Path, name: str, identity: bytes) -> Iterator[zmq.Socket]:
    """A connection under any identity."""
    socket = open_socket(zmq.DEALER, address=router.address, max_bytes=LIMIT)
    socket.curve_publickey, socket.curve_secretkey = key_pair(keys, name)
    socket.curve_serverkey = public_key(keys, "server")
    socket.routing_id = identity
    socket.connect(router.address)
    yield socket
    close_socket(socket, 0.0)


def test_who_has_a_revoked_key_is_expelled_and_does_not_come_in_again(
    router: Router, keys: Path, nodes: Callable[[str, bytes], Dealer]
) -> None:
    bad, good = nodes("bad", OTHER), nodes("good", GOOD)
    for dealer in (bad, good):
        dealer.send([b"1"])
        assert received(router)[0][0] == dealer.identity
    key = public_key(keys / "hub", "actor-bad")
    secret = (keys / "hub" / "actor-bad.key_secret").read_bytes()
    revoke(keys / "hub", "bad")
    deadline, expelled = time.monotonic() + PATIENCE, []
    while not expelled:
        assert router.poll(0.1) == [] and time.monotonic() < deadline
        expelled = router.expelled()
    assert expelled == [(key, "the key bad was revoked")] and router.expelled() == []
    while bad.identity not in router.gone():  # which leaves time to tell it why
        bad.send([b"2"])
        assert router.poll(0.1) == [] and time.monotonic() < deadline
    while bad.connected:  # it learns of the end of its connection later than the hub
        assert bad.poll(0.1) == [] and time.monotonic() < deadline
    assert "it does not know this side's key" in refusal(bad)
    good.send([b"3"])
    assert received(router) == [(good.identity, [b"3"], public_key(keys / "hub", "actor-good"))]
    (keys / "stolen").mkdir()
    shutil.copy(keys / "hub" / "server.key", keys / "stolen")
    (keys / "stolen" / "actor-bad.key_secret").write_bytes(secret)
    (keys / "stolen" / "actor-bad.key_secret").chmod(0o600)
    again = Dealer(router.address, keys=keys / "stolen", max_bytes=LIMIT)
    assert "it does not know this side's key" in refusal(again)
    again.close()


def test_who_floods_the_hub_is_expelled_and_the_others_messages_arrive() -> None:
    """The connection of the flooding process ends again and again; the other one's never."""
    router = Router("tcp://127.0.0.1:0", max_bytes=LIMIT, max_per_s=50)
    flood, good = (Dealer(router.address, identity=identity, max_bytes=LIMIT) for identity in (OTHER, GOOD))
    deadline, told, sent, arrived = time.monotonic() + PATIENCE, [], 0, []
    while not (told and flood.connections > 1 and len(arrived) == 200):
        assert time.monotonic() < deadline, (told, flood.connections, len(arrived))
        for _ in range(1000):
            flood.send([b"x" * 1000])
        if sent < 200:
            sent += good.send([b"%d" % sent])
        messages = router.poll(0.1)
        arrived += [frames for member, frames, _ in messages if member == GOOD]
        assert not told or all(member == GOOD for member, *_ in messages), "nothing of it is read any more"
        told += router.expelled()
        flood.poll(0.0)  # counts its connections
    assert arrived == [[b"%d" % number] for number in range(200)]
    assert told == [(OTHER, "more than hub.max_messages_per_s=50 messages a second for 10 s")]
    good.poll(0.0)
    assert good.connections == 1
    for end in (flood, good, router):
        end.close()


def test_a_message_that_comes_late_ends_no_connection_of_another_member(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own connection has ended, and another member's has the descriptor."""
    ended: list[int] = []
    monkeypatch.setattr("sgpo_async.transport.router.end_connection", ended.append)
    router = Router("tcp://127.0.0.1:0", max_bytes=LIMIT)
    dealer = Dealer(router.address, identity=OTHER, max_bytes=LIMIT)
    dealer.send([b"1"])
    assert received(router)[0][0] == OTHER
    [descriptor] = router._connections.members
    monkeypatch.setattr(router._admission, "admits", lambda *_: False)
    for owner in (GOOD, OTHER):
        router._connections.members[descriptor] = owner
        assert ended == [], "it is the other member's"
        dealer.send([b"2"])
        deadline = time.monotonic() + PATIENCE
        while not router.socket.poll(100):
            assert time.monotonic() < deadline
        assert router.poll(0.0) == []
    assert ended == [descriptor]
    dealer.close()
    router.close()


def test_ending_a_connection_leaves_its_descriptor_and_files_alone(tmp_path: Path) -> None:
    near, far = socket.socketpair()
    with near, far, (tmp_path / "file").open("w") as file:
        before = len(list(Path("/proc/self/fd").iterdir()))
        for descriptor in (near.fileno(), near.fileno(), file.fileno(), 10**6):
            end_connection(descriptor)
        assert far.recv(1) == b""
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        file.write("still open")

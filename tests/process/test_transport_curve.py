"""CURVE: the hub accepts the right keys, and refuses every other connection with the reason."""

import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sgpo_async.errors import HubError
from sgpo_async.transport import Dealer, Router, create_keys
from sgpo_async.transport.keys import public_key

pytestmark = pytest.mark.process

PATIENCE = 120.0
LIMIT = 2**20


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
    dealer = Dealer(router.address, identity=b"good", keys=folder, max_bytes=LIMIT)
    dealer.wait_connected(PATIENCE)
    dealer.send([b"hello", b"x" * 100_000])
    assert router.poll(PATIENCE) == [(b"good", [b"hello", b"x" * 100_000], public_key(keys / "hub", "actor"))]
    assert router.send(b"good", [b"welcome"])
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

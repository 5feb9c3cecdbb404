"""The road `sockets` within one process: calls that nobody waits for any more, and errors of the thread for events."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from sgpo_async.errors import SessionError
from sgpo_async.session.settings import Deadlines
from sgpo_async.session.socket_world import PART_BYTES, SocketClient, SocketServer

PATIENCE_S = 300.0
SECRET = bytes(32)


def bucket() -> tuple[torch.Tensor, bool]:
    return torch.ones(3 * PART_BYTES + 5, dtype=torch.uint8), True


def number() -> int:
    return 7


def unsendable() -> object:
    return {1, 2}


def unknown() -> None:
    """The receiver does not know this function."""


Pair = tuple[SocketServer, SocketClient]


@pytest.fixture
def pair() -> Iterator[Pair]:
    server = SocketServer(Deadlines(), secret=SECRET, from_peer=(bucket, number, unsendable))
    client = SocketClient(Deadlines(), secret=SECRET, from_peer=())
    client.reach("127.0.0.1", server.listen("127.0.0.1"))
    client.join()
    yield server, client
    server.call(unknown)  # ends the thread that asks for events
    end_of(client)


def end_of(client: SocketClient) -> str:
    """Why the session has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            client.check()
        except SessionError as error:
            return str(error)
        time.sleep(0.01)
    raise AssertionError("the session does not end")


def test_what_arrives_for_a_call_that_was_given_up_is_not_kept(pair: Pair) -> None:
    _, client = pair
    for _ in range(3):
        client.begin(bucket)  # and nobody waits for it
        data, is_delta = client.call(bucket)
        assert is_delta and torch.equal(data, bucket()[0])
    assert client.call(number) == 7
    assert not client._local.line._calls


def test_an_error_of_the_thread_for_events_ends_the_session(pair: Pair) -> None:
    server, client = pair
    server.call(unknown)
    assert end_of(client) == "events: internal error: KeyError('unknown')"


def test_an_answer_that_cannot_be_sent_is_an_error_of_its_call(pair: Pair) -> None:
    _, client = pair
    with pytest.raises(SessionError, match="^weight sender: unsendable: internal error: TypeError"):
        client.call(unsendable)
    assert client.call(number) == 7


@pytest.mark.parametrize("frames", [[b"\x07"], [b"\xc1"], [b"\x93\x00\xa6number\x90", b"more"]])
def test_a_message_that_is_no_call_is_told(pair: Pair, frames: list[bytes], capfd: pytest.CaptureFixture[str]) -> None:
    _, client = pair
    assert client.call(number) == 7
    client._local.line._socket.send_multipart(frames)
    assert client.call(number) == 7
    told, deadline = "", time.monotonic() + PATIENCE_S
    while "Traceback" not in told and time.monotonic() < deadline:
        time.sleep(0.01)
        told += capfd.readouterr().err
    assert "Traceback" in told

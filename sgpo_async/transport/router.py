"""The hub's ZeroMQ endpoint.

    Dealer ─┐                     ┌─ poll() ─▶ (member, frames, key)   what `Admission` lets through
    Dealer ─┼─ TCP ─▶ ROUTER ─────┼─ gone() ─▶ members whose connection has ended
    Dealer ─┘         ▲           ├─ expelled() ─▶ keys that were revoked, members that send too much
                      │           └─ send(member, frames) ─▶ one member's queue, or False
                      └─ authenticator thread: answers "is this key known?" during handshakes

Only `poll` waits (for a message) and `close` (until queued frames are sent), both at most for a given time. When a
member reconnects with the same identity, the new connection replaces the old one. Otherwise the hub could keep a dead
connection for minutes, e.g. after a power loss, and ignore the member during this time.

ZeroMQ names the connection of each message, and the connections that begin and end, by their descriptors; so the end of
a killed member's connection is known at once, and the connection of a process that may not send can be ended. Messages
may be read after the end of their connection, when another one may have its descriptor (`Connections`).
"""

from __future__ import annotations

import contextlib
import socket as network
from collections.abc import Sequence
from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from sgpo_async.errors import HubError
from sgpo_async.transport.admission import Admission, KnownKeys
from sgpo_async.transport.base import Frames
from sgpo_async.transport.keys import key_pair
from sgpo_async.transport.sockets import close_socket, drain, numeric, offer, open_socket, receive


class Connections:
    """Whose the open connections are, by their descriptors, and whose connections have ended.

    ZeroMQ tells of a connection's beginning before its first message can be read, and of its end as soon as that
    happens, when messages of it may still wait to be read. So beginnings and ends are told here before the messages
    that were read by then.
    """

    def __init__(self) -> None:
        self.members: dict[int, bytes] = {}
        self._open: set[int] = set()
        self._earlier: dict[int, set[bytes]] = {}  # whose descriptor this was, as long as messages of them may follow
        self._gone: list[bytes] = []

    def begin(self, descriptor: int) -> None:
        """A connection has begun; one that another has replaced has ended without a word."""
        self.end(descriptor)
        self._open.add(descriptor)

    def end(self, descriptor: int) -> None:
        """A connection has ended, if there was one."""
        self._open.discard(descriptor)
        member = self.members.pop(descriptor, None)
        if member is not None:
            self._lost(member, descriptor)

    def message(self, descriptor: int, member: bytes) -> None:
        """A message of `member` was read, over the connection that has this descriptor, or that had it."""
        present = self.members.get(descriptor)
        if present == member or member.startswith(b"\0"):  # the rest of a connection that another has replaced
            return
        if descriptor not in self._open:
            self._gone.append(member)
        elif present is None:
            self.members[descriptor] = member
        elif member not in self._earlier.get(descriptor, ()):
            # The present member's messages came late: its connection had ended before this one began.
            self._lost(present, descriptor)
            self.members[descriptor] = member

    def all_read(self) -> None:
        """No message waits to be read."""
        self._earlier.clear()

    def gone(self) -> list[bytes]:
        """The members whose connection has ended since the last call, and that have sent nothing over another one."""
        connected = set(self.members.values())
        gone, self._gone = dict.fromkeys(member for member in self._gone if member not in connected), []
        return list(gone)

    def _lost(self, member: bytes, descriptor: int) -> None:
        self._gone.append(member)
        self._earlier.setdefault(descriptor, set()).add(member)


class Router:
    """ROUTER socket bound to `address`; port 0 takes a free one. Implements `RouterEnd`.

    `keys` is the folder that `create_keys` filled; without keys the hub accepts every connection. With keys, `poll`
    says of every message with which public key its connection was authenticated. A member may send `max_per_s` messages
    a second (0: any number).
    `socket` is for a `zmq.Poller` that also waits for other events.

    Raises:
        HubError: the address is in use or not an address of this machine, or a key file cannot be read.
    """

    def __init__(self, address: str, *, keys: str | Path = "", max_bytes: int, max_per_s: int = 0) -> None:
        self.max_bytes = max_bytes
        self.socket = open_socket(zmq.ROUTER, address=address, max_bytes=max_bytes)
        self._authenticator: ThreadAuthenticator | None = None
        self._monitor = self.socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._connections = Connections()
        self._read: list[tuple[int, bytes]] = []  # descriptor and member of each message that was read just now
        try:
            if keys:
                self.socket.curve_publickey, self.socket.curve_secretkey = key_pair(keys, "server")
            self._admission = Admission(KnownKeys(keys) if keys else None, max_per_s)
            self.socket.router_mandatory = True
            self.socket.router_handover = True
            if keys:
                self._authenticator = authenticate(self.socket, self._admission)
            self.address = bind(self.socket, address)
        except BaseException:
            self.close()
            raise

    def poll(self, timeout_s: float) -> list[tuple[bytes, Frames, bytes]]:
        self._admission.look()
        messages = drain(self.socket, timeout_s, self.max_bytes, self._receive)
        self._watch()
        if not self.socket.poll(0):
            self._connections.all_read()
        return [(member, frames, key) for key, member, *frames in messages if member]

    def gone(self) -> list[bytes]:
        self._watch()
        return self._connections.gone()

    def expelled(self) -> list[tuple[bytes, str]]:
        return self._admission.expelled()

    def send(self, member: bytes, frames: Sequence[bytes]) -> bool:
        return offer(self.socket, [member, *frames])

    def close(self, linger_s: float = 0.0) -> None:
        if self.socket.closed:
            return
        if self._authenticator:
            self._authenticator.stop()
        self.socket.disable_monitor()
        self._monitor.close()
        close_socket(self.socket, linger_s)

    def _receive(self, socket: zmq.Socket) -> Frames:
        """One message, after its sender's public key (Z85; b"" without keys) and identity, which is empty if it may not
        send this. Raises zmq.Again if there is none.

        ZeroMQ attaches the key to each message of the connection, as the authenticator has named it (RFC 27, User-Id).
        So it holds also for a message under the identity of another member.
        """
        identity = socket.recv(zmq.DONTWAIT, copy=False)
        member, connection = identity.bytes, identity.get(zmq.SRCFD)
        key = str(identity["User-Id"]).encode() if self._authenticator else b""
        frames = receive(socket)
        if self._admission.admits(member, key, sum(map(len, frames))):
            self._read.append((connection, member))
            return [key, member, *frames]
        # A message may be read after the end of its connection, when another member's has the same descriptor.
        if not self._admission.is_hopeless(member):
            return [b"", b""]
        self._watch()
        members = self._connections.members
        if members.get(connection, member) == member:
            # Also that of the member whose identity this process has used, and with it its place: it connects again.
            for ended in {connection, *(other for other, held in members.items() if held == member)}:
                end_connection(ended)
        return [b"", b""]

    def _watch(self) -> None:
        while self._monitor.poll(0):
            found = recv_monitor_message(self._monitor)
            accepted = found["event"] == zmq.EVENT_ACCEPTED
            (self._connections.begin if accepted else self._connections.end)(found["value"])
        read, self._read = self._read, []
        for descriptor, member in read:
            self._connections.message(descriptor, member)


def authenticate(socket: zmq.Socket, admission: Admission) -> ThreadAuthenticator:
    """Accept only connections that hold the secret key of the learner or of an actor."""
    socket.curve_server = True
    authenticator = ThreadAuthenticator(socket.context)
    authenticator.start()
    authenticator.configure_curve_callback(domain="*", credentials_provider=admission)
    return authenticator


def end_connection(descriptor: int) -> None:
    """End the connection with this descriptor, which belongs to ZeroMQ: it sees the end and closes it.

    Should ZeroMQ have closed it just now, and another connection have its number, that member connects again. Nothing
    happens if the number is that of a file.
    """
    with contextlib.suppress(OSError):
        connection = network.socket(fileno=descriptor)
        try:
            connection.shutdown(network.SHUT_RDWR)
        finally:
            connection.detach()  # else Python would close it


def bind(socket: zmq.Socket, address: str) -> str:
    """Bind and return the address with the actual port."""
    try:
        socket.bind(numeric(address))
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            raise HubError(
                f"hub.address: {address} is in use; stop the other process or choose another port"
            ) from error
        raise HubError(
            f"hub.address: cannot listen at {address} ({error.strerror}); choose an address of this machine"
        ) from error
    return socket.get_string(zmq.LAST_ENDPOINT)

"""A member's ZeroMQ endpoint.

    send(frames) ─▶ queue ─▶ DEALER ─ TCP ─▶ the hub's Router
    poll() ◀─ frames ◀────── DEALER
      └─ also reads the events of the socket's monitor: connected, disconnected, refused

ZeroMQ connects in the background, and reconnects after every disconnection, with short pauses between two attempts.
`connections` counts the successful handshakes: when it grows, messages sent before may be lost.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import zmq
from zmq.utils.monitor import recv_monitor_message

from sgpo_async.errors import HubError
from sgpo_async.transport.base import RANDOM_BYTES, Frames
from sgpo_async.transport.keys import Role, actor_pair, key_pair, public_key
from sgpo_async.transport.sockets import close_socket, drain, offer, open_socket

RECONNECT_MS = (100, 2000)  # first and longest pause between two attempts
REFUSED_S = 5.0  # a hub that ends in mid-handshake looks like a refusal; after this long it is a refusal
REFUSALS: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "it does not know this side's key",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "keys on one side only, or it is not a hub",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake broke off: wrong server.key, or keys on one side only",
}
UNHEARD = zmq.EVENT_CLOSED  # an attempt to connect has failed: nothing listens there
WATCHED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | UNHEARD | sum(REFUSALS)


class Dealer:
    """DEALER socket connected to `address`. Implements `DealerEnd`.

    The hub's Router knows this member by `identity`, also after a reconnection; by default it is random. With keys it
    begins with the public key: the hub accepts it from no other key. `role` says which key of the folder `keys` it
    takes, for an actor also `name`, if there are several (`keys.actor_pair`).
    `socket` is for a `zmq.Poller` that also waits for other events.

    Raises:
        HubError: a key file cannot be read.
    """

    def __init__(
        self,
        address: str,
        *,
        identity: bytes | None = None,
        keys: str | Path = "",
        role: Role = "actor",
        name: str = "watch",
        max_bytes: int,
    ) -> None:
        self.address = address
        self.identity = identity or secrets.token_hex(RANDOM_BYTES // 2).encode()
        self.max_bytes = max_bytes
        self.connections = 0
        self.connected = False
        self._refusal, self._refused_at = "", 0.0
        self.socket = open_socket(zmq.DEALER, address=address, max_bytes=max_bytes)
        self._monitor = self.socket.get_monitor_socket(WATCHED)
        try:
            self.socket.reconnect_ivl, self.socket.reconnect_ivl_max = RECONNECT_MS
            if keys:
                public, secret = actor_pair(keys, name) if role == "actor" else key_pair(keys, role)
                self.socket.curve_publickey, self.socket.curve_secretkey = public, secret
                self.socket.curve_serverkey = public_key(keys, "server")
                self.identity = public + self.identity
            self.socket.routing_id = self.identity
            self.socket.connect(address)
        except BaseException:
            self.close()
            raise

    def poll(self, timeout_s: float) -> list[Frames]:
        received = drain(self.socket, timeout_s, self.max_bytes)
        self._watch()
        return received

    def send(self, frames: Sequence[bytes]) -> bool:
        return offer(self.socket, frames)

    def wait_connected(self, timeout_s: float) -> None:
        """Return when the hub has accepted the connection.

        Raises:
            HubError: the hub does not accept it within `timeout_s`, or has refused it for `REFUSED_S`.
        """
        deadline = time.monotonic() + timeout_s
        self._watch()
        while not self.connected and (left := deadline - time.monotonic()) > 0:
            self._monitor.poll(math.ceil(min(left, REFUSED_S) * 1000))
            self._watch()
            self.check_refused()
        if not self.connected:
            if self._refusal:
                raise self._refused()
            raise HubError(
                f"hub.address: no hub answered at {self.address} within {timeout_s:g} s; "
                "check that it is running and that the network lets the port through"
            )

    def check_refused(self) -> None:
        """Raise HubError if the hub has refused this side's handshakes for `REFUSED_S`."""
        if self._refusal and time.monotonic() - self._refused_at > REFUSED_S:
            raise self._refused()

    def _refused(self) -> HubError:
        return HubError(
            f"hub.address: {self.address} refuses the connection: {self._refusal}; "
            "give the hub and all members the same hub.keys"
        )

    def close(self, linger_s: float = 0.0) -> None:
        if self.socket.closed:
            return
        self.socket.disable_monitor()
        self._monitor.close()
        close_socket(self.socket, linger_s)

    def _watch(self) -> None:
        """Process the events of the monitor since the last call."""
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            self.connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self.connections += self.connected
            refusal = "" if self.connected or event == UNHEARD else REFUSALS.get(event, self._refusal)
            if refusal and not self._refusal:
                self._refused_at = time.monotonic()
            self._refusal = refusal

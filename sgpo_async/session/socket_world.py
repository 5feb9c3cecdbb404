"""A session over connections that only the weight receiver opens, for nodes that nobody can connect to (NAT).

    weight receiver                                    weight sender
    DEALER, one for each thread ── call ──▶            ROUTER, one port; threads execute the calls
                                ◀── answer, in parts ──
    DEALER, events              ── more? ──▶           what it has to say, or nothing after a second

The two classes have the interface of `session.rpc_world.RpcWorld`, whose processes connect to each other. Both sides
compute their CURVE keys from the session's secret (RFC 26). Only who knows it can make the handshake, because the
sender's public key is told to nobody, and all that follows is encrypted. Messages are MessagePack and name one of the
functions that the peer may call; nothing is unpickled.

A bucket is sent in parts, so that on a slow line something arrives all the time: a call fails when for its timeout
nothing has.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import torch
import zmq
import zmq.utils.z85

from sgpo_async.config.rules import url_host
from sgpo_async.errors import SessionError
from sgpo_async.session.messages import Request, Response
from sgpo_async.session.secret import tag
from sgpo_async.session.settings import Deadlines

PART_BYTES = 2**20
EVENTS_S = 1.0  # how long a question for events waits for one
_THREADS = 8  # of the weight sender: one waits for events, four serve the buckets in flight
_DONE = "inproc://done"

Functions = Sequence[Callable[..., Any]]


class SocketServer:
    """The weight sender's side: executes the receiver's calls, and says what it has to say when it is asked."""

    def __init__(self, deadlines: Deadlines, *, secret: bytes, from_peer: Functions) -> None:
        """The peer must know the session's `secret`; `from_peer`: functions that it may call."""
        self._silence_s = deadlines.heartbeat_s + deadlines.call_s
        self._functions: dict[str, Callable[..., Any]] = {f.__name__: f for f in from_peer} | {"events": self._events}
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.sndhwm = 0  # what the receiver has asked for is not dropped; it asks for few buckets at a time
        self._router.curve_server, self._router.curve_secretkey = True, _key(secret, b"weight sender")
        self._outbox: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._workers, self._local = ThreadPoolExecutor(_THREADS, "call"), threading.local()
        self._asked, self._asked_at = threading.Event(), 0.0

    def listen(self, host: str) -> int:
        """Listen at a free port of `host`; return the port."""
        port = self._router.bind_to_random_port(f"tcp://{url_host(host)}")
        done = self._context.socket(zmq.PULL)
        done.bind(_DONE)
        threading.Thread(target=self._run, args=(done,), name="world", daemon=True).start()
        return int(port)

    def join(self) -> None:
        """Wait for the receiver; the caller enforces the deadline."""
        self._asked.wait()

    def call(self, function: Callable[..., None], *args: Any) -> None:
        """Let the receiver execute `function`, which has no result, when it asks for events next."""
        self._outbox.put([function.__name__, [_plain(arg) for arg in args]])

    def check(self) -> None:
        """Raise SessionError if the receiver has not asked for events for too long."""
        if time.monotonic() - self._asked_at > self._silence_s:
            raise SessionError(f"heartbeat: the weight receiver did not answer within {self._silence_s:g} s")

    def _events(self) -> list[Any]:
        self._asked_at = time.monotonic()
        self._asked.set()
        found = []
        try:
            found.append(self._outbox.get(timeout=EVENTS_S))
            while True:
                found.append(self._outbox.get_nowait())
        except queue.Empty:
            return found

    def _run(self, done: zmq.Socket[bytes]) -> None:
        """Hand calls to the workers and send what they return. This thread alone uses the ROUTER."""
        poller = zmq.Poller()
        for socket in (self._router, done):
            poller.register(socket, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._router in ready:
                self._workers.submit(self._execute, *self._router.recv_multipart())
            if done in ready:
                self._router.send_multipart(done.recv_multipart(copy=False), copy=False)

    def _execute(self, identity: bytes, *frames: bytes) -> None:
        """Answer a call. Nobody reads the future of this, so every error is told here, and to the peer."""
        id, name = None, "a message that is no call"
        try:
            (message,) = frames
            id, name, args = msgpack.unpackb(message)
            for header, data in _answer(self._functions[name](*(_restored(arg) for arg in args))):
                self._send(identity, id, header, data)
        except Exception as error:
            traceback.print_exc()
            self._send(identity, id, ["error", f"{name}: internal error: {error!r}"], b"")

    def _send(self, identity: bytes, id: Any, header: list[Any], data: bytes | memoryview) -> None:
        if not hasattr(self._local, "done"):
            self._local.done = self._context.socket(zmq.PUSH)
            self._local.done.sndhwm = 0
            self._local.done.connect(_DONE)
        self._local.done.send_multipart([identity, msgpack.packb([id, *header]), data], copy=False)


class SocketClient:
    """The weight receiver's side. A call must be waited for in the thread that has begun it."""

    def __init__(self, deadlines: Deadlines, *, secret: bytes, from_peer: Functions) -> None:
        """The peer must know the session's `secret`; `from_peer`: functions that it may let this process execute."""
        self._deadlines, self._secret = deadlines, secret
        self._functions = {function.__name__: function for function in from_peer}
        self._context, self._local = zmq.Context(), threading.local()
        self._address = ""
        self._reason = ""  # why the session is over
        self._joined = threading.Event()

    def reach(self, host: str, port: int) -> None:
        """The peer listens there."""
        self._address = f"tcp://{url_host(host)}:{port}"

    def join(self) -> None:
        """Wait for the first answer; the caller enforces the deadline."""
        threading.Thread(target=self._listen, name="events", daemon=True).start()
        self._joined.wait()
        self.check()

    def begin(self, function: Callable[..., Any], *args: Any) -> SocketCall:
        """Call `function` on the peer without waiting. Raises SessionError if the session is over."""
        self.check()
        if not hasattr(self._local, "line"):
            self._local.line = Line(self._connected(), self._deadlines.call_s)
        line: Line = self._local.line
        return line.begin(function.__name__, [_plain(arg) for arg in args])

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` on the peer and wait for the answer. Raises SessionError if there is none."""
        return self.begin(function, *args).wait()

    def check(self) -> None:
        """Raise SessionError if the peer has answered no question for events in time."""
        if self._reason:
            raise SessionError(self._reason)

    def _listen(self) -> None:
        """Ask for events, and execute them."""
        line = Line(self._connected(), self._deadlines.heartbeat_s + self._deadlines.call_s)
        try:
            while True:
                for name, args in line.begin("events", []).wait():
                    self._functions[name](*(_restored(arg) for arg in args))
                self._joined.set()
        except SessionError as error:
            self._reason = str(error)
        except Exception as error:
            traceback.print_exc()
            self._reason = f"events: internal error: {error!r}"
        self._joined.set()

    def _connected(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.curve_serverkey = zmq.curve_public(_key(self._secret, b"weight sender"))
        socket.curve_secretkey = own = _key(self._secret, b"weight receiver")
        socket.curve_publickey = zmq.curve_public(own)
        socket.connect(self._address)
        return socket


class Line:
    """One connection to the weight sender, used by one thread."""

    def __init__(self, socket: zmq.Socket[bytes], seconds: float) -> None:
        """A call fails when nothing has arrived for `seconds`."""
        self._socket, self._seconds = socket, seconds
        self._ids = itertools.count()
        # Nobody waits for a call that was given up: what arrives for it is dropped.
        self._calls: weakref.WeakValueDictionary[int, SocketCall] = weakref.WeakValueDictionary()

    def begin(self, name: str, args: list[Any]) -> SocketCall:
        """Send a call."""
        id = next(self._ids)
        self._calls[id] = call = SocketCall(self, name)
        self._socket.send(msgpack.packb([id, name, args]))
        return call

    def receive(self, name: str) -> None:
        """Wait for the next part of an answer, to any call. Raises SessionError, which names this call."""
        if not self._socket.poll(round(self._seconds * 1000)):
            raise SessionError(f"{name}: the weight sender did not answer within {self._seconds:g} s")
        header, data = self._socket.recv_multipart(copy=False)
        id, *answer = msgpack.unpackb(header.buffer)
        if call := self._calls.get(id):
            call.take(*answer, data=data.buffer)


class SocketCall:
    """One call that is in flight."""

    def __init__(self, line: Line, name: str) -> None:
        self._line, self._name = line, name
        self._parts = bytearray()
        self._answer: tuple[str, Any] | None = None  # "value" or "error", and which

    def wait(self) -> Any:
        """Return the answer. Raises SessionError if nothing arrives in time."""
        while self._answer is None:
            self._line.receive(self._name)
        kind, value = self._answer
        if kind == "error":
            raise SessionError(f"weight sender: {value}")
        return value

    def take(self, kind: str, *values: Any, data: memoryview) -> None:
        """Take a part of the answer."""
        if kind != "part":
            (value,) = values
            self._answer = kind, value
            return
        is_delta, size = values
        self._parts += data
        if len(self._parts) == size:
            self._answer = "value", (torch.frombuffer(self._parts, dtype=torch.uint8), is_delta)


def _answer(value: Any) -> Iterator[tuple[list[Any], bytes | memoryview]]:
    """The headers and bytes of the messages that carry this result: of a bucket, or a plain value."""
    if not isinstance(value, tuple):
        yield ["value", value], b""
        return
    tensor, is_delta = value
    data = tensor.numpy().data
    for start in range(0, len(data), PART_BYTES):
        yield ["part", is_delta, len(data)], data[start : start + PART_BYTES]


def _plain(value: Any) -> Any:
    return [type(value).__name__, dataclasses.asdict(value)] if isinstance(value, Request | Response) else value


def _restored(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    kind, fields = value
    return {"Request": Request, "Response": Response}[kind](**fields)


def _key(secret: bytes, owner: bytes) -> bytes:
    """The secret CURVE key of one of the two processes, in Z85."""
    return zmq.utils.z85.encode(tag(secret, b"CURVE key", owner))

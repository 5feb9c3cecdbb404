"""Functions of both Router and Dealer: socket options, addresses, receiving in bounded batches, closing."""

from __future__ import annotations

import math
import socket as network
from collections.abc import Callable, Sequence

import zmq
import zmq.backend

from sgpo_async.errors import HubError
from sgpo_async.transport.base import BATCH, HIGH_WATER, Frames

# As plain integers, because an operation with pyzmq's flags takes longer than to send a frame; and without the layer of
# `zmq.Socket` for kinds of sockets that are not used here.
_DONTWAIT, _MORE = int(zmq.DONTWAIT), int(zmq.DONTWAIT | zmq.SNDMORE)
_send = zmq.backend.Socket.send
CUT_FACTOR = 4  # ZeroMQ does not receive a frame larger than this times max_bytes, but drops the connection


def open_socket(kind: zmq.SocketType, *, address: str, max_bytes: int) -> zmq.Socket:
    """A socket in its own context, with bounded queues; closing it discards the queued messages.

    The codec rejects and counts a message larger than `max_bytes`. ZeroMQ's own limit is higher, because ZeroMQ can
    only drop the sender's connection. Neither limit stops a peer that never ends a multipart message; only keys keep
    it out.
    """
    socket = zmq.Context(io_threads=1).socket(kind)
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = HIGH_WATER
    socket.maxmsgsize = CUT_FACTOR * max_bytes
    socket.ipv6 = address.startswith("tcp://[")
    return socket


def numeric(address: str) -> str:
    """`tcp://HOST:PORT` with the host as an IP address, because ZeroMQ cannot bind to a host name.

    Raises:
        HubError: the name cannot be resolved.
    """
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if host == "*" or host.startswith("["):
        return address
    try:
        return f"tcp://{network.gethostbyname(host)}:{port}"
    except OSError as error:
        raise HubError(f"hub.address: host {host} in {address} is unknown ({error.strerror})") from error


def receive(socket: zmq.Socket) -> Frames:
    """One message. Raises zmq.Again if there is none."""
    frame = socket.recv(_DONTWAIT, False)
    frames = [frame.bytes]
    while frame.more:  # cheaper than to ask the socket for RCVMORE, as `recv_multipart` does
        frame = socket.recv(_DONTWAIT, False)
        frames.append(frame.bytes)
    return frames


def drain(
    socket: zmq.Socket, timeout_s: float, max_bytes: int, take: Callable[[zmq.Socket], Frames] = receive
) -> list[Frames]:
    """The messages that have arrived, until `BATCH` or `max_bytes` is reached; waits for the first one."""
    received: list[Frames] = []
    if not socket.poll(math.ceil(timeout_s * 1000)):
        return received
    size = 0
    while len(received) < BATCH and size <= max_bytes:
        try:
            frames = take(socket)
        except zmq.Again:
            break
        received.append(frames)
        size += sum(map(len, frames))
    return received


def offer(socket: zmq.Socket, frames: Sequence[bytes]) -> bool:
    """Queue a message without waiting; False if its peer is not connected or the peer's queue is full."""
    *first, last = frames
    try:
        for frame in first:
            _send(socket, frame, _MORE)
        _send(socket, last, _DONTWAIT)
    except zmq.Again:
        return False
    except zmq.ZMQError as error:
        if error.errno == zmq.EHOSTUNREACH:
            return False
        raise
    return True


def close_socket(socket: zmq.Socket, linger_s: float) -> None:
    """Close a socket and its context; returns when its queue is empty, or after `linger_s`."""
    socket.close(linger=math.ceil(linger_s * 1000))
    socket.context.term()

"""One setting of `sgpo-async bench transport`: producer processes, and a consumer.

    python -m sgpo_async.bench.worker_transport SETTING TOKENS PRODUCERS SEED

For each line on standard input, which begins with a number of seconds, it prints a line with the rollouts per second
that arrived. Between two lines nothing moves: the consumer reads nothing, and so the producers wait.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import msgpack
import numpy as np
import zmq

from sgpo_async.bench.hub_ingest import MAX_BYTES, SPAWN, HubIngest, rollout_of
from sgpo_async.transport import Dealer, Mailbox, Router, RouterMailbox
from sgpo_async.wire import encode
from sgpo_async.wire import records as wire

WINDOW = 512  # rollouts of one producer that are sent and not acknowledged
POLL_S = 0.01
ACK = encode(wire.Ack(task=1234, attempt=0, slot=7))

Send = Callable[[], object]


class Setting(Protocol):
    """What is measured."""

    def measure(self, seconds: float) -> float:
        """Rollouts per second that arrive at the consumer."""
        ...

    def close(self) -> None:
        """End all processes."""
        ...


class Stream:
    """Producers that send to a consumer in this process."""

    def __init__(self, name: str, *, tokens: int, producers: int, seed: int) -> None:
        self._take, address = CONSUMERS[name]()
        acknowledged = name != "zeromq, no acks"
        pipes = [SPAWN.Pipe() for _ in range(producers)]
        arguments = [(name, address, tokens, seed + i, acknowledged, pipe[1]) for i, pipe in enumerate(pipes)]
        self._processes = [SPAWN.Process(target=produce, args=args, daemon=True) for args in arguments]
        for process in self._processes:
            process.start()
        for ours, _ in pipes:
            ours.recv()  # it is about to send

    def measure(self, seconds: float) -> float:
        taken, began = 0, time.monotonic()
        until = began + seconds
        while (now := time.monotonic()) < until:
            taken += self._take()
        return taken / (now - began)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


# ---- producers


def produce(name: str, address: str, tokens: int, seed: int, acknowledged: bool, parent: Connection) -> None:
    """Send for ever, or at most WINDOW rollouts that are not acknowledged."""
    dealer = Dealer(address, max_bytes=MAX_BYTES)
    dealer.wait_connected(60.0)
    send = PRODUCERS[name](dealer, rollout_of(tokens, seed))
    parent.send(None)
    if not acknowledged:
        while True:
            send()
    in_flight = 0
    while True:
        while in_flight < WINDOW:
            send()
            in_flight += 1
        in_flight -= len(dealer.poll(POLL_S))


def send_frames(dealer: Dealer, rollout: wire.Rollout) -> Send:
    """The same prepared frames each time, by pyzmq alone."""
    frames = encode(rollout)
    return lambda: dealer.socket.send_multipart(frames)


def send_record(dealer: Dealer, rollout: wire.Rollout) -> Send:
    """A record, which is encoded each time."""
    mailbox = Mailbox(dealer)

    def send() -> None:
        mailbox.send(rollout)

    return send


def send_lists(dealer: Dealer, rollout: wire.Rollout) -> Send:
    """A MessagePack map in which arrays are lists, which is encoded each time."""
    fields = {name: getattr(rollout, name) for name in wire.Rollout.__dataclass_fields__}

    def send() -> None:
        plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}
        dealer.socket.send(msgpack.packb(plain))

    return send


PRODUCERS: dict[str, Callable[[Dealer, wire.Rollout], Send]] = {
    "zeromq, no acks": send_frames,
    "zeromq": send_frames,
    "records": send_frames,
    "arrays to records": send_record,
    "msgpack lists": send_lists,
}

# ---- consumers: each returns a function that takes what has arrived and returns how many, and its address

Consumer = tuple[Callable[[], int], str]


def take_frames(*, acknowledge: bool) -> Consumer:
    """Frames by pyzmq alone."""
    router = Router("tcp://127.0.0.1:0", max_bytes=MAX_BYTES)
    socket = router.socket
    socket.rcvtimeo = int(POLL_S * 1000)

    def take() -> int:
        try:
            member = socket.recv_multipart()[0]
        except zmq.Again:
            return 0
        if acknowledge:
            socket.send_multipart([member, *ACK])
        return 1

    return take, router.address


def take_records() -> Consumer:
    """Decoded records, by the hub's mailbox."""
    router = Router("tcp://127.0.0.1:0", max_bytes=MAX_BYTES)
    mailbox = RouterMailbox(router)

    def take() -> int:
        received = mailbox.receive_mail(POLL_S)
        for member, message, *_ in received:
            assert isinstance(message, wire.Rollout)
            mailbox.send(member, wire.Ack(task=message.task, attempt=message.attempt, slot=message.slot))
        return len(received)

    return take, router.address


def take_lists() -> Consumer:
    """MessagePack maps whose lists are made arrays."""
    router = Router("tcp://127.0.0.1:0", max_bytes=MAX_BYTES)
    socket = router.socket
    socket.rcvtimeo = int(POLL_S * 1000)
    dtypes = {"logprobs": np.float32, "digests": np.int64}

    def take() -> int:
        try:
            member, body = socket.recv_multipart()
        except zmq.Again:
            return 0
        plain = msgpack.unpackb(body)
        arrays = {
            name: np.array(value, dtypes.get(name, np.int32)) for name, value in plain.items() if type(value) is list
        }
        assert len(arrays["tokens"]) == len(arrays["logprobs"])
        socket.send_multipart([member, *ACK])
        return 1

    return take, router.address


CONSUMERS: dict[str, Callable[[], Consumer]] = {
    "zeromq, no acks": lambda: take_frames(acknowledge=False),
    "zeromq": lambda: take_frames(acknowledge=True),
    "records": take_records,
    "arrays to records": take_records,
    "msgpack lists": take_lists,
}


def main(name: str, tokens: str, producers: str, seed: str) -> int:
    """Measure once for each line on standard input."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    sizes = {"tokens": int(tokens), "producers": int(producers), "seed": int(seed)}
    with tempfile.TemporaryDirectory(prefix="sgpo-bench-") as folder:
        setting: Setting
        if name in ("hub", "hub, journal"):
            setting = HubIngest(Path(folder), journal=name == "hub, journal", **sizes)
        else:
            setting = Stream(name, **sizes)
        try:
            for line in sys.stdin:
                print(setting.measure(float(line.split()[0])), flush=True)
        finally:
            setting.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))

"""One node of the bench of a fleet (`bench.fleet`): the learner's publications, or an actor without an engine.

    publish HUB KEYS MB              publishes a version for each line on standard input
    receive HUB KEYS NAME DELTAS     an actor that only receives and passes on weights

Each prints a line of JSON for what happens to it: a publication, a version that arrived.
"""

from __future__ import annotations

import json
import os
import select
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

from sgpo_async.actor.membership import Membership
from sgpo_async.actor.senders import Senders
from sgpo_async.config.rules import endpoint_of
from sgpo_async.errors import DeadlineExceeded
from sgpo_async.session import ReceiverDown, VersionReceived, WeightReceiver, WeightSender
from sgpo_async.session.interface import address_towards
from sgpo_async.session.settings import Deltas
from sgpo_async.transport import Dealer, Mailbox
from sgpo_async.weights import StoreFile, StoreWriter
from sgpo_async.weights.short_digest import short_digest
from sgpo_async.wire import records as wire

TIMEOUT_S = 600.0
HEARTBEAT_S = 1.0
WAIT_S = 0.01
MAX_BYTES = 2**29
BUCKETS = 64  # per version: as for 1 GB of weights in the usual buckets


def publish(mailbox: Mailbox, mbytes: int) -> None:
    """Join as the only rank of a learner; publish a version for each line of standard input, until it ends."""
    from sgpo_async.bench.random_words import RandomWords

    mailbox.send(wire.Hello(role="learner", name="learner-0"))
    welcome = _wait(mailbox, wire.Welcome)
    writer = StoreWriter(welcome.store, bucket_bytes=mbytes * 2**20 // BUCKETS)
    model = RandomWords(mbytes)
    _report(event="ready")
    beat = 0.0
    for version in _lines(mailbox):
        if version is None:
            if time.monotonic() - beat > HEARTBEAT_S:
                beat = time.monotonic()
                mailbox.send(wire.Heartbeat())
            continue
        tensors = model.next()
        began = time.time()
        manifest = writer.publish(version, tensors)
        digest = short_digest(manifest.digest)
        mailbox.send(wire.Published(version=version, digest=digest, store=welcome.store))
        _report(event="published", version=version, at=began, visible=time.time())
    mailbox.send(wire.Goodbye(reason="done"))


def receive(mailbox: Mailbox, name: str, host: str, deltas: Deltas) -> None:
    """Join as an actor, report the versions that arrive, and serve whom the hub says, until the run is over."""
    store = StoreFile(tempfile.gettempdir())

    def start() -> WeightReceiver:
        return WeightReceiver(name, store=store.path, deltas=deltas)

    hello = wire.Hello(role="actor", name=name, serves=True)
    membership = Membership(mailbox, hello, node=start(), start_node=start, timeout_s=TIMEOUT_S)
    senders = Senders(lambda other, road: WeightSender(store.path, other, address_towards(host), road=road))
    newest, beat = -1, 0.0
    while True:
        membership.advance([])
        for message in mailbox.receive(WAIT_S):
            match message:
                case wire.Welcome():
                    membership.welcomed(message)
                    _report(event="joined", source=message.source)
                case wire.Refused():
                    membership.refused(message)
                case wire.OpenSender():
                    senders.open(message)
                case wire.CloseSender(sender=sender):
                    senders.close(sender)
                case wire.Stop():
                    senders.close_all()
                    membership.close()
                    return
        for event in membership.node_events():
            if isinstance(event, VersionReceived):
                newest = event.version
                _report(event="received", version=newest, at=time.time(), bytes=event.received, digest=event.digest)
            elif isinstance(event, ReceiverDown):
                _report(event="lost", reason=event.reason)
                membership.session_down(event.reason)
        for found in senders.poll():
            mailbox.send(found)
        if time.monotonic() - beat > HEARTBEAT_S:
            beat = time.monotonic()
            mailbox.send(wire.Heartbeat(state="serving", version=newest))


def _wait(mailbox: Mailbox, kind: type[wire.Welcome]) -> wire.Welcome:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        for message in mailbox.receive(WAIT_S):
            if isinstance(message, kind):
                return message
    raise DeadlineExceeded("the hub", kind.__name__, TIMEOUT_S)


def _lines(mailbox: Mailbox) -> Iterator[int | None]:
    """0, 1, 2, ... for the lines of standard input, None now and then while there is none."""
    version, rest = 0, b""
    while True:
        mailbox.receive(0.0)
        if not select.select([0], [], [], HEARTBEAT_S)[0]:
            yield None
            continue
        data = os.read(0, 4096)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        for _ in lines:
            yield version
            version += 1


def _report(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Do one of the two jobs."""
    job, hub, keys, *rest = argv or sys.argv[1:]
    mailbox = Mailbox(Dealer(hub, keys=keys, role="learner" if job == "publish" else "actor", max_bytes=MAX_BYTES))
    try:
        if job == "publish":
            publish(mailbox, int(rest[0]))
        else:
            endpoint = endpoint_of(hub)
            assert endpoint
            receive(mailbox, rest[0], endpoint[0], cast(Deltas, rest[1]))
    finally:
        mailbox.close(linger_s=1.0)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

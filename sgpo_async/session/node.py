"""The node process (rank 1, child of an actor): pulls every announced version into a local store.

    main thread    waits for an announcement or a word (in `calls.callee.inbox`), or 20 ms; is the link alive?
    RPC threads    answer `calls.announce`, `calls.control`, `calls.beat`
    guard thread   see `session.guard`

If versions come faster than they can be pulled, the ones between are skipped: it always asks for the newest.
Run as `python -m sgpo_async.session.node SETTINGS`; the address to connect to comes on standard input.
"""

from __future__ import annotations

import os
import queue
import tempfile
import time
from typing import TYPE_CHECKING, NoReturn

from sgpo_async.errors import Superseded, WeightsError
from sgpo_async.session.guard import Guard, one_line, run_child
from sgpo_async.session.interface import interface_towards
from sgpo_async.session.pull import Answer, pull
from sgpo_async.session.settings import Settings
from sgpo_async.weights.manifest import Manifest
from sgpo_async.weights.paths import StoreFile
from sgpo_async.weights.writer import StoreWriter

if TYPE_CHECKING:
    from sgpo_async.session.world import World

_TICK_S = 0.02


def run(settings: Settings, guard: Guard) -> NoReturn:
    """Join the link's world and pull from it. Ends by an error only."""
    deadlines = settings.deadlines
    with guard.phase("start", deadlines.start_s):
        import torch.distributed.rpc  # noqa: F401  (while the actor is busy elsewhere)

    address = guard.commands.get()  # as long as the actor lives: it may have to wait for its hub
    with guard.phase(f"rendezvous with the link at {address['host']}:{address['port']}", deadlines.join_s):
        os.environ["TP_SOCKET_IFNAME"] = os.environ["GLOO_SOCKET_IFNAME"] = interface_towards(address["host"])
        from sgpo_async.session.world import World

        world = World("node", guard.who, deadlines)
        world.join(address["host"], address["port"])
    serve(world, guard)


def serve(world: World, guard: Guard) -> NoReturn:
    """Pull what is announced and pass words on, until the link is gone."""
    from sgpo_async.session import calls

    replica = Replica(world, guard)
    inbox = calls.callee.inbox
    while True:
        world.check()
        try:
            message = inbox.get(timeout=_TICK_S)
        except queue.Empty:
            continue
        if isinstance(message, calls.Control):
            guard.emit("control", word=message.word)
        else:
            replica.catch_up(message.version)


class Replica:
    """The local copy of the learner's store."""

    def __init__(self, world: World, guard: Guard) -> None:
        self._world, self._guard = world, guard
        self._file: StoreFile | None = None
        self._writer: StoreWriter | None = None

    def catch_up(self, version: int) -> None:
        """Pull the newest version, unless the local store has `version` already."""
        while self._writer is None or self._writer.version is None or self._writer.version < version:
            try:
                self._pull()
                return
            except Superseded:
                continue
            except WeightsError as error:
                self._guard.emit("rejected", version=version, reason=one_line(str(error)))
                return

    def _pull(self) -> None:
        from sgpo_async.session import calls

        started = time.monotonic()
        encoded = self._world.call(calls.manifest)
        if encoded is None:
            raise Superseded("the manifest was overwritten")
        manifest = Manifest.from_bytes(encoded)
        if self._writer is None:
            self._file = StoreFile(tempfile.gettempdir(), expected_bytes=manifest.nbytes)
            self._writer = StoreWriter(self._file.path)
        pull(manifest, self._ask, self._writer)
        self._guard.emit(
            "weights",
            version=manifest.version,
            path=self._writer.path,
            digest=manifest.digest,
            nbytes=manifest.nbytes,
            seconds=time.monotonic() - started,
            published_at=manifest.published_at,
        )

    def _ask(self, version: int, index: int) -> Answer:
        from sgpo_async.session import calls

        call = self._world.begin(calls.bucket, version, index)

        def answer() -> memoryview | None:
            tensor = call.wait()
            return None if tensor is None else memoryview(tensor.numpy())

        return answer


if __name__ == "__main__":
    run_child("node", run)

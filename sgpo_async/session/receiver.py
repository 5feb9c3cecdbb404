"""The node process (rank 1, child of an actor): pulls every announced version into a local store.

    main thread    waits for an announcement, a word, an answer or a question of the actor, or 20 ms; is the link alive?
    RPC threads    answer `calls.announce`, `calls.control`, `calls.answer`, `world.beat`
    pull threads   one at a time, for versions that the actor asks for
    guard thread   see `session.child_side`

If versions come faster than they can be pulled, the ones between are skipped: it always asks for the newest. Where
weights reach the engines by another road (`Settings.pulls` is false), an announcement is only passed on, and a version
is pulled when the actor asks for it.

Run as `python -m sgpo_async.session.receiver SETTINGS`; the address to connect to comes on standard input.
"""

from __future__ import annotations

import os
import queue
import tempfile
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

from sgpo_async.errors import SgpoError, Superseded, WeightsError
from sgpo_async.session import messages
from sgpo_async.session.child_side import ChildSide, one_line, run_child
from sgpo_async.session.interface import interface_towards
from sgpo_async.session.pull import Answer, pull
from sgpo_async.session.settings import Settings
from sgpo_async.weights.manifest import Manifest
from sgpo_async.weights.store_file import StoreFile
from sgpo_async.weights.writer import StoreWriter

if TYPE_CHECKING:
    from sgpo_async.session.rpc_world import RpcWorld

_TICK_S = 0.02


def run(settings: Settings, guard: ChildSide) -> NoReturn:
    """Join the link's world and pull from it. Ends by an error only."""
    deadlines = settings.deadlines
    with guard.phase("start", deadlines.start_s):
        import torch.distributed.rpc  # noqa: F401  (while the actor is busy elsewhere)

    address = _address(guard)
    with guard.phase(f"rendezvous with the link at {address['host']}:{address['port']}", deadlines.join_s):
        os.environ["TP_SOCKET_IFNAME"] = os.environ["GLOO_SOCKET_IFNAME"] = interface_towards(address["host"])
        from sgpo_async.session import calls
        from sgpo_async.session.rpc_world import RpcWorld

        calls.callee.inbox = guard.commands
        world = RpcWorld("node", deadlines)
        world.join(address["host"], address["port"])
    serve(world, guard, pulls=settings.pulls)


def _address(guard: ChildSide) -> dict[str, Any]:
    """Where the link waits, once the actor knows; it may have to wait for its hub. RpcClient stay in the inbox."""
    early = []
    while "host" not in (command := guard.commands.get()):
        early.append(command)
    for question in early:
        guard.commands.put(question)
    return command


def serve(world: RpcWorld, guard: ChildSide, *, pulls: bool) -> NoReturn:
    """Pull or pass on what is announced, carry questions, answers and words, until the link is gone."""
    from sgpo_async.session import calls

    replica = Replica(world, guard)
    while True:
        world.check()
        try:
            message = guard.commands.get(timeout=_TICK_S)
        except queue.Empty:
            continue
        match message:
            case messages.Announced(version):
                if pulls:
                    replica.catch_up(version)
                else:
                    replica.pass_on(version)
            case messages.Control(word):
                guard.emit("control", word=word)
            case messages.Answer():
                guard.emit("answer", id=message.id, value=message.value, error=message.error)
            case {"what": "pull"}:
                replica.pull_for(messages.Ask(**message))
            case _:
                world.call(calls.ask, messages.Ask(**message))


class Replica:
    """The local copy of the learner's store."""

    def __init__(self, world: RpcWorld, guard: ChildSide) -> None:
        self._world, self._guard = world, guard
        self._file: StoreFile | None = None
        self._writer: StoreWriter | None = None
        self._passed_on = -1
        self._pulling = threading.Lock()

    def catch_up(self, version: int) -> None:
        """Pull the newest version, unless the local store has `version` already."""
        if self._held() >= version:
            return
        try:
            self._pull()
        except Superseded:
            return  # by a version whose announcement lies in the inbox or is on its way
        except WeightsError as error:
            self._guard.emit("rejected", version=version, reason=one_line(str(error)))

    def pass_on(self, version: int) -> None:
        """Tell the actor of the newest version, unless it knows of `version` already."""
        if self._passed_on >= version:
            return
        try:
            manifest = self._newest()
        except Superseded:
            return
        except WeightsError as error:
            self._guard.emit("rejected", version=version, reason=one_line(str(error)))
            return
        self._passed_on = manifest.version
        self._guard.emit(
            "announced",
            version=manifest.version,
            digest=manifest.digest,
            nbytes=manifest.nbytes,
            published_at=manifest.published_at,
        )

    def pull_for(self, ask: messages.Ask) -> None:
        """Have the version that the actor asks for in the local store; the answer is its path."""
        threading.Thread(target=self._answer, args=(ask,), name="pull", daemon=True).start()

    def _answer(self, ask: messages.Ask) -> None:
        version = ask.arguments["version"]
        try:
            with self._pulling:
                if self._held() != version:
                    self._pull(version)
                assert self._writer is not None
                answer = messages.Answer(ask.id, self._writer.path)
        except SgpoError as error:
            answer = messages.Answer(ask.id, error=(type(error).__name__, one_line(f"pull: {error}")))
        except Exception as error:
            traceback.print_exc()
            answer = messages.Answer(ask.id, error=("SessionError", one_line(f"pull: internal error: {error!r}")))
        self._guard.commands.put(answer)

    def _held(self) -> int:
        held = self._writer.version if self._writer else None
        return -1 if held is None else held

    def _newest(self) -> Manifest:
        from sgpo_async.session import calls

        encoded = self._world.call(calls.manifest)
        if encoded is None:
            raise Superseded("the manifest was overwritten")
        return Manifest.from_bytes(encoded)

    def _pull(self, version: int | None = None) -> None:
        started = time.monotonic()
        manifest = self._newest()
        if version not in (None, manifest.version):
            raise Superseded(f"weights version {version}: the newest is {manifest.version}")
        if self._writer is None:
            self._file = StoreFile(tempfile.gettempdir(), expected_bytes=manifest.nbytes)
            self._writer = StoreWriter(self._file.path)
        pull(manifest, self._ask, self._writer)
        if version is None:
            self._tell(manifest, time.monotonic() - started)

    def _tell(self, manifest: Manifest, seconds: float) -> None:
        assert self._writer is not None
        self._guard.emit(
            "weights",
            version=manifest.version,
            path=self._writer.path,
            digest=manifest.digest,
            nbytes=manifest.nbytes,
            seconds=seconds,
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

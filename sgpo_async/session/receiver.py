"""The weight receiver (rank 1, child of an actor or of the hub): pulls every announced version into a local store.

    main thread       handles one announcement, response or request of the parent, or waits 20 ms; checks the sender
    RPC threads       answer `calls.announce`, `calls.respond`, `rpc_world.heartbeat`
    pull threads      one at a time, for versions that the parent requests
    watchdog thread   see `session.child_side`

The receiver always pulls the newest version. If versions come faster than it can pull them, it skips those in between.
If the weights reach the engines in another way (`Settings.pulls` is false), it only reports an announced version to its
parent, and pulls a version when the parent requests it.

Run as `python -m sgpo_async.session.receiver SETTINGS`; the address to connect to and the
session's secret come on standard input.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

from sgpo_async.errors import SgpoError, Superseded, WeightsError
from sgpo_async.session import messages
from sgpo_async.session.child_side import ChildSide, one_line, run_child
from sgpo_async.session.interface import interface_towards, is_own_address
from sgpo_async.session.pull import PendingBucket, Sent, pull
from sgpo_async.session.settings import Settings
from sgpo_async.weights.manifest import Manifest
from sgpo_async.weights.writer import StoreWriter

if TYPE_CHECKING:
    from sgpo_async.session.folder_world import FolderWorld
    from sgpo_async.session.rpc_world import RpcWorld
    from sgpo_async.session.socket_world import SocketClient

    World = RpcWorld | SocketClient | FolderWorld

_TICK_S = 0.02


def run(settings: Settings, child: ChildSide) -> NoReturn:
    """Join the weight sender's world and pull from it. Ends only by an error."""
    deadlines = settings.deadlines
    with child.phase("start", deadlines.start_s):
        import torch.distributed.rpc  # noqa: F401  (imported while the parent does other work)

    address = _sender_address(child)
    if settings.road == "folder":
        _follow_folder(address["folder"], settings, child)
    with child.phase(f"rendezvous with the weight sender at {address['host']}:{address['port']}", deadlines.join_s):
        os.environ["TP_SOCKET_IFNAME"] = os.environ["GLOO_SOCKET_IFNAME"] = interface_towards(address["host"])
        from sgpo_async.session import calls
        from sgpo_async.session.rpc_world import RpcWorld
        from sgpo_async.session.socket_world import SocketClient

        calls.callee.inbox = child.commands
        secret = bytes.fromhex(address["secret"])
        world: RpcWorld | SocketClient
        if settings.road == "sockets":
            world = SocketClient(deadlines, secret=secret, from_peer=calls.FROM_PEER)
        else:
            world = RpcWorld("weight_receiver", deadlines, secret=secret, from_peer=calls.FROM_PEER)
        world.reach(address["host"], address["port"])
        world.join()
        deltas = settings.deltas == "always" or (settings.deltas == "auto" and not is_own_address(address["host"]))
    local_copy = LocalCopy(world, child, settings.store, deltas=deltas, silence_s=deadlines.silence_s)
    serve(world, local_copy, child, pulls=settings.pulls)


def _follow_folder(url: str, settings: Settings, child: ChildSide) -> NoReturn:
    with child.phase(f"open {url}", settings.deadlines.join_s):
        from sgpo_async.session import calls
        from sgpo_async.session.folder_world import FolderWorld

        calls.callee.inbox = child.commands
        world = FolderWorld(url, settings.deadlines)
    deltas, silence_s = settings.deltas != "never", settings.deadlines.silence_s
    serve(world, LocalCopy(world, child, settings.store, deltas=deltas, silence_s=silence_s), child, pulls=True)


def _sender_address(child: ChildSide) -> dict[str, Any]:
    """Wait until the parent knows the weight sender's address. Requests that come earlier stay in the queue."""
    early = []
    while "host" not in (command := child.commands.get()):
        early.append(command)
    for request in early:
        child.commands.put(request)
    return command


def serve(world: World, local_copy: LocalCopy, child: ChildSide, *, pulls: bool) -> NoReturn:
    """Pull or report announced versions and forward requests and responses, until the weight sender is gone."""
    from sgpo_async.session import calls

    while True:
        world.check()
        try:
            message = child.commands.get(timeout=_TICK_S)
        except queue.Empty:
            continue
        match message:
            case messages.Announced(version):
                if pulls:
                    local_copy.catch_up(version)
                else:
                    local_copy.report(version)
            case messages.Response():
                child.emit("response", id=message.id, value=message.value, error=message.error)
            case {"method": "pull"}:
                local_copy.pull_for(messages.Request(**message))
            case _:
                world.call(calls.submit, messages.Request(**message))


class LocalCopy:
    """The copy of the learner's store in the store at `path`, which an earlier weight receiver may have begun."""

    def __init__(self, world: World, child: ChildSide, path: str, *, deltas: bool, silence_s: float) -> None:
        self._world, self._child, self._deltas, self._silence_s = world, child, deltas, silence_s
        self._writer = StoreWriter(path)
        self._reported = -1
        self._pulling = threading.Lock()

    def catch_up(self, version: int) -> None:
        """Pull the newest version, unless the local store already holds `version` or a newer one; report it."""
        try:
            if self._local_version() < version:
                self._pull()
            elif self._reported < version:
                self._continue(self._newest())
        except Superseded:
            return  # the announcement of the newer version is in the queue or on its way
        except WeightsError as error:
            self._child.emit("rejected", version=version, reason=one_line(str(error)))

    def _continue(self, newest: Manifest) -> None:
        """Report what an earlier weight receiver has pulled; pull again if the source has other content under it."""
        own = self._writer.newest
        assert own
        if own.version == newest.version and own.digest != newest.digest:
            self._writer.clear()
            self._pull()
        else:
            self._report_received(own, 0, 0.0)

    def report(self, version: int) -> None:
        """Report the newest version to the parent, unless `version` or a newer one was reported already."""
        if self._reported >= version:
            return
        try:
            manifest = self._newest()
        except Superseded:
            return
        except WeightsError as error:
            self._child.emit("rejected", version=version, reason=one_line(str(error)))
            return
        self._reported = manifest.version
        self._child.emit(
            "announced",
            version=manifest.version,
            digest=manifest.digest,
            nbytes=manifest.nbytes,
            published_at=manifest.published_at,
        )

    def pull_for(self, request: messages.Request) -> None:
        """Pull the version that the parent requests, in a separate thread; the response is the path of the store."""
        threading.Thread(target=self._process, args=(request,), name="pull", daemon=True).start()

    def _process(self, request: messages.Request) -> None:
        version = request.arguments["version"]
        try:
            with self._pulling:
                if self._local_version() != version:
                    self._pull(version)
                response = messages.Response(request.id, self._writer.path)
        except SgpoError as error:
            response = messages.Response(request.id, error=(type(error).__name__, one_line(f"pull: {error}")))
        except Exception as error:
            traceback.print_exc()
            reason = one_line(f"pull: internal error: {error!r}")
            response = messages.Response(request.id, error=("SessionError", reason))
        self._child.commands.put(response)

    def _local_version(self) -> int:
        """Return the version in the local store, -1 if there is none."""
        version = self._writer.version
        return -1 if version is None else version

    def _newest(self) -> Manifest:
        from sgpo_async.session import calls

        encoded = self._world.call(calls.manifest)
        if encoded is None:
            raise Superseded("the manifest was overwritten")
        return Manifest.from_bytes(encoded)

    def _pull(self, version: int | None = None) -> None:
        """Pull `version`, which must be the newest. By default pull the newest and report it to the parent."""
        started = time.monotonic()
        manifest = self._newest()
        if version not in (None, manifest.version):
            raise Superseded(f"weights version {version}: the newest is {manifest.version}")
        received = pull(manifest, self._request, self._writer, deltas=self._deltas, silence_s=self._silence_s)
        if version is None:
            self._report_received(manifest, received, time.monotonic() - started)

    def _report_received(self, manifest: Manifest, received: int, seconds: float) -> None:
        self._reported = manifest.version
        self._child.emit(
            "weights",
            version=manifest.version,
            path=self._writer.path,
            digest=manifest.digest,
            nbytes=manifest.nbytes,
            received=received,
            seconds=seconds,
            published_at=manifest.published_at,
        )

    def _request(self, version: int, index: int, base: int | None) -> PendingBucket:
        from sgpo_async.session import calls

        call = self._world.begin(calls.bucket, version, index, base)

        def pending() -> Sent | None:
            answer = call.wait()
            if answer == calls.SUPERSEDED:
                raise Superseded(f"weights version {version}: the source has given it up before it was pulled")
            return None if answer == calls.ARRIVING else Sent(memoryview(answer[0].numpy()), answer[1])

        return pending


if __name__ == "__main__":
    run_child("weight receiver", run)

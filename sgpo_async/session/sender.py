"""The weight sender (rank 0, beside a store): announces new versions and serves them, from their first bucket on.

    main thread       each 10 ms: check the weight receiver, announce a new version in the store, send a response
    RPC threads       answer `calls.manifest`, `calls.bucket`, `rpc_world.heartbeat`; pass `calls.submit` to RpcServer
    request threads   one per request of the actor, see `session.rpc_server`
    watchdog thread   see `session.child_side`

Run as `python -m sgpo_async.session.sender SETTINGS`; the session's secret comes on standard input.
"""

from __future__ import annotations

import os
import queue
from typing import TYPE_CHECKING, NoReturn

from sgpo_async.session.child_side import ChildSide, run_child
from sgpo_async.session.interface import interface_towards
from sgpo_async.session.settings import Settings
from sgpo_async.weights.reader import StoreReader

if TYPE_CHECKING:
    from sgpo_async.session.rpc_server import RpcServer
    from sgpo_async.session.rpc_world import RpcWorld
    from sgpo_async.session.socket_world import SocketServer

_TICK_S = 0.01
# A failed NCCL wait raises an exception; neither it nor NCCL's monitor may end the process.
_NCCL = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ENABLE_MONITORING": "0"}


def run(settings: Settings, child: ChildSide) -> NoReturn:
    """Open the world, wait for the weight receiver, serve it. Ends only by an error."""
    deadlines = settings.deadlines
    with child.phase("start", deadlines.start_s):
        os.environ |= _on_interface(interface_towards(settings.host)) | _NCCL
        from sgpo_async.session import calls
        from sgpo_async.session.rpc_server import RpcServer
        from sgpo_async.session.rpc_world import RpcWorld
        from sgpo_async.session.socket_world import SocketServer

    calls.callee.store = store = StoreReader(settings.store)
    calls.callee.server = server = RpcServer(store, settings.host, child.commands.put, jobs=settings.jobs)
    with child.phase(f"listen on {settings.host}", deadlines.start_s):
        secret = bytes.fromhex(child.commands.get()["secret"])  # the first command
        world: RpcWorld | SocketServer
        if settings.road == "sockets":
            world = SocketServer(deadlines, secret=secret, from_peer=calls.FROM_PEER)
        else:
            world = RpcWorld("weight_sender", deadlines, secret=secret, from_peer=calls.FROM_PEER)
        child.emit("up", port=world.listen(settings.host))
    with child.phase("rendezvous with the weight receiver", deadlines.join_s):
        world.join()
    serve(world, store, server, child)


def serve(world: RpcWorld | SocketServer, store: StoreReader, server: RpcServer, child: ChildSide) -> NoReturn:
    """Announce versions, complete or still arriving, and send responses, until the weight receiver is gone."""
    from sgpo_async.session import calls

    announced: int | None = None
    while True:
        world.check()
        version = store.offered()
        if version is not None and version != announced:
            world.call(calls.announce, version)
            announced = version
        server.expire()
        try:
            response = child.commands.get(timeout=_TICK_S)
        except queue.Empty:
            continue
        world.call(calls.respond, response)


def _on_interface(name: str) -> dict[str, str]:
    return {"TP_SOCKET_IFNAME": name, "GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}


if __name__ == "__main__":
    run_child("weight sender", run)

"""The link process (rank 0, beside the hub): announces new versions and serves them.

    main thread    each 20 ms: is the node alive? a new version in the store? a command of the hub, an answer?
    RPC threads    answer `calls.manifest`, `calls.bucket`, `world.beat`; hand `calls.ask` to the server
    others         one per question of the actor, see `session.rpc_server`
    guard thread   see `session.child_side`

Run as `python -m sgpo_async.session.sender SETTINGS`.
"""

from __future__ import annotations

import os
import queue
from typing import TYPE_CHECKING, NoReturn

from sgpo_async.session.child_side import ChildSide, run_child
from sgpo_async.session.interface import interface_towards
from sgpo_async.session.messages import Answer
from sgpo_async.session.settings import Settings
from sgpo_async.weights.reader import StoreReader

if TYPE_CHECKING:
    from sgpo_async.session.rpc_server import RpcServer
    from sgpo_async.session.rpc_world import RpcWorld

_TICK_S = 0.02
# A wait raises its failure here instead of ending the process, and nobody else ends it either.
_NCCL = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ENABLE_MONITORING": "0"}


def run(settings: Settings, guard: ChildSide) -> NoReturn:
    """Open the world, wait for the node, serve it. Ends by an error only."""
    deadlines = settings.deadlines
    with guard.phase("start", deadlines.start_s):
        os.environ |= _on_interface(interface_towards(settings.host)) | _NCCL
        from sgpo_async.session import calls
        from sgpo_async.session.rpc_server import RpcServer
        from sgpo_async.session.rpc_world import RpcWorld, listen

    with guard.phase(f"listen on {settings.host}", deadlines.start_s):
        _rendezvous, port = listen(settings.host, deadlines.join_s)
    calls.callee.store = store = StoreReader(settings.store)
    calls.callee.server = server = RpcServer(store, settings.host, guard.commands.put)
    world = RpcWorld("link", deadlines)
    guard.emit("up", port=port)
    with guard.phase("rendezvous with the node", deadlines.join_s):
        world.join(settings.host, port)
    serve(world, store, server, guard)


def serve(world: RpcWorld, store: StoreReader, server: RpcServer, guard: ChildSide) -> NoReturn:
    """Announce what appears in `store`, pass on the hub's words and the server's answers, until the node is gone."""
    from sgpo_async.session import calls

    announced: int | None = None
    while True:
        world.check()
        version = store.version()
        if version is not None and version != announced:
            world.call(calls.announce, version)
            announced = version
        server.expire()
        try:
            message = guard.commands.get(timeout=_TICK_S)
        except queue.Empty:
            continue
        if isinstance(message, Answer):
            world.call(calls.answer, message)
        else:
            world.call(calls.control, message["control"])


def _on_interface(name: str) -> dict[str, str]:
    return {"TP_SOCKET_IFNAME": name, "GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}


if __name__ == "__main__":
    run_child("link", run)

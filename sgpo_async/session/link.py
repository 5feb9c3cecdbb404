"""The link process (rank 0, beside the hub): announces new versions and serves them.

    main thread    each 20 ms: is the node alive? a new version in the store? a command of the hub?
    RPC threads    answer `calls.manifest`, `calls.bucket`, `calls.beat`
    guard thread   see `session.guard`

Run as `python -m sgpo_async.session.link SETTINGS`.
"""

from __future__ import annotations

import os
import queue
from typing import TYPE_CHECKING, NoReturn

from sgpo_async.session.guard import Guard, run_child
from sgpo_async.session.interface import interface_towards
from sgpo_async.session.settings import Settings
from sgpo_async.weights.reader import StoreReader

if TYPE_CHECKING:
    from sgpo_async.session.world import World

_TICK_S = 0.02


def run(settings: Settings, guard: Guard) -> NoReturn:
    """Open the world, wait for the node, serve it. Ends by an error only."""
    deadlines = settings.deadlines
    with guard.phase("start", deadlines.start_s):
        os.environ["TP_SOCKET_IFNAME"] = os.environ["GLOO_SOCKET_IFNAME"] = interface_towards(settings.host)
        from sgpo_async.session import calls
        from sgpo_async.session.world import World, listen

    with guard.phase(f"listen on {settings.host}", deadlines.start_s):
        _rendezvous, port = listen(settings.host, deadlines.join_s)
    calls.callee.store = StoreReader(settings.store)
    world = World("link", guard.who, deadlines)
    guard.emit("up", port=port)
    with guard.phase("rendezvous with the node", deadlines.join_s):
        world.join(settings.host, port)
    serve(world, calls.callee.store, guard)


def serve(world: World, store: StoreReader, guard: Guard) -> NoReturn:
    """Announce what appears in `store` and pass the hub's words on, until the node is gone."""
    from sgpo_async.session import calls

    announced: int | None = None
    while True:
        world.check()
        version = store.version()
        if version is not None and version != announced:
            world.call(calls.announce, version)
            announced = version
        try:
            world.call(calls.control, guard.commands.get(timeout=_TICK_S)["control"])
        except queue.Empty:
            continue


if __name__ == "__main__":
    run_child("link", run)

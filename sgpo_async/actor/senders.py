"""The weight senders that this actor keeps for other actors, on the store that its own weight receiver writes."""

from __future__ import annotations

from collections.abc import Callable

from sgpo_async.errors import SessionError
from sgpo_async.session import SenderUp, WeightSender
from sgpo_async.session.stopping import Stopping
from sgpo_async.wire import records as wire

STOP_S = 5.0  # for a killed weight sender to end


class Senders:
    """Opens and closes weight senders as the hub says; `spawn` starts one for the actor of a name, by a road."""

    def __init__(self, spawn: Callable[[str, wire.Road], WeightSender]) -> None:
        self._spawn = spawn
        self._senders: dict[int, WeightSender] = {}
        self._failed: list[wire.SenderDown] = []
        self._stopping = Stopping(seconds=STOP_S, threads=4)

    def open(self, order: wire.OpenSender) -> None:
        """Start a weight sender. If that fails (too many processes, no route to the hub), `poll` reports it as down."""
        try:
            self._senders[order.sender] = self._spawn(order.name, order.road)
        except (OSError, SessionError) as error:
            self._failed.append(wire.SenderDown(sender=order.sender, reason=f"cannot start a weight sender: {error}"))

    def close(self, sender: int) -> None:
        """End a weight sender, without waiting; an unknown one is ignored."""
        if handle := self._senders.pop(sender, None):
            self._stopping.stop(handle)

    def poll(self) -> list[wire.SenderUp | wire.SenderDown]:
        """What the hub must be told since the last call."""
        found: list[wire.SenderUp | wire.SenderDown] = [*self._failed]
        self._failed.clear()
        for sender, handle in list(self._senders.items()):
            for event in handle.poll():
                if isinstance(event, SenderUp):
                    found.append(wire.SenderUp(sender=sender, host=handle.host, port=event.port, secret=event.secret))
                else:
                    self.close(sender)
                    found.append(wire.SenderDown(sender=sender, reason=event.reason))
        return found

    def close_all(self) -> None:
        """End all weight senders, and wait for their ends."""
        for sender in list(self._senders):
            self.close(sender)
        self._stopping.close()

"""Double-entry bookkeeping: nothing that was dispatched disappears."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Ledger:
    """Counts of one kind of thing (tasks, or rollouts).

    dispatched = trained + dropped + in flight + buffered, at any time. Only the first three are counted here; what is
    in flight and buffered is counted anew from the leases and the buffer at every check, so a thing that was lost
    or counted twice on the way shows.
    """

    dispatched: int = 0
    trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # by reason

    def drop(self, reason: str, count: int) -> None:
        """`count` of those dispatched will never be trained, because of `reason`."""
        if count:
            self.dropped[reason] += count

    def check(self, *, in_flight: int, buffered: int) -> None:
        """Assert that the books balance."""
        accounted = self.trained + self.dropped.total() + in_flight + buffered
        assert self.dispatched == accounted, (self, in_flight, buffered)

    def plain(self, *, in_flight: int, buffered: int) -> dict[str, Any]:
        """The whole balance as plain data."""
        return {
            "dispatched": self.dispatched,
            "trained": self.trained,
            "dropped": dict(self.dropped),
            "in_flight": in_flight,
            "buffered": buffered,
        }

"""Double-entry bookkeeping: every dispatched task and rollout is accounted for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Ledger:
    """Counts of tasks, or of rollouts.

    At any time, dispatched = trained + dropped + in flight + buffered. The ledger itself counts only the first three.
    The numbers in flight and buffered are counted from the leases and the buffer at every check, so the check fails
    if a task or rollout was lost or counted twice.
    """

    dispatched: int = 0
    trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # by reason

    def drop(self, reason: str, count: int) -> None:
        """Count `count` of the dispatched ones as dropped, for `reason`: they will never be trained."""
        if count:
            self.dropped[reason] += count

    def check(self, *, in_flight: int, buffered: int) -> None:
        """Assert that the equation of this class holds."""
        accounted = self.trained + self.dropped.total() + in_flight + buffered
        assert self.dispatched == accounted, (self, in_flight, buffered)

    def plain(self, *, in_flight: int, buffered: int) -> dict[str, Any]:
        """All five numbers as plain data."""
        return {
            "dispatched": self.dispatched,
            "trained": self.trained,
            "dropped": dict(self.dropped),
            "in_flight": in_flight,
            "buffered": buffered,
        }

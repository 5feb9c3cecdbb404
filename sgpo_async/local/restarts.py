"""When a process that has crashed is started again."""

from __future__ import annotations

from dataclasses import dataclass, field

LIMIT = 5  # restarts within WINDOW_S; a process that crashes more often will probably crash again
WINDOW_S = 600.0


@dataclass
class Restarts:
    """The crashes of one process, and whether it may start again: after 1, 2, 4, ... s, LIMIT times within WINDOW_S.

    Earlier crashes no longer count, so a process that works for a while after each start may crash any number of times.
    """

    crashes: int = 0  # since the run began
    _recent: list[float] = field(default_factory=list)  # times of those within the window

    def pause_after_crash(self, now: float, *, limit: int = LIMIT) -> float | None:
        """Count a crash at `now`; the seconds until the next start, or None if the process has failed for good."""
        self.crashes += 1
        self._recent = [*(then for then in self._recent if now - then < WINDOW_S), now]
        return 2.0 ** (len(self._recent) - 1) if len(self._recent) <= limit else None

"""At-least-once delivery of rollouts, without I/O: the clock is an argument and the caller sends.

    offer(rollout) ─▶ backlog ─▶ due(now) ─▶ [caller sends] ─▶ hub
                                   ▲  at most `window` unacknowledged; again after `resend_after_s`
    acknowledge(ack) ──────────────┘

The hub acknowledges every rollout that it has, new or known, and ignores what it knows: together that is
exactly once.
"""

from __future__ import annotations

from sgpo_async.wire.records import Ack, Rollout

Key = tuple[int, int, int]  # task, attempt, slot


def key_of(item: Rollout | Ack) -> Key:
    """A rollout's identity."""
    return item.task, item.attempt, item.slot


class ReliableSender:
    """Keeps every rollout until it is acknowledged; at most `window` of them are on their way."""

    def __init__(self, *, window: int, resend_after_s: float) -> None:
        assert window >= 1 and resend_after_s > 0
        self.window = window
        self.resend_after_s = resend_after_s
        self._pending: dict[Key, Rollout] = {}  # all that is unacknowledged, oldest first
        self._due_at: dict[Key, float] = {}  # of those on their way: when to send again

    def __len__(self) -> int:
        """Rollouts that are not acknowledged, on their way or not."""
        return len(self._pending)

    def offer(self, rollout: Rollout) -> None:
        """Take responsibility for a rollout."""
        self._pending[key_of(rollout)] = rollout

    def due(self, now: float) -> list[Rollout]:
        """What is to be sent at `now`, oldest first; counts as sent."""
        sending = []
        for key, rollout in self._pending.items():
            sent_before = key in self._due_at
            if not sent_before and len(self._due_at) == self.window:
                break
            if self._due_at.get(key, now) > now:
                continue
            self._due_at[key] = now + self.resend_after_s
            sending.append(rollout)
        return sending

    def acknowledge(self, ack: Ack) -> bool:
        """Forget a rollout that the hub has; False if it was forgotten before."""
        self._due_at.pop(key_of(ack), None)
        return self._pending.pop(key_of(ack), None) is not None

"""At-least-once delivery of rollouts, without I/O: the caller passes the time and sends what is due.

    offer(rollout) ─▶ backlog ─▶ due(now) ─▶ [caller sends] ─▶ hub
                                   ▲  at most `window` sent and not acknowledged; again after `resend_after_s`
    acknowledge(ack) ──────────────┘

The hub acknowledges every rollout that it receives, also a duplicate, and drops duplicates. So the hub counts each
rollout exactly once.
"""

from __future__ import annotations

from sgpo_async.wire.records import Ack, Rollout

Key = tuple[int, int, int]  # task, attempt, slot


def key_of(item: Rollout | Ack) -> Key:
    """A rollout's identity."""
    return item.task, item.attempt, item.slot


class ReliableSender:
    """Keeps every rollout until the hub acknowledges it; at most `window` rollouts are in flight."""

    def __init__(self, *, window: int, resend_after_s: float) -> None:
        assert window >= 1 and resend_after_s > 0
        self.window = window
        self.resend_after_s = resend_after_s
        self._pending: dict[Key, Rollout] = {}  # not acknowledged, oldest first
        self._due_at: dict[Key, float] = {}  # of rollouts in flight: when to send them again

    def __len__(self) -> int:
        """Number of rollouts that are not acknowledged, in flight or waiting."""
        return len(self._pending)

    def offer(self, rollout: Rollout) -> None:
        """Add a rollout, to be sent until it is acknowledged."""
        self._pending[key_of(rollout)] = rollout

    def due(self, now: float) -> list[Rollout]:
        """The rollouts that the caller must send at `now`, oldest first; they count as sent."""
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

    def resend(self) -> None:
        """All rollouts are due again: the connection was lost, and with it what was on its way."""
        self._due_at.clear()

    def forget(self, task: int, attempt: int) -> None:
        """Drop the rollouts of a lease that the hub has taken back."""
        for key in [key for key in self._pending if key[:2] == (task, attempt)]:
            del self._pending[key]
            self._due_at.pop(key, None)

    @property
    def leases(self) -> set[tuple[int, int]]:
        """(task, attempt) of the rollouts that are not acknowledged."""
        return {key[:2] for key in self._pending}

    def acknowledge(self, ack: Ack) -> bool:
        """Forget a rollout that the hub has; False if it was acknowledged before."""
        self._due_at.pop(key_of(ack), None)
        return self._pending.pop(key_of(ack), None) is not None

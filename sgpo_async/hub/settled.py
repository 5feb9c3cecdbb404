"""What the trained rollouts tell of all that were sampled: are they shorter, or solved more often?

Long rollouts become stale first. If they are dropped, the policy learns from short ones alone, and from the problems
that short ones solve. So all groups are counted when it is settled whether they are trained or dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sgpo_async.rollout.partial import Arrived
from sgpo_async.wire.records import Rollout

ENOUGH = 200  # dropped and trained rollouts, each, before the alarm is raised
TOLERANCE = 0.05  # of the mean length


@dataclass
class Count:
    """Sums over rollouts."""

    rollouts: int = 0
    tokens: int = 0
    autonomous: int = 0
    correct: int = 0  # of the autonomous ones

    def add(self, rollouts: Iterable[Rollout]) -> None:
        """Count finished rollouts."""
        for rollout in rollouts:
            self.rollouts += 1
            self.tokens += len(rollout.tokens)
            if not rollout.guided:
                self.autonomous += 1
                self.correct += rollout.correct


@dataclass
class Settled:
    """The groups of training that are trained or dropped, since the hub began or was restored."""

    trained: Count = field(default_factory=Count)
    dropped: Count = field(default_factory=Count)
    warned: bool = False

    def drop_unfinished(self, arrived: Arrived) -> None:
        """Count a group that ends before it is complete; an unfinished rollout with what is known of its length."""
        self.dropped.add(arrived.rollouts.values())
        for slot in arrived.reports:
            self.dropped.rollouts += 1
            self.dropped.tokens += arrived.sampled(slot)

    def metrics(self) -> dict[str, Any]:
        """Shares and differences; None where nothing was counted.

        tokens_dropped: the share of the sampled tokens that belong to dropped groups. length_bias: the mean length of
        trained rollouts, relative to that of all, minus 1. pass_bias: the pass rate of trained autonomous rollouts
        minus that of all.
        """
        trained, dropped = self.trained, self.dropped
        tokens, rollouts = trained.tokens + dropped.tokens, trained.rollouts + dropped.rollouts
        if not trained.rollouts or not trained.autonomous:
            return dict.fromkeys(("tokens_dropped", "length_bias", "pass_bias"))
        correct, autonomous = trained.correct + dropped.correct, trained.autonomous + dropped.autonomous
        return {
            "tokens_dropped": dropped.tokens / tokens,
            "length_bias": trained.tokens / trained.rollouts / (tokens / rollouts) - 1,
            "pass_bias": trained.correct / trained.autonomous - correct / autonomous,
        }

    def alarm(self) -> str:
        """One line, once, if the trained rollouts are shorter than all; else empty."""
        if self.warned or min(self.trained.rollouts, self.dropped.rollouts) < ENOUGH:
            return ""
        found = self.metrics()
        if found["length_bias"] > -TOLERANCE:
            return ""
        self.warned = True
        return (
            f"stale groups: {found['tokens_dropped']:.0%} of the sampled tokens are dropped, and the trained "
            f"completions are {-found['length_bias']:.0%} shorter than all; set hub.stale=correct or raise hub.max_lag"
        )

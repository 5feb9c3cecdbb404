"""Completed groups: all rollouts of a task."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from sgpo_async.wire.records import Rollout


@dataclass(frozen=True, kw_only=True)
class CompletedGroup:
    """All rollouts of one attempt at one task, ordered by slot."""

    number: int
    attempt: int
    rollouts: tuple[Rollout, ...]

    @cached_property
    def tokens(self) -> int:
        """Number of tokens that the learner has to process: prompts and responses."""
        return sum(len(r.prompt) + len(r.tokens) for r in self.rollouts)

    @cached_property
    def oldest_version(self) -> int:
        """The weight version of the stalest token in the group."""
        return min(r.oldest_version for r in self.rollouts)

    @cached_property
    def newest_version(self) -> int:
        """The weight version of the newest token in the group."""
        return max(int(r.versions.max()) for r in self.rollouts)

    def pass_rate(self, *, guided: bool) -> float | None:
        """Share of correct rollouts among the guided or the autonomous ones; None if the group has none of them."""
        correct = [r.correct for r in self.rollouts if r.guided == guided]
        return fmean(correct) if correct else None

    def mean_reward(self, *, guided: bool) -> float | None:
        """Mean reward of the guided or of the autonomous rollouts; None if the group has none of them."""
        rewards = [r.reward for r in self.rollouts if r.guided == guided]
        return fmean(rewards) if rewards else None

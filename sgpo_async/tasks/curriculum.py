"""Which problem a task's number stands for. Hub and learner each work it out for themselves; nothing is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from sgpo_async.config.schema import Run
from sgpo_async.tasks.base import Problem, ProblemSource
from sgpo_async.wire.records import Lease, Purpose


@dataclass(frozen=True, kw_only=True)
class Task:
    """One problem to be rolled out, whoever does it and however often it takes.

    Training tasks are numbered by their position in the stream of problems, 0, 1, 2, ...; evaluation tasks count
    down, -1, -2, ..., so that a number alone names a task.
    """

    number: int
    purpose: Purpose
    problem: Problem
    autonomous: int
    guided: int
    seed: int

    @property
    def size(self) -> int:
        """Rollouts in the group."""
        return self.autonomous + self.guided

    def lease(self, *, attempt: int, min_version: int) -> Lease:
        """The task as an actor is told of it."""
        return Lease(
            task=self.number,
            attempt=attempt,
            purpose=self.purpose,
            problem=self.problem.problem,
            answer=self.problem.answer,
            strategy=self.problem.strategy,
            autonomous=self.autonomous,
            guided=self.guided,
            min_version=min_version,
            seed=self.seed,
        )


class Curriculum:
    """Makes tasks of problems: a task is a function of its number and the configuration."""

    def __init__(self, run: Run, source: ProblemSource) -> None:
        self._run, self._source = run, source
        self.held_out: Sequence[Problem] = source.held_out()

    def task(self, number: int) -> Task:
        """The training task at position `number` >= 0, or the evaluation task `number` < 0."""
        return self._training(number) if number >= 0 else self._evaluation(number)

    def _training(self, number: int) -> Task:
        problem, sizes = self._source.training(number), self._run.rollout
        return Task(
            number=number,
            purpose="train",
            problem=problem,
            autonomous=sizes.autonomous,
            guided=sizes.guided if problem.strategy else 0,
            seed=derived_seed(self._run.seed, "train", number),
        )

    def _evaluation(self, number: int) -> Task:
        """Every round walks over all held-out problems, with the same seeds: rounds are paired comparisons."""
        index = (-1 - number) % len(self.held_out)
        problem, samples = self.held_out[index], self._run.evaluation.samples
        return Task(
            number=number,
            purpose="evaluate",
            problem=problem,
            autonomous=samples,
            guided=samples if problem.strategy else 0,
            seed=derived_seed(self._run.seed, "evaluate", index),
        )


def derived_seed(*parts: int | str) -> int:
    """A 56-bit seed. It does not depend on the attempt: a reissued task is the same experiment, not a second draw."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())

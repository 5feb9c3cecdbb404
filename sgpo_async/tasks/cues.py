"""The problem source of the built-in domain; `cues_domain` defines its problems."""

from __future__ import annotations

import random
from collections.abc import Sequence

from sgpo_async.tasks.base import SPLIT_SEED, Problem
from sgpo_async.tasks.cues_domain import draw_exercise

SHOWN = 256  # problems that are shown of the endless stream


class CuesSource:
    """Generates problems. Every second held-out problem has a novel pair: adjacent cues that training never shows."""

    verifier = "cues"
    strategies = responses = SHOWN

    def __init__(self, *, seed: int, held_out: int = 400) -> None:
        self._seed = seed
        self._held_out = [_problem(f"held-out-{i}", seed=SPLIT_SEED, novel=i % 2 == 1) for i in range(held_out)]
        self._reserved = {problem.problem for problem in self._held_out}

    def training(self, position: int) -> Problem:
        """The training problem at `position`; it has no novel pair and is not a held-out problem."""
        problem, attempt = _problem(f"train-{position}", seed=self._seed), 0
        while problem.problem in self._reserved:
            attempt += 1
            problem = _problem(f"train-{position}-{attempt}", seed=self._seed)
        return problem

    def training_problems(self) -> Sequence[Problem]:
        return [self.training(position) for position in range(SHOWN)]

    def longest_problems(self, count: int) -> Sequence[Problem]:
        return self.training_problems()[:count]

    def held_out(self) -> Sequence[Problem]:
        return self._held_out


def _problem(name: str, *, seed: int, novel: bool = False) -> Problem:
    exercise = draw_exercise(random.Random(f"cues: {seed} {name}"), novel=novel)
    return Problem(
        id=f"cues-{seed}-{name}",
        problem=exercise.problem_text(),
        answer=exercise.answer_text(),
        strategy=exercise.strategy_text(exercise.true_techniques),
        response=exercise.solution_text(exercise.true_techniques),
    )

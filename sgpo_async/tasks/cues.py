"""The problem source of the cues domain; `cues_domain` defines its problems."""

from __future__ import annotations

import random

from sgpo_async.tasks.base import SPLIT_SEED, Problem
from sgpo_async.tasks.cues_domain import draw_exercise
from sgpo_async.tasks.generated import GeneratedSource


class CuesSource(GeneratedSource):
    """Every second held-out problem has a novel pair: adjacent cues that training never shows."""

    verifier = "cues"

    def problem(self, name: str, *, seed: int) -> Problem:
        """A random exercise without a novel pair."""
        return _problem(name, seed=seed, novel=False)

    def held_out_problem(self, number: int) -> Problem:
        """A random exercise, with a novel pair if the number is odd."""
        return _problem(f"held-out-{number}", seed=SPLIT_SEED, novel=number % 2 == 1)


def _problem(name: str, *, seed: int, novel: bool) -> Problem:
    exercise = draw_exercise(random.Random(f"cues: {seed} {name}"), novel=novel)
    return Problem(
        id=f"cues-{seed}-{name}",
        problem=exercise.problem_text(),
        answer=exercise.answer_text(exercise.true_techniques),
        strategy=exercise.strategy_text(exercise.true_techniques),
        response=exercise.solution_text(exercise.true_techniques),
    )

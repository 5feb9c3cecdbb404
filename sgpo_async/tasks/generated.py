"""A source that generates its problems: those of the built-in domains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from sgpo_async.tasks.base import SPLIT_SEED, Problem, longest

SHOWN = 256  # problems that are shown of the endless stream


class GeneratedSource(ABC):
    """An endless stream; held-out problems are the same for all seeds, and training never shows them."""

    verifier: str
    strategies = responses = SHOWN

    def __init__(self, *, seed: int, held_out: int = 400) -> None:
        self._seed = seed
        self._held_out = [self.held_out_problem(number) for number in range(held_out)]
        self._reserved = {problem.problem for problem in self._held_out}

    @abstractmethod
    def problem(self, name: str, *, seed: int) -> Problem:
        """The problem that name and seed determine."""

    def held_out_problem(self, number: int) -> Problem:
        """The held-out problem of this number."""
        return self.problem(f"held-out-{number}", seed=SPLIT_SEED)

    def training(self, position: int) -> Problem:
        """The training problem at `position`."""
        problem, attempt = self.problem(f"train-{position}", seed=self._seed), 0
        while problem.problem in self._reserved:
            attempt += 1
            problem = self.problem(f"train-{position}-{attempt}", seed=self._seed)
        return problem

    def training_problems(self) -> Sequence[Problem]:
        """The first SHOWN training problems."""
        return [self.training(position) for position in range(SHOWN)]

    def longest_problems(self, count: int) -> Sequence[Problem]:
        """Of the first SHOWN training problems, those with the most characters, the strategy included."""
        return longest(self.training_problems(), count)

    def held_out(self) -> Sequence[Problem]:
        """The held-out problems."""
        return self._held_out

"""Problems, and sources that yield problems by position. Does not import torch."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import xxhash

SPLIT_SEED = 0
"""Seed that selects the held-out problems. It differs from the run's seed on purpose: otherwise two runs with different
seeds would be evaluated on different problems, and each would train on most of the other's held-out problems."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem with its verifiable answer.

    The strategy names problem type, approach and general steps; it contains neither intermediate numbers
    nor the answer (arXiv 2606.24064). The response is a stronger model's worked solution, where one exists.
    """

    id: str
    problem: str
    answer: str
    strategy: str | None = None
    response: str | None = None
    verifier: str | None = None  # None: the verifier of its source or benchmark
    columns: str = ""  # the other columns of its record as a JSON object, if a function of the user reads them

    @property
    def digest(self) -> str:
        """Identifies the problem by its content, so that two evaluations can be matched problem by problem."""
        return xxhash.xxh3_64_hexdigest(f"{self.problem}\0{self.answer}".encode())


def longest(problems: Sequence[Problem], count: int) -> list[Problem]:
    """The problems with the most characters, the strategy or context included."""
    return heapq.nlargest(count, problems, key=lambda p: len(p.problem) + len(p.strategy or ""))


class ProblemSource(Protocol):
    """An endless, reproducible stream of training problems and a fixed held-out set."""

    verifier: str
    """What judges completions of this source, in the text form of `sgpo_async.tasks.rewards`."""

    def training(self, position: int) -> Problem:
        """The problem at `position` >= 0 of the training stream; every call returns the same one."""

    def held_out(self) -> Sequence[Problem]:
        """Problems that the training stream never yields, in a fixed order."""


class ListedSource(ProblemSource, Protocol):
    """A source whose training problems can be looked at before a run starts."""

    strategies: int
    """How many training problems have a strategy."""

    responses: int
    """How many training problems have a response."""

    def training_problems(self) -> Sequence[Problem]:
        """All training problems, each read when it is asked for; of a source that generates them, the first ones."""

    def longest_problems(self, count: int) -> Sequence[Problem]:
        """The training problems with the most characters, the strategy included."""

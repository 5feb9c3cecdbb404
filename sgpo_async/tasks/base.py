"""What a task is made of: a problem, and a source that yields problems by position. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import xxhash

SPLIT_SEED = 0
"""Draws what is held out: never the run's seed, or runs of two seeds would be measured on different problems, and each
would have trained on most of the other's."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem with its verifiable answer.

    The strategy names problem type, approach and general steps; it holds neither intermediate numbers nor
    the answer (arXiv 2606.24064). The response is a stronger model's worked solution, where one exists.
    """

    id: str
    problem: str
    answer: str
    strategy: str | None = None
    response: str | None = None
    verifier: str | None = None  # None: that of its source, or benchmark

    @property
    def digest(self) -> str:
        """By which two evaluations of a problem know that it is the same one."""
        return xxhash.xxh3_64_hexdigest(f"{self.problem}\0{self.answer}".encode())


class ProblemSource(Protocol):
    """An endless, reproducible stream of training problems and a fixed held-out set."""

    verifier: str
    """Name of the verifier in `sgpo_async.tasks.verify.VERIFIERS` that judges completions of this source."""

    has_responses: bool
    """Whether any training problem has a response."""

    def training(self, position: int) -> Problem:
        """The problem at `position` >= 0 of the training stream; the same one at every call."""

    def held_out(self) -> Sequence[Problem]:
        """Problems that the training stream never yields, in a fixed order."""

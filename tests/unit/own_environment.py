"""Environments of a user, for tests: named `own_environment:Class` in the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgpo_async.tasks.environments import Turn


class Guess:
    """The policy guesses a number: `low` and `high` are the replies; every guess costs a tenth."""

    def reset(self, problem: str, answer: str, columns: Mapping[str, Any]) -> None:
        self.answer, self.guesses = int(answer), columns.get("guesses", 9)

    def step(self, completion: str) -> Turn:
        if not completion.strip().isdigit():
            return Turn(done=True)
        guess, self.guesses = int(completion), self.guesses - 1
        if guess == self.answer:
            return Turn(done=True, reward=1.0)
        return Turn(reply="low" if guess < self.answer else "high", reward=-0.1, done=not self.guesses)


class Raises(Guess):
    def step(self, completion: str) -> Turn:
        raise KeyError("no such tool")


class NoTurn(Guess):
    def step(self, completion: str) -> Turn:
        return "low"  # type: ignore[return-value]


class Silent(Guess):
    def step(self, completion: str) -> Turn:
        return Turn()


class Endless(Guess):
    def step(self, completion: str) -> Turn:
        while True:
            pass


class Unbounded(Guess):
    def step(self, completion: str) -> Turn:
        return Turn(reply="x", reward=float("inf"))

"""Environments: episodes of several turns, in which the policy acts and a user's class replies. Does not import torch.

    reset(problem, answer, columns) ─▶ step(completion) ─▶ Turn(reply) ─▶ step(completion) ─▶ ... ─▶ Turn(done=True)

The tokens of an episode are one sequence: the prompt, the first completion, the first reply, the second completion, and
so on. The policy reads the replies and is trained on its own tokens only. A completion is a turn up to its end token.

An environment runs in the worker processes that compute rewards, with their limits of time and memory. Every turn makes
a new one, and repeats the episode's earlier turns, because the next turn may run in another worker, or on another node
if the actor is lost. So `reset` and `step` must always reply in the same way to the same completions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sgpo_async.errors import DataError
from sgpo_async.tasks.functions import describe, import_function
from sgpo_async.tasks.rewards import Sample, finite_number


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The answer of an environment to one completion."""

    reply: str = ""  # what the policy reads next; not empty unless the episode is done
    reward: float = 0.0  # any finite number; the reward of the episode is the sum over its turns
    done: bool = False  # the episode is over; the reply is not used


class Environment(Protocol):
    """What a user's class has, which is made without arguments for each turn."""

    def reset(self, problem: str, answer: str, columns: Mapping[str, Any]) -> None:
        """Begin an episode. `columns`: the other columns of the problem's record."""

    def step(self, completion: str) -> Turn:
        """Answer the policy's next completion, which is decoded without special tokens."""


def load_environment(name: str) -> Callable[[], Environment]:
    """The class MODULE:CLASS. Raises DataError."""
    return import_function("tasks.environment", name)


def play(name: str, make: Callable[[], Environment], sample: Sample, earlier: Sequence[str]) -> Turn:
    """The turn of `sample.completion` after the `earlier` completions; its reward is the sum of all turns' rewards.

    Raises DataError, one line, if the environment raises or returns no valid turn. MemoryError passes: it is a limit,
    as time is.
    """
    place = f"environment {name}: for the problem {' '.join(sample.problem.split())!r:.80}"
    completions, total = (*earlier, sample.completion), 0.0
    try:
        environment = make()
        environment.reset(sample.problem, sample.answer, sample.columns)
        for number, completion in enumerate(completions, start=1):
            turn = environment.step(completion)
            fault = _fault(turn)
            if not fault and turn.done and number < len(completions):
                fault = f"turn {number} ends an episode that has {len(completions)}: it must always do the same"
            if fault:
                break
            total += float(turn.reward)
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:
        raise DataError(f"{place} raised {describe(error)}") from error
    if not fault and finite_number(total) is None:
        fault = f"the sum of the rewards must be finite, got {total}"
    if fault:
        raise DataError(f"{place} {fault}")
    return Turn(reply=turn.reply, reward=total, done=turn.done)


def _fault(turn: Any) -> str:
    """Why `turn` is not valid; empty if it is."""
    if not isinstance(turn, Turn):
        return f"step must return a Turn, got {turn!r:.80}"
    if not isinstance(turn.reply, str) or not (turn.reply or turn.done):
        return f"Turn.reply must be a text that is not empty unless the episode is done, got {turn.reply!r:.80}"
    if finite_number(turn.reward) is None:
        return f"Turn.reward must be a finite number, got {turn.reward!r:.80}"
    return ""

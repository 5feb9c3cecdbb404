"""Rewards: what `tasks.reward` names, as functions from a completion to a number. Does not import torch.

    math                      a built-in verifier: 1 if correct, else 0
    module:function           a user's own function
    a name                    an entry point of an installed package, in the group `sgpo_async.rewards`
    {math: 1.0, ...: 0.1}     a weighted sum of several

A lease holds this as one text: the name, or the mapping as JSON. A user's function gets a `Sample` and returns any
finite number. It runs in a worker process (see `reward_worker`), because it may hang or exhaust the memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from numbers import Real
from typing import TYPE_CHECKING, Any

from sgpo_async.errors import DataError
from sgpo_async.tasks.functions import describe, import_function, is_own
from sgpo_async.tasks.verify import VERIFIERS

if TYPE_CHECKING:  # a worker needs neither the configuration nor the messages; their import would delay its start
    from sgpo_async.config.schema import Tasks
    from sgpo_async.tasks.base import Problem
    from sgpo_async.wire.records import Lease

GROUP = "sgpo_async.rewards"  # of entry points


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a reward function gets: one completion, and the problem that it is for."""

    problem: str = ""
    answer: str
    completion: str
    columns: Mapping[str, Any] = field(default_factory=dict)  # the other columns of the problem's record


Reward = Callable[[Sample], float]


def sample_of(problem: Problem | Lease, completion: str) -> Sample:
    """What a reward function gets for a completion of `problem`."""
    columns = json.loads(problem.columns or "{}")
    return Sample(problem=problem.problem, answer=problem.answer, completion=completion, columns=columns)


def to_text(reward: str | Mapping[str, float]) -> str:
    """The text form of `tasks.reward`."""
    return reward if isinstance(reward, str) else json.dumps(reward)


def weights_of(text: str) -> dict[str, float]:
    """The inverse of `to_text`: the weight of each name."""
    return json.loads(text) if text.startswith("{") else {text: 1.0}


def is_builtin(text: str) -> bool:
    """Whether only built-in verifiers are named, which need no column but the answer."""
    return all(name in VERIFIERS for name in weights_of(text))


def has_own_code(tasks: Tasks) -> bool:
    """Whether rewards come from code of the user: a function, or an environment."""
    return bool(tasks.environment) or bool(tasks.reward and not is_builtin(to_text(tasks.reward)))


def load_reward(text: str) -> Reward:
    """The function that `text` stands for. It raises DataError (see `_checked`).

    Raises DataError if a name cannot be found.
    """
    parts = [(weight, _load(name)) for name, weight in weights_of(text).items()]
    if text in VERIFIERS:
        return parts[0][1]
    return lambda sample: float(sum(weight * part(sample) for weight, part in parts))


def _load(name: str) -> Reward:
    if name in VERIFIERS:
        verifier = VERIFIERS[name]
        return lambda sample: float(verifier(sample.answer, sample.completion))
    if is_own(name):
        return _checked(name, import_function("tasks.reward", name))
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        known = [*VERIFIERS, *sorted(point.name for point in entry_points(group=GROUP))]
        raise DataError(f"tasks.reward: must be one of {', '.join(known)}, or MODULE:FUNCTION, got {name!r}")
    try:
        return _checked(name, found[0].load())
    except (Exception, SystemExit) as error:
        raise DataError(f"tasks.reward: {name}: cannot load {found[0].value} ({describe(error)})") from error


def _checked(name: str, function: Callable[[Sample], Any]) -> Reward:
    """The function with a check of what it returns.

    It raises DataError, one line with function, problem and value, if the function raises or returns no finite number:
    a mistake in the function must not look like a wrong completion. MemoryError passes: it is a limit, as time is.
    """

    def reward(sample: Sample) -> float:
        try:
            value = function(sample)
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:
            raise DataError(
                f"reward {name}: raised {describe(error)} for the problem {_short(sample.problem)}"
            ) from error
        number = finite_number(value)
        if number is None:
            raise DataError(
                f"reward {name}: must return a finite number, got {_short(value)} for the problem "
                f"{_short(sample.problem)}; correct the function"
            )
        return number

    return reward


def finite_number(value: Any) -> float | None:
    """The number that a user's code has returned, also as a numpy scalar; None if it is no finite number."""
    try:
        number = float(value) if isinstance(value, Real) or _is_scalar(value) else math.nan
    except (OverflowError, TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _is_scalar(value: Any) -> bool:
    """Whether it is a number of another library, such as a numpy scalar or a tensor with one element."""
    return getattr(value, "shape", None) == () and hasattr(value, "__float__")


def _short(value: Any) -> str:
    return f"{' '.join(repr(value).split()):.80}"

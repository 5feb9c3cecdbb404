"""Checks of the reward before a run starts.

SelfCheck finds answers that do not verify against themselves: no completion can be correct, or only by chance.

An answer is put into a box, as a model is asked to, and judged by its own verifier. A reward function of the user
decides by itself what a completion looks like, so only built-in verifiers are checked.
"""

from __future__ import annotations

import os
import random
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from sgpo_async.config.schema import Run, Tasks
from sgpo_async.errors import CheckWarning, DataError
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.benchmarks import TOLERANT
from sgpo_async.tasks.reward_pool import RewardPool, Verdict
from sgpo_async.tasks.rewards import Sample, has_own_code, sample_of, to_text
from sgpo_async.tasks.tolerance import Tolerant

SAMPLE = 500  # answers that the check of a run looks at
NAMED = 5  # answers that a message names
CALLS = 4  # of a reward function


def check_reward(run: Run, problems: Sequence[Problem], *, sample: int = SAMPLE) -> str:
    """Check the reward of `run` on some of its problems, and say what was found.

    Raises SgpoError if `tasks.reward` or `tasks.environment` names nothing, or if the function or the environment
    raises, returns no finite number or exceeds its limits. Raises CheckWarning for answers that no built-in verifier
    accepts.
    """
    text = to_text(run.tasks.reward)
    if run.tasks.environment:
        return _play(run.tasks, problems[:CALLS])
    if has_own_code(run.tasks):
        return _call(run.tasks, text, problems[:CALLS])
    if run.tasks.source != "file" or text not in ("", "math"):
        return text or run.tasks.source
    found = SelfCheck.run(problems, sample=sample, tasks=run.tasks)
    if found.failed:
        raise CheckWarning(found.describe(), "correct these answers, or remove the problems")
    return found.describe()


def _play(tasks: Tasks, problems: Sequence[Problem]) -> str:
    """Play a first turn with the responses of these problems, or with their answers."""
    requests = [
        (number, tasks.environment, sample_of(one, one.response or one.answer)) for number, one in enumerate(problems)
    ]
    verdicts = _verdicts(tasks, requests, earlier=())
    _require_in_time(tasks, "tasks.environment", tasks.environment, verdicts)
    going = sum(verdict.reply is not None for verdict in verdicts)
    return f"{tasks.environment}: of {len(verdicts)} episodes {going} go on after a first turn"


def _require_in_time(tasks: Tasks, key: str, name: str, verdicts: Iterable[Verdict]) -> None:
    if any(verdict.timed_out for verdict in verdicts):
        raise DataError(
            f"{key}: {name} exceeded tasks.reward_limit_s={tasks.reward_limit_s:g} or "
            f"tasks.reward_memory_mb={tasks.reward_memory_mb}; raise the limit, or correct it"
        )


def _call(tasks: Tasks, text: str, problems: Sequence[Problem]) -> str:
    """Call a reward function with the responses of these problems, or with their answers in a box."""
    samples = [sample_of(one, one.response or f"\\boxed{{{one.answer}}}") for one in problems]
    verdicts = _verdicts(tasks, [(number, text, sample) for number, sample in enumerate(samples)])
    _require_in_time(tasks, "tasks.reward", text, verdicts)
    rewards = [verdict.reward for verdict in verdicts]
    found = f"rewards from {min(rewards):g} to {max(rewards):g} for {len(rewards)} responses or answers in a box"
    return f"{text}: {found}; correct from {tasks.solved_at:g} on"


def _verdicts(
    tasks: Tasks, requests: Iterable[tuple[Hashable, str, Sample]], earlier: Sequence[str] | None = None
) -> list[Verdict]:
    """The verdicts of all requests (key, reward, sample), within the limits of `tasks`."""
    cores = len(os.sched_getaffinity(0))
    pool = RewardPool(workers=cores, limit_s=tasks.reward_limit_s, memory_mb=tasks.reward_memory_mb)
    verdicts: list[Verdict] = []
    try:
        requests = list(requests)
        for key, reward, sample in requests:
            pool.submit(key, reward, sample, earlier=earlier)
        while len(verdicts) < len(requests):
            verdicts += pool.poll(1.0)  # ends: each request has a limit of time
        return verdicts
    finally:
        pool.close()


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """The result of a check."""

    examined: int  # problems
    total: int  # problems of which the examined ones are a random sample
    failed: tuple[Problem, ...]

    @classmethod
    def run(cls, problems: Sequence[Problem], *, sample: int, tasks: Tasks, verifier: str = "math") -> SelfCheck:
        """Check `sample` of the problems, drawn at random; every answer text once."""
        count = len(problems)
        chosen = sorted(random.Random("self-check").sample(range(count), min(sample, count)))
        examined = [problems[index] for index in chosen]
        answers = {(one.verifier or verifier, one.answer) for one in examined}
        requests = []
        for name, answer in answers:
            shown = Tolerant.from_text(answer).answer if name == TOLERANT else answer
            requests.append(((name, answer), name, Sample(answer=answer, completion=f"\\boxed{{{shown}}}")))
        right = {verdict.key for verdict in _verdicts(tasks, requests) if verdict.reward == 1.0}
        failed = tuple(one for one in examined if (one.verifier or verifier, one.answer) not in right)
        return cls(examined=len(examined), total=count, failed=failed)

    def describe(self) -> str:
        """How many answers fail, and the first of them, with their places."""
        of = f"{self.examined:,} answers" + (f" (a sample of {self.total:,})" if self.examined < self.total else "")
        if not self.failed:
            return f"{of}: each is correct by its own verifier"
        first = ", ".join(f"{one.id} {one.answer!r:.40}" for one in self.failed[:NAMED])
        rest = f" and {len(self.failed) - NAMED:,} more" if len(self.failed) > NAMED else ""
        return f"{len(self.failed):,} of {of} are not correct by their own verifier: {first}{rest}"

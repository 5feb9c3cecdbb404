"""Finds answers that do not verify against themselves: no completion can be correct, or only by chance.

An answer is put into a box, as a model is asked to, and judged by its own verifier. A reward function of the user
decides by itself what a completion looks like, so only built-in verifiers are checked.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.benchmarks import TOLERANT
from sgpo_async.tasks.reward_pool import RewardPool
from sgpo_async.tasks.rewards import Sample
from sgpo_async.tasks.tolerance import Tolerant

LIMIT_S = 3.0
NAMED = 5  # answers that a message names


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """The result of a check."""

    examined: int  # problems
    total: int  # problems of which the examined ones are a random sample
    failed: tuple[Problem, ...]

    @classmethod
    def run(cls, problems: Sequence[Problem], *, sample: int, verifier: str = "math") -> SelfCheck:
        """Check `sample` of the problems, drawn at random; every answer text once."""
        count = len(problems)
        chosen = sorted(random.Random("self-check").sample(range(count), min(sample, count)))
        examined = [problems[index] for index in chosen]
        answers = {(one.verifier or verifier, one.answer) for one in examined}
        pool = RewardPool(workers=len(os.sched_getaffinity(0)), limit_s=LIMIT_S)
        try:
            for name, answer in answers:
                shown = Tolerant.from_text(answer).answer if name == TOLERANT else answer
                pool.submit((name, answer), name, Sample(answer=answer, completion=f"\\boxed{{{shown}}}"))
            right, waiting = set(), len(answers)
            while waiting:
                verdicts = pool.poll(1.0)
                right |= {verdict.key for verdict in verdicts if verdict.reward == 1.0}
                waiting -= len(verdicts)
        finally:
            pool.close()
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

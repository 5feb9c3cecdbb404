"""Pass rates on held-out problems and benchmarks, measured by the actors while training goes on.

One round is one task per problem, all served by the version asked for or a newer one. Rounds run one after another,
before training tasks wherever an actor holds a version that is new enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np

from sgpo_async.hub.batch_metrics import lag, mean_of_known
from sgpo_async.hub.leases import LeaseTable
from sgpo_async.metrics.problems import ProblemResult, summarise
from sgpo_async.rollout.completed import CompletedGroup
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.benchmarks import Benchmark
from sgpo_async.tasks.task_sampler import TaskSampler
from sgpo_async.wire.records import BenchmarkScore, Evaluated, Lease

RESAMPLES = 1000  # the hub's one thread does it


class Evaluation:
    """Rounds asked for, the one that runs, and results so far."""

    def __init__(self, task_sampler: TaskSampler, *, version: int = 0, first_attempt: int = 0) -> None:
        self.task_sampler = task_sampler
        self.leases = LeaseTable(first_attempt=first_attempt, keeps_tokens=False)  # a benchmark's would be a gigabyte
        self.first_version = version  # tokens of older weights belong to another past
        self.asked: deque[int] = deque()  # versions whose round has not begun
        self.current: int | None = None  # version of the round that runs
        self.begun = 0  # rounds
        self.results: list[Evaluated] = []  # once delivered, without problems

    @property
    def problems(self) -> int:
        """Tasks of a round."""
        return self.task_sampler.round_size

    def ask(self, version: int) -> Evaluated | None:
        """The result for `version`, if it is known; otherwise its round will run."""
        done = [result for result in self.results if result.version == version]
        if not done and version != self.current and version not in self.asked:
            self.asked.append(version)
        return done[0] if done else None

    def delivered(self, version: int) -> None:
        """Keep the figures of this round alone: the learner has its problems, which checkpoints need not carry."""
        self.results = [without_problems(one) if one.version == version else one for one in self.results]

    def advance(self, version: int) -> Evaluated | None:
        """End the round that is complete and return its result; begin the next one if none runs.

        `version` is the learner's.
        """
        done = self.current is not None and not (self.leases.waiting or self.leases.running)
        result = self._end(version) if done else None
        if self.current is None and self.asked:
            self._begin(self.asked.popleft())
        return result

    def dispatched(self, number: int) -> bool:
        """Whether there ever was an evaluation task of this number."""
        return -self.begun * self.problems <= number < 0

    def lowest_version(self) -> int | None:
        """The lowest version that may serve the next lease; None if there is nothing to lease."""
        if not self.leases.waiting:
            return None
        assert self.current is not None
        return max(self.current, self.first_version)

    def lease(self, member: bytes, *, min_version: int, now: float) -> Lease:
        """Lease the next task of the round to `member`."""
        return self.leases.lease(member, min_version=min_version, now=now)

    def _begin(self, version: int) -> None:
        self.current = version
        first = -1 - self.begun * self.problems
        self.begun += 1
        for number in range(first, first - self.problems, -1):
            self.leases.add(self.task_sampler.task(number))

    def _end(self, learner_version: int) -> Evaluated:
        assert self.current is not None
        groups = self.leases.train(list(self.leases.complete))
        result = evaluated(groups, asked=self.current, learner_version=learner_version, task_sampler=self.task_sampler)
        self.results.append(result)
        self.current = None
        return result


def evaluated(
    groups: Sequence[CompletedGroup], *, asked: int, learner_version: int, task_sampler: TaskSampler
) -> Evaluated:
    """Mean pass rates over problems; `pass_guided` over held-out ones that have a strategy, 0 if none has."""
    of = [task_sampler.benchmark(group.number) for group in groups]
    held_out = [group for group, benchmark in zip(groups, of, strict=True) if benchmark is None]
    versions = [rollout.versions for group in groups for rollout in group.rollouts] or [np.array([asked])]
    return Evaluated(
        version=asked,
        pass_auto=mean_of_known([group.pass_rate(guided=False) for group in held_out]) or 0.0,
        pass_guided=mean_of_known([group.pass_rate(guided=True) for group in held_out]) or 0.0,
        problems=len(held_out),
        served_oldest=int(min(spans.min() for spans in versions)),
        served_newest=int(max(spans.max() for spans in versions)),
        lag=lag(groups, version=learner_version)["mean"] if groups else 0.0,
        benchmarks=tuple(
            score(
                benchmark, [group for group, owner in zip(groups, of, strict=True) if owner is benchmark], task_sampler
            )
            for benchmark in task_sampler.benchmarks
        ),
    )


def without_problems(result: Evaluated) -> Evaluated:
    """All but what became of each problem of its benchmarks."""
    return replace(result, benchmarks=tuple(replace(score, results={}) for score in result.benchmarks))


def score(benchmark: Benchmark, groups: Sequence[CompletedGroup], task_sampler: TaskSampler) -> BenchmarkScore:
    """The figures of a benchmark over the problems that could be served, as `sgpo-async evaluate` works them out."""
    results = [_result(task_sampler.task(group.number).problem, group) for group in groups]
    found = summarise(results, resamples=RESAMPLES) if results else {}
    avg = found.get("avg") or dict.fromkeys(("mean", "low", "high"))
    return BenchmarkScore(
        name=benchmark.name,
        avg=avg["mean"],
        low=avg["low"],
        high=avg["high"],
        samples=benchmark.samples,
        problems=len(groups),
        pass_at=found.get("pass", {}),
        results={result.id: asdict(result) for result in results},
    )


def _result(problem: Problem, group: CompletedGroup) -> ProblemResult:
    rollouts = [rollout for rollout in group.rollouts if not rollout.guided]
    return ProblemResult(
        id=problem.id,
        digest=problem.digest,
        correct=[rollout.reward == 1.0 for rollout in rollouts],
        tokens=[int(rollout.ends[-1]) for rollout in rollouts],
        finish=[rollout.finish for rollout in rollouts],
        timed_out=[],
    )

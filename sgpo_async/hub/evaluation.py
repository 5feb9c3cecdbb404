"""Pass rates on held-out problems and benchmarks, measured by the actors while training continues.

    request ──▶ requested ── round begins ──▶ leases (one task per problem) ── round ends ──▶ results ──▶ learner

All tasks of a round are served by the requested weight version or a newer one. One round runs at a time. An actor
whose version is new enough gets evaluation tasks before training tasks.
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
from sgpo_async.wire.records import OBSERVED, BenchmarkScore, Evaluated, Lease

RESAMPLES = 1000  # bootstrap resamples; few, because the hub's only thread computes them


class Evaluation:
    """The requested rounds, the running round, and the results so far."""

    def __init__(self, task_sampler: TaskSampler, *, version: int = 0, first_attempt: int = 0) -> None:
        """`version` is the oldest version that may serve tasks; `first_attempt` numbers the first lease of a task."""
        self.task_sampler = task_sampler
        # Without tokens, because those of a benchmark can take a gigabyte.
        self.leases = LeaseTable(first_attempt=first_attempt, keeps_tokens=False)
        self.first_version = version  # older weights were made before the last restore
        self.requested: deque[int] = deque()  # versions whose round has not begun
        self.current: int | None = None  # version of the running round
        self.begun = 0  # number of rounds begun
        self.results: list[Evaluated] = []  # those of single problems only in the last delivered one and later ones
        self.delivered: int | None = None  # version of the result that was last sent to the learner

    @property
    def round_size(self) -> int:
        """Number of tasks in a round."""
        return self.task_sampler.round_size

    def request(self, version: int) -> Evaluated | None:
        """Return the result for `version` if there is one; otherwise queue a round for it."""
        done = [result for result in self.results if result.version == version]
        if not done and version != self.current and version not in self.requested:
            self.requested.append(version)
        return done[0] if done else None

    def mark_delivered(self, version: int) -> None:
        """Record that the result of `version` was sent to the learner, which may still lose it and ask again.

        The results of single problems in the result sent before are no longer needed, and are removed.
        """
        if version != self.delivered:
            self.results = self.lean_results()
        self.delivered = version

    def lean_results(self) -> list[Evaluated]:
        """The results; the one that was sent to the learner without the results of single problems."""
        return [without_problem_results(one) if one.version == self.delivered else one for one in self.results]

    def advance(self, version: int) -> Evaluated | None:
        """End the running round if it is complete, and return its result; then begin the next one if none runs.

        `version` is the learner's current weight version.
        """
        done = self.current is not None and not (self.leases.waiting or self.leases.running)
        result = self._end(version) if done else None
        if self.current is None and self.requested:
            self._begin(self.requested.popleft())
        return result

    def has_dispatched(self, number: int) -> bool:
        """Whether an evaluation task with this number has ever been dispatched."""
        return -self.begun * self.round_size <= number < 0

    def lowest_version(self) -> int | None:
        """The lowest weight version that may serve the next lease; None if there is no task to lease."""
        if not self.leases.waiting:
            return None
        assert self.current is not None
        return max(self.current, self.first_version)

    def lease(self, member: bytes, *, min_version: int, now: float) -> Lease:
        """Lease the next task of the round to `member`."""
        return self.leases.lease(member, min_version=min_version, now=now)

    def _begin(self, version: int) -> None:
        self.current = version
        first = -1 - self.begun * self.round_size
        self.begun += 1
        for number in range(first, first - self.round_size, -1):
            self.leases.add(self.task_sampler.task(number))

    def _end(self, learner_version: int) -> Evaluated:
        assert self.current is not None
        groups = self.leases.train(list(self.leases.complete))
        result = summarise_round(
            groups, requested=self.current, learner_version=learner_version, task_sampler=self.task_sampler
        )
        self.results.append(result)
        self.current = None
        return result


def summarise_round(
    groups: Sequence[CompletedGroup], *, requested: int, learner_version: int, task_sampler: TaskSampler
) -> Evaluated:
    """The result of a round for the `requested` version.

    Pass rates are means over held-out problems. `pass_guided` is the mean over those that have a strategy, and 0 if
    none has one.
    """
    benchmark_of = [task_sampler.benchmark(group.number) for group in groups]
    held_out = [group for group, benchmark in zip(groups, benchmark_of, strict=True) if benchmark is None]
    versions = [rollout.versions[rollout.versions != OBSERVED] for group in groups for rollout in group.rollouts] or [
        np.array([requested])
    ]
    scores = []
    for benchmark in task_sampler.benchmarks:
        own = [group for group, owner in zip(groups, benchmark_of, strict=True) if owner is benchmark]
        scores.append(score_benchmark(benchmark, own, task_sampler))
    return Evaluated(
        version=requested,
        pass_auto=mean_of_known([group.pass_rate(guided=False) for group in held_out]) or 0.0,
        pass_guided=mean_of_known([group.pass_rate(guided=True) for group in held_out]) or 0.0,
        problems=len(held_out),
        served_oldest=int(min(spans.min() for spans in versions)),
        served_newest=int(max(spans.max() for spans in versions)),
        lag=lag(groups, version=learner_version)["mean"] if groups else 0.0,
        benchmarks=tuple(scores),
    )


def without_problem_results(result: Evaluated) -> Evaluated:
    """A copy of `result` that keeps the metrics of each benchmark and drops the results of its single problems."""
    return replace(result, benchmarks=tuple(replace(score, results={}) for score in result.benchmarks))


def score_benchmark(
    benchmark: Benchmark, groups: Sequence[CompletedGroup], task_sampler: TaskSampler
) -> BenchmarkScore:
    """The metrics of a benchmark over the problems that the actors could serve.

    They are computed by the same function as those of `sgpo-async evaluate`.
    """
    results = [_problem_result(task_sampler.task(group.number).problem, group) for group in groups]
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


def _problem_result(problem: Problem, group: CompletedGroup) -> ProblemResult:
    rollouts = [rollout for rollout in group.rollouts if not rollout.guided]
    return ProblemResult(
        id=problem.id,
        digest=problem.digest,
        correct=[rollout.correct for rollout in rollouts],
        tokens=[int(rollout.ends[-1]) for rollout in rollouts],
        finish=[rollout.finish for rollout in rollouts],
        timed_out=[],
    )

"""Maps the number of a task to its problem. Hub and learner compute this independently and exchange nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from sgpo_async.config.schema import Run
from sgpo_async.tasks.base import Problem, ProblemSource
from sgpo_async.tasks.benchmarks import Benchmark
from sgpo_async.wire.records import Lease, Purpose


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions of a task are sampled."""

    temperature: float
    top_p: float
    max_new_tokens: int
    top_k: int = 0
    top_logprobs_num: int = 0


@dataclass(frozen=True, kw_only=True)
class Task:
    """One problem to be rolled out, independent of the actor and of the attempt.

    Training tasks are numbered by their position in the stream of problems, 0, 1, 2, ...; evaluation tasks count
    down, -1, -2, ..., so the number alone identifies a task.
    """

    number: int
    purpose: Purpose
    problem: Problem
    verifier: str
    autonomous: int
    guided: int
    seed: int
    sampling: Sampling
    solved_at: float = 1.0  # a rollout is correct if its reward is at least this
    unguided_scores: bool = False  # whether correct guided rollouts are scored without their strategy, for Eq. 4
    cut_scores: bool = True  # whether a completion that max_new_tokens has cut is judged
    turns: int = 0  # most completions of an episode with an environment, which `verifier` names; 0: no environment

    @property
    def size(self) -> int:
        """Rollouts in the group."""
        return self.autonomous + self.guided

    def lease(self, *, attempt: int, min_version: int) -> Lease:
        """The lease that an actor receives for this task."""
        return Lease(
            task=self.number,
            attempt=attempt,
            purpose=self.purpose,
            problem=self.problem.problem,
            answer=self.problem.answer,
            verifier=self.verifier,
            strategy=self.problem.strategy,
            autonomous=self.autonomous,
            guided=self.guided,
            min_version=min_version,
            seed=self.seed,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_new_tokens=self.sampling.max_new_tokens,
            top_k=self.sampling.top_k,
            top_logprobs_num=self.sampling.top_logprobs_num,
            unguided_scores=self.unguided_scores,
            solved_at=self.solved_at,
            cut_scores=self.cut_scores,
            turns=self.turns,
            columns=self.problem.columns,
        )


class TaskSampler:
    """Makes tasks from problems: a task is a function of its number and the configuration.

    An evaluation round consists of all held-out problems, followed by those of each benchmark.
    """

    def __init__(self, run: Run, source: ProblemSource, benchmarks: Sequence[Benchmark] = ()) -> None:
        self._run, self._source = run, source
        self.benchmarks = benchmarks
        self._round: list[tuple[Problem, Benchmark | None]] = [(problem, None) for problem in source.held_out()]
        self._round += [(problem, benchmark) for benchmark in benchmarks for problem in benchmark.problems]

    @property
    def round_size(self) -> int:
        """The number of tasks in one evaluation round."""
        return len(self._round)

    def benchmark(self, number: int) -> Benchmark | None:
        """The benchmark of the evaluation task `number` < 0; None for a held-out problem."""
        return self._round[(-1 - number) % self.round_size][1]

    def task(self, number: int) -> Task:
        """The training task at position `number` >= 0, or the evaluation task `number` < 0."""
        return self._training(number) if number >= 0 else self._evaluation(number)

    def _training(self, number: int) -> Task:
        problem, sizes, tasks = self._source.training(number), self._run.rollout, self._run.tasks
        return Task(
            number=number,
            purpose="train",
            problem=problem,
            verifier=tasks.environment or problem.verifier or self._source.verifier,
            autonomous=sizes.autonomous,
            guided=sizes.guided if problem.strategy else 0,
            seed=derived_seed(self._run.seed, "train", number),
            sampling=Sampling(
                temperature=sizes.temperature,
                top_p=sizes.top_p,
                max_new_tokens=sizes.max_new_tokens,
                top_k=sizes.top_k,
                top_logprobs_num=self._run.algorithm.top_logprobs_num,
            ),
            unguided_scores=self._run.algorithm.unguided_scores,
            solved_at=tasks.solved_at,
            cut_scores=sizes.cut == "score",
            turns=tasks.max_turns if tasks.environment else 0,
        )

    def _evaluation(self, number: int) -> Task:
        """Every round has the same problems and seeds, so that rounds are compared in pairs."""
        index = (-1 - number) % self.round_size
        problem, benchmark = self._round[index]
        settings, tasks = self._run.evaluation, self._run.tasks
        environment = "" if benchmark else tasks.environment
        samples = benchmark.samples if benchmark else settings.samples
        return Task(
            number=number,
            purpose="evaluate",
            problem=problem,
            verifier=environment or problem.verifier or (benchmark.verifier if benchmark else self._source.verifier),
            autonomous=samples,
            guided=samples if problem.strategy and not benchmark else 0,
            seed=derived_seed(self._run.seed, "evaluate", index),
            sampling=Sampling(
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_new_tokens=self._run.rollout.max_new_tokens,
            ),
            solved_at=benchmark.solved_at if benchmark else tasks.solved_at,
            turns=tasks.max_turns if environment else 0,
        )


def derived_seed(*parts: int | str) -> int:
    """A 56-bit seed. It does not depend on the attempt, so a reissued task repeats the same sampling."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())

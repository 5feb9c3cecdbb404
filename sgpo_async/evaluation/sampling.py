"""Samples and judges problems with one engine, by the same loop as an actor (`sgpo_async.rollout.sampler`).

    problems ─▶ leases ─▶ RolloutSampler ─▶ ProblemResult, as problems become complete

All requests are queued at once, problem by problem, so that the engine never lacks work and a problem that can never be
served is found before the first token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sgpo_async.engines.base import Engine
from sgpo_async.errors import DeadlineExceeded, EngineError
from sgpo_async.evaluation.evaluation_plan import EvaluationPlan
from sgpo_async.metrics.problems import ProblemResult
from sgpo_async.rollout.sampler import RolloutSampler, Sampled, Unservable
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.benchmarks import Benchmark
from sgpo_async.tasks.task_sampler import derived_seed
from sgpo_async.wire.records import Lease

WAIT_S = 0.05  # for a result of the engine, or a verdict

Item = tuple[Benchmark, Problem]


@dataclass(kw_only=True)
class _Open:
    """A problem whose samples are not all judged."""

    item: Item
    samples: dict[int, Sampled] = field(default_factory=dict)  # by slot


class Evaluator:
    """Samples and judges problems as `plan` says. `report` is called with each event of the engine, one line."""

    def __init__(self, plan: EvaluationPlan, engine: Engine, tokenizer: Any, *, report: Callable[[str], None]) -> None:
        self._plan, self._engine, self._report = plan, engine, report
        self._sampler = RolloutSampler(engine, tokenizer, plan.run.tasks)
        self._open: dict[int, _Open] = {}

    def close(self) -> None:
        """End the verifiers."""
        self._sampler.close()

    def results(self, items: Sequence[Item], *, texts: bool) -> Iterator[tuple[str, ProblemResult]]:
        """(benchmark, result) of each problem once its last sample is judged; with the completions if `texts`.

        Raises EngineError for a problem that the model cannot take. Raises DeadlineExceeded if for
        learner.batch_timeout_s the engine runs nothing and no verdict comes: while it runs something, the engine's own
        deadlines hold.
        """
        for number, item in enumerate(items):
            self._submit(number, item)
        patience = self._plan.run.learner.batch_timeout_s
        progress = time.monotonic()
        while self._open:
            for line in self._engine.events():
                self._report(line)
            busy = self._engine.load_status().running > 0
            outcomes = self._sampler.step(WAIT_S, 0.0 if busy else WAIT_S)
            if busy or outcomes:
                progress = time.monotonic()
            for outcome in outcomes:
                if (finished := self._take(outcome)) is not None:
                    yield finished.item[0].name, _result(finished, texts=texts)
            if time.monotonic() - progress > patience:
                raise DeadlineExceeded(
                    "evaluation", f"finished completion or verdict ({len(self._open)} open)", patience
                )

    def _submit(self, number: int, item: Item) -> None:
        benchmark, problem = item
        try:
            self._sampler.add(self._lease(number, benchmark, problem))
        except EngineError as error:
            raise EngineError(f"{benchmark.name}: problem {problem.id}: {error}") from None
        self._open[number] = _Open(item=item)

    def _take(self, outcome: Sampled | Unservable) -> _Open | None:
        """Keep a sample; returns its problem if this was the last sample of it."""
        if isinstance(outcome, Unservable):
            benchmark, problem = self._open[outcome.lease.task].item
            raise EngineError(f"{benchmark.name}: problem {problem.id}: {outcome.error}")
        number = outcome.rollout.task
        self._open[number].samples[outcome.rollout.slot] = outcome
        return self._open.pop(number) if outcome.last else None

    def _lease(self, number: int, benchmark: Benchmark, problem: Problem) -> Lease:
        """The seed depends on the problem alone, so samples do not depend on which problems are already done."""
        plan = self._plan
        return Lease(
            task=number,
            attempt=0,
            purpose="evaluate",
            problem=problem.problem,
            answer=problem.answer,
            verifier=problem.verifier or benchmark.verifier,
            strategy=problem.strategy,
            autonomous=0 if plan.guided else benchmark.samples,
            guided=benchmark.samples if plan.guided else 0,
            min_version=0,
            seed=derived_seed(plan.run.seed, "evaluate", benchmark.name, problem.id),
            temperature=plan.temperature,
            top_p=plan.top_p,
            max_new_tokens=plan.run.rollout.max_new_tokens,
            solved_at=benchmark.solved_at,
            columns=problem.columns,
        )


def _result(one: _Open, *, texts: bool) -> ProblemResult:
    _, problem = one.item
    samples = [one.samples[slot] for slot in sorted(one.samples)]
    rollouts = [sample.rollout for sample in samples]
    return ProblemResult(
        id=problem.id,
        digest=problem.digest,
        correct=[rollout.correct for rollout in rollouts],
        tokens=[len(rollout.tokens) for rollout in rollouts],
        finish=[rollout.finish for rollout in rollouts],
        timed_out=[sample.timed_out for sample in samples],
        texts=[sample.text for sample in samples] if texts else None,
    )

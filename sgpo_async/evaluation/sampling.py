"""Completions of problems from one engine, judged. The bookkeeping is the actors' own (`sgpo_async.rollout.group`).

    problems ─▶ leases ─▶ requests ─▶ engine.step ─▶ verifier ─▶ ProblemResult, as problems become complete

All requests are queued at once, problem by problem, so that the engine is never short of work and a problem that can
never be served is found before the first token. The loop waits in `engine.step` while an engine elsewhere works, and
for verdicts once everything is generated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sgpo_async.engines.base import Engine, Failed, Generated
from sgpo_async.errors import DeadlineExceeded, EngineError
from sgpo_async.evaluation.evaluation_plan import EvaluationPlan
from sgpo_async.metrics.problems import ProblemResult
from sgpo_async.rollout.group import RolloutGroup, group_of, task_of
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.benchmarks import Benchmark
from sgpo_async.tasks.prompts import build_prompt
from sgpo_async.tasks.reward_pool import RewardPool, Verdict
from sgpo_async.tasks.task_sampler import derived_seed
from sgpo_async.wire.records import Lease, Rollout

WAIT_S = 0.05  # for a result of the engine, or a verdict

Item = tuple[Benchmark, Problem]


@dataclass(kw_only=True)
class _Open:
    """A problem whose samples are not all judged."""

    item: Item
    group: RolloutGroup
    texts: dict[int, str] = field(default_factory=dict)  # by slot, as everything here
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    timed_out: set[int] = field(default_factory=set)


class Sampler:
    """Samples and judges problems as `plan` says; `tell` gets the engine's news, a line each."""

    def __init__(self, plan: EvaluationPlan, engine: Engine, tokenizer: Any, *, tell: Callable[[str], None]) -> None:
        self._plan, self._engine, self._tokenizer, self._tell = plan, engine, tokenizer, tell
        tasks = plan.run.tasks
        self._rewards = RewardPool(workers=tasks.reward_workers, limit_s=tasks.reward_limit_s)
        self._open: dict[tuple[int, int], _Open] = {}

    def close(self) -> None:
        """End the verifiers."""
        self._rewards.close()

    def results(self, items: Sequence[Item], *, texts: bool) -> Iterator[tuple[str, ProblemResult]]:
        """(benchmark, result) of each problem once its last sample is judged; with the completions if `texts`.

        Raises EngineError for a problem that the model cannot take, DeadlineExceeded if for learner.batch_timeout_s
        the engine runs nothing and no verdict comes. Of what it runs, the engine itself is in charge.
        """
        for number, item in enumerate(items):
            self._submit(number, item)
        patience = self._plan.run.learner.batch_timeout_s
        moved = time.monotonic()
        while self._open:
            for line in self._engine.news():
                self._tell(line)
            busy = self._generate()
            judged = self._judge(0.0 if busy else WAIT_S)
            moved = time.monotonic() if busy or judged else moved
            for key in [key for key, one in self._open.items() if one.group.done]:
                one = self._open.pop(key)
                yield one.item[0].name, _result(one, texts=texts)
            if time.monotonic() - moved > patience:
                raise DeadlineExceeded(
                    "evaluation", f"finished completion or verdict ({len(self._open)} open)", patience
                )

    def _submit(self, number: int, item: Item) -> None:
        benchmark, problem = item
        group = group_of(self._lease(number, benchmark, problem), prompt=self._prompt)
        try:
            for request in group.requests():
                self._engine.submit(request)
        except EngineError as error:
            raise EngineError(f"{benchmark.name}: problem {problem.id}: {error}") from None
        self._open[number, 0] = _Open(item=item, group=group)

    def _lease(self, number: int, benchmark: Benchmark, problem: Problem) -> Lease:
        """Seeds depend on the problem alone, so that what is sampled does not depend on what is done already."""
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
        )

    def _generate(self) -> bool:
        """One step of the engine; whether it has anything to do."""
        for result in self._engine.step(WAIT_S):
            one = self._open[task_of(result.id)]
            if isinstance(result, Failed):
                raise EngineError(f"{one.item[0].name}: problem {one.item[1].id}: {result.error}")
            assert isinstance(result, Generated), "nothing is scored in an evaluation"
            one.group.generated(result)
            text = self._tokenizer.decode(result.tokens, skip_special_tokens=True)
            one.texts[_slot(result.id)] = text
            self._rewards.submit(result.id, one.group.lease.verifier, one.group.lease.answer, text)
        return self._engine.load_status().running > 0

    def _judge(self, wait_s: float) -> bool:
        """Take verdicts, after waiting at most `wait_s` seconds for the first; whether there were any."""
        verdicts = self._rewards.poll(wait_s)
        for verdict in verdicts:
            self._judged(self._open[task_of(verdict.key)], verdict)
        return bool(verdicts)

    def _judged(self, one: _Open, verdict: Verdict) -> None:
        rollout = one.group.judged(verdict.key, correct=verdict.correct)
        assert isinstance(rollout, Rollout), "nothing is scored in an evaluation"
        one.rollouts[rollout.slot] = rollout
        if verdict.timed_out:
            one.timed_out.add(rollout.slot)

    def _prompt(self, problem: str, strategy: str | None) -> list[int]:
        return build_prompt(problem, strategy, style=self._plan.run.tasks.prompt, tokenizer=self._tokenizer)


def _result(one: _Open, *, texts: bool) -> ProblemResult:
    _, problem = one.item
    rollouts = [one.rollouts[slot] for slot in sorted(one.rollouts)]
    return ProblemResult(
        id=problem.id,
        digest=problem.digest,
        correct=[rollout.reward == 1.0 for rollout in rollouts],
        tokens=[len(rollout.tokens) for rollout in rollouts],
        finish=[rollout.finish for rollout in rollouts],
        timed_out=[rollout.slot in one.timed_out for rollout in rollouts],
        texts=[one.texts[rollout.slot] for rollout in rollouts] if texts else None,
    )


def _slot(key: object) -> int:
    assert isinstance(key, tuple)
    return int(key[2])

"""The rollout loop: leases in, judged rollouts out. Actors, evaluations and benchmarks of throughput share it.

    add(lease) ─▶ requests ─▶ engine ─▶ completion ─▶ verifier ─▶ verdict ─┬──────────────────────────▶ Sampled
                                ▲ ▲                                        ├▶ Score (Eq. 4) ─▶ engine ─▶ Sampled
                                │ └── correct guided rollouts of training ─┘
                                └──── the reply of an environment, if the episode goes on

`step` waits inside the engine, and for a verdict if it is asked to; nothing else here waits. The caller supplies the
leases and uses the rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sgpo_async.config.schema import Tasks
from sgpo_async.engines.base import Engine, Failed, Generate, Generated, Score
from sgpo_async.errors import EngineError
from sgpo_async.rollout.group import RolloutGroup, group_of, task_of
from sgpo_async.tasks.prompts import build_prompt, build_reply
from sgpo_async.tasks.reward_pool import RewardPool
from sgpo_async.tasks.rewards import sample_of
from sgpo_async.wire.records import Lease, Progress, Rollout

LeaseKey = tuple[int, int]
"""(task, attempt)."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A finished rollout."""

    rollout: Rollout
    text: str  # the completion, decoded
    timed_out: bool  # the verifier exceeded its limit of time or memory; the reward is 0
    last: bool  # every rollout of its lease is finished now


@dataclass(frozen=True, kw_only=True)
class Unservable:
    """A lease that the engine could not serve to the end. Its other requests are cancelled."""

    lease: Lease
    error: EngineError


class RolloutSampler:
    """Samples and judges the rollouts of leases with one engine. Close it to end the verifiers.

    Args:
        engine: holds a version of the weights whenever `add` is called.
        tokenizer: of the model; it encodes prompts and decodes completions.
        tasks: style of the prompts, number of verifier processes and their limits.
    """

    def __init__(self, engine: Engine, tokenizer: Any, tasks: Tasks) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._tasks = tasks
        self._prompt: Callable[[str, str | None], Sequence[int]] = lambda problem, strategy: build_prompt(
            problem, strategy, tasks=tasks, tokenizer=tokenizer
        )
        self._rewards = RewardPool(
            workers=tasks.reward_workers, limit_s=tasks.reward_limit_s, memory_mb=tasks.reward_memory_mb
        )
        self._groups: dict[LeaseKey, RolloutGroup] = {}
        self._texts: dict[object, tuple[str, bool]] = {}  # by rollout: the completion, whether its verdict timed out

    @property
    def leases(self) -> list[Lease]:
        """The leases that have unfinished rollouts."""
        return [group.lease for group in self._groups.values()]

    @property
    def unfinished(self) -> int:
        """Number of unfinished rollouts."""
        return sum(group.unfinished for group in self._groups.values())

    @property
    def generating(self) -> int:
        """Number of these whose completion, or the next turn of whose episode, is not there yet."""
        return sum(group.generating for group in self._groups.values())

    def add(self, lease: Lease) -> None:
        """Submit all requests of `lease`. Raises EngineError, and submits none, if the engine can never serve one."""
        group = group_of(lease, prompt=self._prompt)
        requests = group.requests()
        try:
            for request in requests:
                if isinstance(request, Generate):
                    self._engine.submit(request)
        except EngineError:
            self._engine.cancel(group.rollout_ids())
            raise
        self._groups[lease.task, lease.attempt] = group
        for request in requests:
            if isinstance(request, Generated):  # completed by another actor, but not judged
                self._submit_for_verdict(group, request)

    def cancel(self, task: int, attempt: int) -> bool:
        """Stop working on a lease; False if it is not one of `leases`."""
        group = self._groups.get((task, attempt))
        if group:
            self._drop(group)
        return group is not None

    def progress(self, *, whole: bool = False) -> list[Progress]:
        """What the unfinished rollouts have sampled since the last report, by lease; with `whole`, all their tokens."""
        groups = self._groups.values()
        running = self._engine.progress([id for group in groups for id in group.rollout_ids()])
        reports = [group.progress(running, whole=whole) for group in groups]
        return [report for report in reports if report]

    def step(self, engine_wait_s: float, verdict_wait_s: float = 0.0) -> list[Sampled | Unservable]:
        """One step of the engine, then the verdicts that are there; returns what is finished or failed.

        Args:
            engine_wait_s: how long an engine that uses servers may wait for a result.
            verdict_wait_s: how long to wait for the first verdict.
        """
        return [*self._generate(engine_wait_s), *self._judge(verdict_wait_s)]

    def close(self) -> None:
        """End the verifiers; unfinished rollouts stay unfinished."""
        self._rewards.close()

    def _generate(self, wait_s: float) -> list[Sampled | Unservable]:
        finished: list[Sampled | Unservable] = []
        for result in self._engine.step(wait_s):
            group = self._groups.get(task_of(result.id))
            if group is None:
                continue  # its lease has failed or was cancelled
            if isinstance(result, Failed):
                finished.append(self._fail(group, result.error))
            elif isinstance(result, Generated):
                self._submit_for_verdict(group, result)
            else:
                finished.append(self._finish(group, group.scored(result)))
        return finished

    def _submit_for_verdict(self, group: RolloutGroup, result: Generated) -> None:
        group.generated(result)
        text = self._decode(result.tokens)
        self._texts[result.id] = text, False
        lease, earlier = group.lease, None
        if lease.turns:
            *earlier, text = [self._decode(tokens) for tokens in group.turns(result.id)]
        self._rewards.submit(result.id, lease.verifier, sample_of(lease, text), earlier=earlier)

    def _judge(self, wait_s: float) -> list[Sampled | Unservable]:
        """Take verdicts. A correct guided rollout is scored without its strategy before it is finished (Eq. 4)."""
        if self._engine.version is None:
            return []  # the engine is out of service and can score nothing: verdicts wait
        finished: list[Sampled | Unservable] = []
        for verdict in self._rewards.poll(wait_s):
            group = self._groups.get(task_of(verdict.key))
            if group is None:
                continue
            self._texts[verdict.key] = self._texts[verdict.key][0], verdict.timed_out
            request: Generate | Score | None = None
            if verdict.reply is not None:
                request = self._next_turn(group, verdict.key, verdict.reply)
            if request is None:
                outcome = group.judged(verdict.key, reward=verdict.reward)
                if isinstance(outcome, Rollout):
                    finished.append(self._finish(group, outcome))
                    continue
                request = outcome
            try:
                self._engine.submit(request)
            except EngineError as error:  # also of a completion that another actor has sampled
                finished.append(self._fail(group, error))
        return finished

    def _next_turn(self, group: RolloutGroup, key: Hashable, reply: str) -> Generate | None:
        """The request for the next completion of an episode; None if its turns or tokens are used up."""
        end = int(group.turns(key)[-1][-1])
        ids = build_reply(reply, tasks=self._tasks, tokenizer=self._tokenizer, end=end)
        return group.replied(key, np.array(ids, np.int32))

    def _decode(self, tokens: np.ndarray) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _finish(self, group: RolloutGroup, rollout: Rollout) -> Sampled:
        text, timed_out = self._texts.pop((rollout.task, rollout.attempt, rollout.slot))
        if group.done:
            del self._groups[rollout.task, rollout.attempt]
        return Sampled(rollout=rollout, text=text, timed_out=timed_out, last=group.done)

    def _fail(self, group: RolloutGroup, error: EngineError) -> Unservable:
        self._drop(group)
        return Unservable(lease=group.lease, error=error)

    def _drop(self, group: RolloutGroup) -> None:
        ids = group.rollout_ids()
        self._engine.cancel(ids)
        for id in ids:
            self._texts.pop(id, None)
        del self._groups[group.lease.task, group.lease.attempt]

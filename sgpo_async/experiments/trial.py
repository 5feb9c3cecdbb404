"""One trial: a whole run in one process, every rollout exactly `hub.max_lag` versions old.

    weights of step t - lag ─▶ engine ─▶ groups of step t ─▶ Stepper.update ─▶ weights of step t + 1
                                   every `evaluation.every` steps: validation problems     at the end: test problems

The first `lag` steps are rolled out with the first weights. An asynchronous run mixes lags from 0 to its bound; here
the bound is the lag of every token, which is the hardest case of that bound and the same on every machine.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from sgpo_async.bench.synchronous_actor import SynchronousActor
from sgpo_async.config import Run
from sgpo_async.errors import SgpoError
from sgpo_async.learner.publish import gather
from sgpo_async.learner.step import Stepper
from sgpo_async.learner.train import build
from sgpo_async.rollout.completed import CompletedGroup
from sgpo_async.tasks.base import Problem, ProblemSource
from sgpo_async.tasks.sources import open_source
from sgpo_async.tasks.task_sampler import TaskSampler
from sgpo_async.wire.records import Shard

STREAM_SEED = 0  # of the one stream of training problems that all trials share
STREAM = 2**20  # problems between the beginnings of two seeds' streams
KEPT = ("loss", "grpo_loss", "kd_loss", "entropy", "alpha", "kl_masked_mass", "correction_clipped", "grad_norm")

Weights = dict[str, torch.Tensor]


class Part:
    """A part of a source: training from position `first` on, and some of its held-out problems."""

    def __init__(self, source: ProblemSource, first: int, problems: Sequence[Problem]) -> None:
        self.verifier, self.has_responses = source.verifier, source.has_responses
        self.source, self.first, self.problems = source, first, problems

    def training(self, position: int) -> Problem:
        """The problem at `first + position` of the source's stream."""
        return self.source.training(self.first + position)

    def held_out(self) -> Sequence[Problem]:
        """The chosen ones."""
        return self.problems


class Trial:
    """Policy, optimiser and engine of one run; `tasks.held_out` texts are for validation and as many for the test."""

    def __init__(self, run: Run) -> None:
        mesh = init_device_mesh("cpu", (1,))
        self.run = run
        count = run.tasks.held_out
        source = open_source(run.tasks.source, path=run.tasks.path, held_out=2 * count, seed=STREAM_SEED)
        validation, test = split_rollouts(source.held_out(), count)
        first = (run.seed + 1) * STREAM
        training = Part(source, first, validation)
        self.stepper: Stepper = build(run, mesh, training)[0]
        self.actor = SynchronousActor(run)
        self.training = TaskSampler(run, training)
        self.test = TaskSampler(run, Part(source, first, test))
        self.history: deque[Weights] = deque([self._weights()], maxlen=run.hub.max_lag + 1)
        self.curve: list[dict[str, Any]] = []
        self.metrics: list[dict[str, Any]] = []  # of the steps since the last point of the curve

    def train(self) -> dict[str, Any]:
        """The whole run; its curve on validation problems and its result on test problems, as plain data.

        A run whose gradient or logits are no longer numbers ends there: `diverged` says at which step and why, and what
        is left solves nothing.
        """
        began = time.monotonic()
        result: dict[str, Any] = {"test": {"auto": 0.0, "guided": 0.0}, "diverged": None, "steps": self.run.steps}
        self._measure(0, [])
        for step in range(self.run.steps):
            try:
                self._step(step)
            except SgpoError as error:
                result["diverged"] = {"step": step, "why": str(error)}
                break
        else:
            result["test"] = self._pass_rates(self.test, version=self.run.steps)
        return result | {"curve": self.curve, "wall_s": round(time.monotonic() - began, 1)}

    def _step(self, step: int) -> None:
        self.metrics.append(self.stepper.update(self._shard(step)))
        self.history.append(self._weights())
        if (step + 1) % self.run.evaluation.every == 0 or step + 1 == self.run.steps:
            self._measure(step + 1, self.metrics)
            self.metrics = []

    def _shard(self, step: int) -> Shard:
        """The batch of `step`, from the oldest weights at hand."""
        batch = self.run.learner.problems_per_step
        self.actor.load(max(step - self.run.hub.max_lag, 0), self.history[0])
        tasks = [self.training.task(number) for number in range(step * batch, (step + 1) * batch)]
        return Shard(step=step, version=step, problems=batch, rollouts=tuple(self.actor.roll_out(tasks)))

    def _measure(self, step: int, metrics: Sequence[dict[str, Any]]) -> None:
        """One point of the curve: pass rates now, and the means of what the steps since the last point measured."""
        size = self.run.rollout.size * self.run.learner.problems_per_step
        means = {key: _mean([line.get(key) for line in metrics]) for key in KEPT}
        point = {"step": step, "rollouts": step * size} | self._pass_rates(self.training, version=step)
        self.curve.append(point | {key: value for key, value in means.items() if value is not None})

    def _pass_rates(self, task_sampler: TaskSampler, *, version: int) -> dict[str, float | None]:
        """Of the newest weights on the held-out problems."""
        self.actor.load(version, self.history[-1])
        rollouts = self.actor.roll_out([task_sampler.task(-1 - index) for index in range(task_sampler.round_size)])
        group = CompletedGroup(number=0, attempt=0, rollouts=tuple(rollouts))
        return {"auto": group.pass_rate(guided=False), "guided": group.pass_rate(guided=True)}

    def _weights(self) -> Weights:
        return dict(gather(self.stepper.policy, torch.float32))


def split_rollouts(problems: Sequence[Problem], count: int) -> tuple[list[Problem], list[Problem]]:
    """Those of the first `count` distinct texts, and the others: a text that occurs twice is in one part only."""
    distinct = dict.fromkeys(problem.problem for problem in problems)
    texts = set(list(distinct)[:count])
    first = [problem for problem in problems if problem.problem in texts]
    return first, [problem for problem in problems if problem.problem not in texts]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None

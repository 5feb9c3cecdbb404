"""Supervised warm-up, also the SFT baseline: minimise the token mean of -log pi(y_t|q,y_<t) over responses.

    problems with responses ──▶ sequences ──┬─ training ──▶ batches, reshuffled each epoch ──▶ Stepper.train
                                            └─ validation ──▶ loss, periodically ──▶ export if lowest so far

The loss of a batch is the mean over all of its tokens on all ranks: each sequence has the constant weight |y|/Z (see
`learner.batch`), so the division over micro-batches and ranks cannot change the loss. As in the paper, the exported
policy is the one with the lowest validation loss, not the last one.
"""

from __future__ import annotations

import logging
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sgpo_async.config.schema import WARMUP_CHECKPOINTS, Algorithm, Run
from sgpo_async.errors import DataError, Interrupted
from sgpo_async.learner import checkpoint
from sgpo_async.learner.batch import Batch, Sequences
from sgpo_async.learner.checkpoint import CheckpointWriter, Saved
from sgpo_async.learner.objectives.base import Likelihood
from sgpo_async.learner.packing import Tokens
from sgpo_async.learner.process_group import any_rank, join_world
from sgpo_async.learner.publish import gather
from sgpo_async.learner.resume import how_to_go_on, require_same_adapters, resume_point
from sgpo_async.learner.step import Stepper
from sgpo_async.learner.train import build
from sgpo_async.metrics import MetricsWriter
from sgpo_async.model.export import export
from sgpo_async.model.folder import load_tokenizer, model_folder
from sgpo_async.model.load import positions
from sgpo_async.processes.signals import UrgentSignals
from sgpo_async.processes.torchrun import all_ranks_run
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.prompts import build_prompt
from sgpo_async.tasks.sft_data import sft_data

log = logging.getLogger(__name__)

COLLECTIVE_S = 1800.0  # timeout of collectives: other ranks wait during a validation or an export


@dataclass
class WarmUpProgress:
    """The progress of a warm-up; stored in every checkpoint."""

    step: int = 0  # optimiser steps done
    best_loss: float = math.inf  # on the validation problems
    best_step: int = 0
    lora: dict[str, Any] | None = None  # learner.lora, which gives the adapters of the checkpoint their meaning


def warm_up(run: Run) -> int:
    """Train as `run.sft` specifies and export the best policy to `run.folder`/warmup, as one rank under torchrun.

    Raises:
        Interrupted: a signal has ended the warm-up; there is a checkpoint of its last step.
        SgpoError: the warm-up failed; the message is one line.
    """
    mesh = join_world(run.learner, timeout_s=COLLECTIVE_S)
    examples = Examples.read(run)
    folder = Path(run.folder) / WARMUP_CHECKPOINTS
    signals = UrgentSignals(in_order=all_ranks_run)
    with CheckpointWriter(folder, keep=run.learner.keep_checkpoints, minutes=run.learner.checkpoint_minutes) as writer:
        warm_up = WarmUp(run, mesh, examples, writer)
        with signals:
            finished = warm_up.train(stopping=lambda: signals.stop)
    dist.barrier()
    dist.destroy_process_group()
    if not finished:
        reason = f"learner rank {os.environ['RANK']} {signals.reason or 'was told to stop'}"
        line = how_to_go_on(reason, warm_up.state.step) if warm_up.lead else ""
        raise Interrupted(line, *([signals.exit_code] if signals.stop else []))
    return 0


@dataclass(frozen=True)
class Examples:
    """Prompts and responses as tokens, the same on every rank."""

    training: Sequence[Tokens]
    validation: Sequence[Tokens]
    counts: dict[str, int]  # numbers of problems read and left out

    @classmethod
    def read(cls, run: Run) -> Examples:
        """Read and tokenise the data of `run.sft`. Raises DataError if training or validation has no examples left."""
        problems = sft_data(run)
        folder = model_folder(run.model.path)
        tokenizer, room = load_tokenizer(folder), positions(folder)
        if tokenizer.eos_token_id is None:
            raise DataError(f"model.path: {run.model.path}: the tokenizer has no end token; set its eos_token")
        parts = [[_tokens(run, problem, tokenizer) for problem in part] for part in problems[:2]]
        limit = min(run.sft.max_tokens, room)
        fitting = [[tokens for tokens in part if tokens.length < limit] for part in parts]
        if not all(fitting):
            found = f"every problem for training or validation is longer than {limit} tokens with its response"
            if limit < room:
                raise DataError(f"sft.max_tokens: {found}; raise sft.max_tokens")
            raise DataError(f"model.path: {found}, and the model has {room} positions; use a model with more")
        long = sum(map(len, parts)) - sum(map(len, fitting))
        counts = {"training": len(fitting[0]), "validation": len(fitting[1])}
        counts |= {"too_long": long, "without_response": problems.without, "held_out": problems.held_out}
        return cls(fitting[0], fitting[1], counts)


def _tokens(run: Run, problem: Problem, tokenizer: Any) -> Tokens:
    assert problem.response
    guided = random.Random(f"guided {run.seed} {problem.problem}").random() < run.sft.guided_share
    strategy = problem.strategy if guided else None
    prompt = build_prompt(problem.problem, strategy, tasks=run.tasks, tokenizer=tokenizer)
    response = [*tokenizer.encode(problem.response, add_special_tokens=False), tokenizer.eos_token_id]
    return Tokens(np.array(prompt, np.int32), np.array(response, np.int32))


class WarmUp:
    """One rank of a warm-up."""

    def __init__(self, run: Run, mesh: DeviceMesh, examples: Examples, checkpoints: CheckpointWriter) -> None:
        self.examples, self.checkpoints, self.folder = examples, checkpoints, Path(run.folder)
        self.per_epoch = math.ceil(len(examples.training) / run.sft.batch)
        self.run = supervised(run, steps=run.sft.epochs * self.per_epoch)
        self.stepper: Stepper = build(self.run, mesh)[0]
        self.lead = dist.get_rank() == 0
        self.state = WarmUpProgress()
        if resumed := resume_point(run, self.folder / WARMUP_CHECKPOINTS):
            require_same_adapters(run, resumed)
            saved = checkpoint.restore(resumed, module=self.stepper.policy, optimiser=self.stepper.optimiser)
            self.state = WarmUpProgress(**saved.progress)
        self.state.lora = asdict(run.learner.lora)
        self._order_of = lru_cache(maxsize=1)(self._shuffled)
        step, trackers = self.state.step, run.learner.trackers
        self.metrics = MetricsWriter(run.folder, resume_from=step, trackers=trackers) if self.lead else None

    def train(self, stopping: Callable[[], bool] = lambda: False) -> bool:
        """Train to the last step, or until `stopping()` on a rank, and save that step; return whether it is the last.

        A collective of all ranks.
        """
        start = time.monotonic()
        while self.state.step < self.run.steps:
            step = self.state.step
            line = self.stepper.train(self.batch(step), step=step)
            self.state.step += 1
            record = {"step": self.state.step, "epoch": self.state.step / self.per_epoch}
            record |= {"wall_s": time.monotonic() - start, "train_loss": line["loss"]}
            record |= {key: line[key] for key in ("grad_norm", "lr", "tokens")}
            if self._due(self.run.sft.validate_every or self.per_epoch):
                record["validation_loss"] = self._validate()
            if self.metrics:
                self.metrics.step(record)
            stops = any_rank(stopping()) and self.state.step < self.run.steps
            if self.checkpoints.due(stops or self._due(self.run.learner.checkpoint_every)):
                self._checkpoint()
            if stops:
                break
        self.checkpoints.wait()
        finished = self.state.step == self.run.steps
        if self.metrics:
            if finished:
                self.metrics.summary(asdict(self.state) | self.examples.counts | {"world_size": dist.get_world_size()})
            self.metrics.close()
            self.metrics.wait()
        if self.lead and finished:
            log.info("warm-up: exported the policy of step %d to %s", self.state.best_step, self.folder / "warmup")
        return finished

    def batch(self, step: int) -> Batch:
        """Return this rank's part of the batch of `step`, with weights by the tokens of the whole batch."""
        whole = [self.examples.training[i] for i in self._order(step)]
        total = sum(len(tokens.completion) for tokens in whole)
        mine = whole[dist.get_rank() :: dist.get_world_size()]
        likelihood = [Likelihood(tokens, len(tokens.completion) / total) for tokens in mine]
        return Batch(version=0, step=step, sequences=Sequences([], [], likelihood), metrics=(), forward_only=0)

    def validation_loss(self) -> float:
        """Compute the token mean over all validation problems. A collective of all ranks."""
        mine = self.examples.validation[dist.get_rank() :: dist.get_world_size()]
        sums = [sum(self.stepper.log_probabilities(mine)), float(sum(len(tokens.completion) for tokens in mine))]
        total = torch.tensor(sums, dtype=torch.float64, device=self.stepper.policy.device)
        dist.all_reduce(total)
        return float(-total[0] / total[1])

    def _order(self, step: int) -> Sequence[int]:
        """Return the indices of the training problems of `step`; each epoch uses each problem once, newly shuffled."""
        epoch, batch = divmod(step, self.per_epoch)
        return self._order_of(epoch)[batch * self.run.sft.batch : (batch + 1) * self.run.sft.batch]

    def _shuffled(self, epoch: int) -> Sequence[int]:
        order = list(range(len(self.examples.training)))
        random.Random(f"sft {self.run.seed} {epoch}").shuffle(order)
        return order

    def _validate(self) -> float:
        """Compute the validation loss, and export the policy if it is the lowest so far."""
        loss = self.validation_loss()
        best = loss < self.state.best_loss
        if best:
            self.state.best_loss, self.state.best_step = loss, self.state.step
            tensors = gather(self.stepper.policy)
            if self.lead:
                self._export(dict(tensors))
        if self.lead:
            note = ", the lowest so far" if best else ""
            log.info("step %d/%d: validation loss %.4f%s", self.state.step, self.run.steps, loss, note)
        return loss

    def _export(self, tensors: dict[str, torch.Tensor]) -> None:
        """Replace the policy in warmup/. If the process is killed meanwhile, the folder is old, new or missing."""
        final, draft = self.folder / "warmup", self.folder / ".warmup"
        shutil.rmtree(draft, ignore_errors=True)
        export(self.stepper.policy.model, tensors, draft, source=model_folder(self.run.model.path))
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)

    def _due(self, every: int) -> bool:
        return self.state.step == self.run.steps or (every > 0 and self.state.step % every == 0)

    def _checkpoint(self) -> None:
        saved = Saved(asdict(self.state), b"")
        module, optimiser = self.stepper.policy, self.stepper.optimiser
        self.checkpoints.save(step=self.state.step, module=module, optimiser=optimiser, saved=saved)


def supervised(run: Run, *, steps: int) -> Run:
    """Return `run` with the steps, learning rate and schedule of its warm-up, and without a teacher."""
    sft = run.sft
    return replace(
        run,
        steps=steps,
        optim=replace(run.optim, lr=sft.lr, schedule=sft.schedule, warmup_steps=math.ceil(sft.warmup_ratio * steps)),
        algorithm=Algorithm(objective="grpo"),  # no teacher, no demonstrations; the run's own keys are not used
        rollout=replace(run.rollout, temperature=1.0),
        tasks=replace(run.tasks, context="strategy"),
    )

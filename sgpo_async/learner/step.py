"""One optimiser step from one rank's shard: the loss of Eq. 7 over packed micro-batches.

    shard ─▶ Batch ─▶ teacher pass (no gradient): hidden states of each target after its guided prompt
                  └─▶ per micro-batch: policy ─▶ GRPO + distillation, weighted ─▶ backward
                                                        last one: FSDP sums the gradients over ranks
          ─▶ clip ─▶ AdamW ─▶ statistics

Every rank runs the same number of forwards, since each is a collective of FSDP: ranks agree on the largest number of
micro-batches, and who has fewer runs empty ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sgpo_async.config.schema import Run
from sgpo_async.errors import SgpoError
from sgpo_async.learner.batch import Batch, from_shard
from sgpo_async.learner.optimiser import clip_gradients, learning_rate
from sgpo_async.learner.packing import MicroBatch, Tokens, pack, plan
from sgpo_async.learner.policy import LOCAL_GRADIENT_BYTES, Policy
from sgpo_async.learner.statistics import Statistics
from sgpo_async.learner.terms import distillation_term, grpo_term
from sgpo_async.wire.records import Shard

Plans = tuple[list[MicroBatch], list[MicroBatch]]  # of the teacher and of the student


@dataclass
class Stepper:
    """Policy, teacher and optimiser of one rank."""

    run: Run
    policy: Policy
    optimiser: torch.optim.Optimizer
    frozen_teacher: Policy | None  # None: the policy's current weights are the teacher

    def update(self, shard: Shard) -> dict[str, Any]:
        """Train on `shard`; return the step's metrics, equal on every rank. A collective of all ranks."""
        statistics = self.accumulate(from_shard(shard, self.run.algorithm))
        norm = clip_gradients(self.policy, self.run.optim.grad_clip)
        if not math.isfinite(norm):
            raise SgpoError(f"step {shard.step}: the gradient's norm is {norm}; lower optim.lr or optim.grad_clip")
        rate = learning_rate(self.run.optim, step=shard.step, steps=self.run.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad()
        return statistics.reduce() | {"grad_norm": norm, "lr": rate}

    def accumulate(self, batch: Batch) -> Statistics:
        """Leave the gradient of Eq. 7, summed over ranks, in the policy's parameters."""
        statistics = Statistics(max_lag=self.run.hub.max_lag, device=self._device)
        teacher_plan, student_plan = self._plans(batch)
        states = self._teacher_states(batch.teachers, teacher_plan)
        ranks = dist.get_world_size()
        for number, micro_batch in enumerate(student_plan, 1):
            self._synchronise(number == len(student_plan))
            loss = self._loss(batch, micro_batch, states, statistics)
            (loss * ranks).backward()  # FSDP takes the mean over ranks, where Eq. 7 has a sum
        return statistics

    def _plans(self, batch: Batch) -> Plans:
        """Micro-batches of the teacher and of the student, as many on every rank."""
        plans = tuple(
            plan([tokens.length for tokens in sequences], self.run.learner.row_tokens)
            for sequences in (batch.teachers, batch.students)
        )
        most = torch.tensor([len(micro_batches) for micro_batches in plans], device=self._device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        teacher, student = (own + [()] * (int(n) - len(own)) for own, n in zip(plans, most, strict=True))
        return teacher, student

    def _teacher_states(self, sequences: list[Tokens], micro_batches: list[MicroBatch]) -> dict[int, Tensor]:
        """Hidden states [T, H] of each target k after its guided prompt."""
        teacher = self.frozen_teacher or self.policy
        states: dict[int, Tensor] = {}
        for micro_batch in micro_batches:
            order = sorted(i for row in micro_batch for i in row)
            with torch.no_grad():
                hidden = teacher.hidden(pack(sequences, micro_batch))
            states |= zip(order, hidden.split([len(sequences[i].completion) for i in order]), strict=True)
        return states

    def _loss(self, batch: Batch, micro_batch: MicroBatch, states: dict[int, Tensor], statistics: Statistics) -> Tensor:
        """This micro-batch's part of Eq. 7."""
        order = sorted(i for row in micro_batch for i in row)
        own = [i for i in order if i < len(batch.autonomous)]
        distilled = [i - len(batch.autonomous) for i in order[len(own) :]]
        outputs = self.policy(
            pack(batch.students, micro_batch),
            sum(len(batch.autonomous[i].tokens) for i in own),
            self._teacher(states, distilled),
            self.run.rollout.temperature,
        )
        loss = outputs.log_pi.sum() * 0  # a micro-batch without sequences has a backward pass, too: a collective
        if own:
            statistics.add(entropy=outputs.entropy, tokens_auto=torch.ones_like(outputs.entropy))
            loss = loss + grpo_term(batch, own, outputs.log_pi, algorithm=self.run.algorithm, statistics=statistics)
        if distilled:
            loss = loss + distillation_term(
                batch, distilled, (outputs.d, outputs.log_teacher), algorithm=self.run.algorithm, statistics=statistics
            )
        return loss

    def _teacher(self, states: dict[int, Tensor], distilled: list[int]) -> tuple[Tensor, Tensor | None] | None:
        """Hidden states of these targets' tokens, and the output matrix unless it is the policy's own."""
        if not distilled:
            return None
        matrix = self.frozen_teacher.head if self.frozen_teacher else None
        return torch.cat([states[k] for k in distilled]), matrix

    def _synchronise(self, last: bool) -> None:
        """Small models exchange gradients once per step; large ones each time, since whole gradients do not fit."""
        assert isinstance(self.policy, FSDPModule)
        if self.policy.nbytes <= LOCAL_GRADIENT_BYTES:
            self.policy.set_requires_gradient_sync(last)
            self.policy.set_reshard_after_backward(last)

    @property
    def _device(self) -> torch.device:
        return next(self.policy.parameters()).device

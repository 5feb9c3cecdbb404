"""One optimiser step on one rank's shard: the sequences of the objective, in packed micro-batches.

    shard ─▶ (corrected pass rates: log pi of every rollout, no gradient)
          ─▶ Batch ─▶ teacher pass (no gradient): hidden states of each target after its guided prompt
                  └─▶ per micro-batch: policy ─▶ weighted loss terms of its sequences ─▶ backward
                                                        after the last one: FSDP sums the gradients over ranks
          ─▶ clip ─▶ AdamW ─▶ update the teacher ─▶ statistics

Every rank must run the same number of forwards, because each forward is a collective of FSDP. The ranks agree on the
largest number of micro-batches, and a rank that has fewer runs empty ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sgpo_async.config.schema import Run
from sgpo_async.errors import SgpoError
from sgpo_async.learner.batch import Batch, Responses, from_shard
from sgpo_async.learner.objectives.base import Distillation, rollout_after
from sgpo_async.learner.optimiser import clip_gradients, learning_rate
from sgpo_async.learner.packing import MicroBatch, Packed, Tokens, pack, plan
from sgpo_async.learner.policy import LOCAL_GRADIENT_BYTES, Policy
from sgpo_async.learner.step_metrics import StepMetrics
from sgpo_async.learner.teacher import Teacher
from sgpo_async.learner.teacher_targets import HiddenStateTargets, TeacherTargets, top_k_targets
from sgpo_async.learner.terms import distillation_term, likelihood_term, policy_gradient_term
from sgpo_async.wire.records import Shard


@dataclass
class Stepper:
    """Policy, teacher and optimiser of one rank."""

    run: Run
    policy: Policy
    optimiser: torch.optim.Optimizer
    teacher: Teacher
    responses: Responses | None = None  # looks up responses, for objectives that train on them
    statistics: StepMetrics | None = None  # of the last step, on this rank

    def update(self, shard: Shard) -> dict[str, Any]:
        """Train on `shard`; return the metrics of the step, equal on every rank. A collective of all ranks."""
        return self.train(self.batch(shard), step=shard.step)

    def train(self, batch: Batch, *, step: int) -> dict[str, Any]:
        """Run step number `step` of `run.steps` on `batch`; return its metrics. A collective of all ranks.

        Raises SgpoError if the norm of the gradient is not finite.
        """
        self.statistics = statistics = self.accumulate(batch)
        norm = clip_gradients(self.policy, self.run.optim.grad_clip)
        if not math.isfinite(norm):
            remedy = "lower optim.lr or optim.grad_clip"
            raise SgpoError(f"step {step}: the norm of the gradient must be finite, got {norm}; {remedy}")
        rate = learning_rate(self.run.optim, step=step, steps=self.run.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.teacher.follow(self.policy, steps=step + 1)
        return statistics.reduce() | {"grad_norm": norm, "lr": rate}

    def batch(self, shard: Shard) -> Batch:
        """Build the weighted sequences of `shard`. With corrected pass rates it is a collective of all ranks."""
        algorithm = self.run.algorithm
        log_rho = self._log_rho(shard) if algorithm.pass_rates == "corrected" else None
        return from_shard(
            shard,
            algorithm,
            responses=self.responses,
            log_rho=log_rho,
            skip_uniform=self.run.learner.skip_uniform,
        )

    def accumulate(self, batch: Batch) -> StepMetrics:
        """Compute the gradient of the loss, summed over ranks, into the parameters. A collective of all ranks."""
        statistics = StepMetrics(max_lag=self.run.hub.max_lag, device=self._device)
        statistics.add_batch(batch)
        students, teachers = batch.sequences.students, batch.teachers
        student_plan, teacher_plan = self._plans(students, teachers)
        states = self._teacher_states(batch, teachers, teacher_plan)
        ranks = dist.get_world_size()
        for number, (order, packed) in enumerate(_packed(students, student_plan), 1):
            self._synchronise(number == len(student_plan))
            loss = self._loss(batch, order, packed, states, statistics)
            (loss * ranks).backward()  # FSDP averages over ranks, but the loss is a sum over ranks
        return statistics

    def _plans(self, *sequences: Sequence[Tokens]) -> list[list[MicroBatch]]:
        """Divide each list of sequences into micro-batches, the same number on every rank.

        The first list gets at least one micro-batch, so that a gradient (0) exists even without any sequence.
        """
        row_tokens = self.run.learner.row_tokens
        plans = [plan([tokens.length for tokens in part], row_tokens) for part in sequences]
        counts = torch.tensor([len(micro_batches) for micro_batches in plans], device=self._device)
        counts[0].clamp_(min=1)
        dist.all_reduce(counts, dist.ReduceOp.MAX)
        return [own + [()] * (int(n) - len(own)) for own, n in zip(plans, counts, strict=True)]

    def _log_rho(self, shard: Shard) -> list[float]:
        """Compute log pi/mu of each whole rollout, after the prompt with which it was sampled."""
        sums = self.log_probabilities([rollout_after(rollout.prompt, rollout) for rollout in shard.rollouts])
        return [own - float(r.logprobs.sum(dtype=np.float64)) for own, r in zip(sums, shard.rollouts, strict=True)]

    @torch.no_grad()
    def log_probabilities(self, sequences: Sequence[Tokens]) -> list[float]:
        """Compute log pi of each completion's trained tokens at the sampling temperature. A collective of all ranks."""
        (micro_batches,) = self._plans(sequences)
        sums: dict[int, float] = {}
        for order, packed in _packed(sequences, micro_batches):
            sizes = (len(packed.targets), 0, 0)
            log_pi = self.policy(packed, sizes, None, self.run.rollout.temperature).log_pi
            own = log_pi.split([len(sequences[i].targets) for i in order])
            sums |= {i: float(part.double().sum()) for i, part in zip(order, own, strict=True)}
        return [sums[i] for i in range(len(sequences))]

    @torch.no_grad()
    def _teacher_states(
        self, batch: Batch, sequences: list[Tokens], micro_batches: list[MicroBatch]
    ) -> dict[int, Tensor]:
        """Compute the hidden states [C, H] of each target after its guided prompt, by its index in the students."""
        teacher, first = self.teacher.copy or self.policy, len(batch.sequences.policy_gradient)
        states: dict[int, Tensor] = {}
        for order, packed in _packed(sequences, micro_batches):
            own = teacher.hidden(packed).split([len(sequences[i].targets) for i in order])
            states |= {first + i: part for i, part in zip(order, own, strict=True)}
        return states

    def _loss(
        self, batch: Batch, order: list[int], packed: Packed, states: dict[int, Tensor], statistics: StepMetrics
    ) -> Tensor:
        """Compute the loss of one micro-batch."""
        part, algorithm = batch.sequences.part(order), self.run.algorithm
        teacher_targets = self._teacher_targets(part.distillation, [states[i] for i in order if i in states])
        outputs = self.policy(packed, part.sizes, teacher_targets, self.run.rollout.temperature)
        loss = outputs.log_pi.sum() * 0  # an empty micro-batch needs a backward pass too, because it is a collective
        if part.policy_gradient:
            statistics.add(entropy=outputs.entropy, tokens_auto=torch.ones_like(outputs.entropy))
            loss = loss + policy_gradient_term(
                part.policy_gradient, batch.version, outputs.log_pi, algorithm=algorithm, statistics=statistics
            )
        if part.distillation:
            distance = outputs.d, outputs.log_teacher
            loss = loss + distillation_term(
                part.distillation, batch.version, distance, algorithm=algorithm, statistics=statistics
            )
        if part.likelihood:
            loss = loss + likelihood_term(part.likelihood, outputs.log_text, algorithm=algorithm, statistics=statistics)
        return loss

    def _teacher_targets(self, targets: list[Distillation], states: list[Tensor]) -> TeacherTargets | None:
        """Return the teacher's values for these targets, or None if there are no targets."""
        algorithm = self.run.algorithm
        if not targets:
            return None
        if algorithm.teacher == "behaviour":
            rollouts, k = [item.rollout for item in targets], algorithm.top_logprobs_num
            return top_k_targets(rollouts, k=k, kind=algorithm.divergence, device=self._device)
        return HiddenStateTargets(torch.cat(states), self.teacher.matrix, algorithm.divergence)

    def _synchronise(self, last: bool) -> None:
        """Reduce the gradients of a small model once per step, and of a large model, to save memory, each time.

        Between nodes that hold the same shards, both are reduced once per step.
        """
        assert isinstance(self.policy, FSDPModule)
        self.policy.set_requires_all_reduce(last)
        if self.policy.nbytes <= LOCAL_GRADIENT_BYTES:
            self.policy.set_requires_gradient_sync(last)
            self.policy.set_reshard_after_backward(last)

    @property
    def _device(self) -> torch.device:
        return next(self.policy.parameters()).device


def _packed(sequences: Sequence[Tokens], micro_batches: list[MicroBatch]) -> Iterator[tuple[list[int], Packed]]:
    """Yield each micro-batch: the ascending indices of its sequences, and the packed sequences."""
    for micro_batch in micro_batches:
        yield sorted(i for row in micro_batch for i in row), pack(sequences, micro_batch)

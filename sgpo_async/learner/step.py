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

from sgpo_async.algorithm import TeacherDivergence, TopDivergence
from sgpo_async.config.schema import Run
from sgpo_async.errors import SgpoError
from sgpo_async.learner.batch import Batch, Responses, Sequences, from_shard
from sgpo_async.learner.objectives.base import Distillation, rollout_after
from sgpo_async.learner.optimiser import clip_gradients, learning_rate
from sgpo_async.learner.packing import MicroBatch, Packed, Tokens, pack, plan
from sgpo_async.learner.policy import LOCAL_GRADIENT_BYTES, Policy
from sgpo_async.learner.step_metrics import StepMetrics
from sgpo_async.learner.teacher import Teacher
from sgpo_async.learner.teacher_targets import top_k_targets
from sgpo_async.learner.terms import DistillationTerm, LikelihoodTerm, PolicyGradientTerm, Term
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

    def log_probabilities(self, sequences: Sequence[Tokens]) -> list[float]:
        """Compute log pi of each completion's trained tokens at the sampling temperature. A collective of all ranks."""
        (micro_batches,) = self._plans(sequences)
        sums: dict[int, float] = {}
        for order, packed in _packed(sequences, micro_batches):
            log_pi = self.policy.log_probabilities(packed, self.run.rollout.temperature)
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
        """Compute the loss of one micro-batch; without sequences it is 0, for the collectives of its backward pass."""
        terms = self._terms(
            batch.sequences.part(order), batch.version, packed, [states[i] for i in order if i in states]
        )
        loss, found = self.policy(packed, [term.part for term in terms], self.run.rollout.temperature)
        for term, own in zip(terms, found, strict=True):
            term.record(own, statistics)
        return loss

    def _terms(self, part: Sequences, version: int, packed: Packed, states: list[Tensor]) -> list[Term]:
        """Return the terms that have sequences, in the order of the kinds."""
        targets = torch.from_numpy(packed.targets).to(self._device).split(part.sizes)
        dtype = torch.promote_types(next(self.policy.parameters()).dtype, torch.float32)
        like, algorithm = torch.empty(0, dtype=dtype, device=self._device), self.run.algorithm
        terms: list[Term] = []
        if part.policy_gradient:
            terms.append(PolicyGradientTerm(part.policy_gradient, version, targets[0], algorithm=algorithm, like=like))
        if part.distillation:
            measure = self._divergence(part.distillation, targets[1], states)
            terms.append(DistillationTerm(part.distillation, version, measure, algorithm=algorithm, like=like))
        if part.likelihood:
            terms.append(LikelihoodTerm(part.likelihood, targets[2], algorithm=algorithm, like=like))
        return terms

    def _divergence(
        self, items: list[Distillation], targets: Tensor, states: list[Tensor]
    ) -> TeacherDivergence | TopDivergence:
        """Return the comparison with the teacher: over the vocabulary, or over the tokens that the engine reported."""
        algorithm = self.run.algorithm
        if algorithm.teacher == "behaviour":
            rollouts, k = [item.rollout for item in items], algorithm.top_logprobs_num
            return top_k_targets(rollouts, k=k, kind=algorithm.divergence, device=self._device)
        return TeacherDivergence(torch.cat(states), self.teacher.matrix, targets, algorithm.divergence)

    def _synchronise(self, last: bool) -> None:
        """Reduce the gradients of a small model once per step, and of a large model, to save memory, each time."""
        assert isinstance(self.policy, FSDPModule)
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

"""One optimiser step on one rank's shard: the sequences of the objective, in packed micro-batches.

    shard ─▶ (corrected pass rates: log pi of every rollout, no gradient)
          ─▶ Batch ─▶ (log p of its tokens by teacher and reference, no gradient)
                  ─▶ division: the sequences of all ranks are divided anew over ranks and micro-batches
                  ├─▶ teacher pass (no gradient): hidden states of each target after its guided prompt
                  └─▶ per micro-batch: policy ─▶ weighted loss terms of its sequences ─▶ backward
                                                        after the last one: FSDP sums the gradients over ranks
          ─▶ clip ─▶ AdamW ─▶ update the teacher ─▶ statistics

Every rank must run the same number of forwards, because each forward is a collective of FSDP. A rank that has fewer
micro-batches runs empty ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sgpo_async.algorithm import Kept, TeacherDivergence, TopDivergence
from sgpo_async.config.schema import CREDITED, Run
from sgpo_async.errors import DataError, SgpoError
from sgpo_async.learner.batch import Batch, Item, LeftOut, Responses, Sequences, from_shard
from sgpo_async.learner.contexts import Contexts
from sgpo_async.learner.division import Cost, Piece, deal, divide
from sgpo_async.learner.objectives.base import Distillation, rollout_after
from sgpo_async.learner.optimiser import clip_gradients, learning_rate
from sgpo_async.learner.packing import Packed, Tokens, kept_of, pack, repeated_tokens
from sgpo_async.learner.patterns import Patterns
from sgpo_async.learner.policy import LOCAL_GRADIENT_BYTES, Policy
from sgpo_async.learner.scores import with_evidence, with_reference
from sgpo_async.learner.step_metrics import StepMetrics
from sgpo_async.learner.teacher import Teacher
from sgpo_async.learner.teacher_targets import top_k_targets
from sgpo_async.learner.terms import DistillationTerm, LikelihoodTerm, PolicyGradientTerm, Term
from sgpo_async.wire.records import Shard

COUNTED_LAGS = 63  # with hub.stale=correct, larger lags count as this one in the metrics
Key = tuple[int, int, str]  # task and slot of a distilled rollout, and its divergence


@dataclass
class Stepper:
    """Policy, teacher and optimiser of one rank."""

    run: Run
    policy: Policy
    optimiser: torch.optim.Optimizer
    teacher: Teacher
    cost: Cost = field(init=False)
    responses: Responses | None = None  # looks up responses, for objectives that train on them
    contexts: Contexts | None = None  # finds the prompts with which the teacher reads autonomous rollouts
    reference: Teacher | None = None  # the weights at the start of the run, with algorithm.reference_kl
    patterns: Patterns | None = None  # looks at texts, with learner.patterns, .quoted_words or .token_classes
    statistics: StepMetrics | None = None  # of the last step, or of the present one so far, on this rank
    _begun: bool = False  # some parts of the present step's batch are accumulated

    def __post_init__(self) -> None:
        self.cost = Cost.of(self.policy.model)

    def add(self, shard: Shard) -> None:
        """Accumulate the gradient of a part of the step's batch that is not the last. A collective of all ranks."""
        self.accumulate(self.batch(shard), last=False)

    def update(self, shard: Shard) -> dict[str, Any]:
        """Train on the batch, or on its last part; return the metrics of the step, equal on every rank.

        A collective of all ranks.
        """
        return self.train(self.batch(shard), step=shard.step)

    def train(self, batch: Batch, *, step: int) -> dict[str, Any]:
        """Run step number `step` of `run.steps` on `batch`; return its metrics. A collective of all ranks.

        Raises SgpoError if the norm of the gradient is not finite.
        """
        statistics = self.accumulate(batch)
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
        texts = self.patterns.reduce(statistics.distilled) if self.patterns else {}
        return statistics.reduce() | texts | {"grad_norm": norm, "lr": rate}

    def batch(self, shard: Shard) -> Batch:
        """Build the weighted sequences of `shard`.

        With corrected pass rates, `reference_kl`, or a teacher of single tokens it is a collective of all ranks.

        Raises DataError if the rollouts were sampled with other limits than the run's.
        """
        algorithm, truncated = self.run.algorithm, self.run.rollout.is_truncated
        for rollout in shard.rollouts:
            if (rollout.kept is not None) != truncated:
                found = "without" if truncated else "with"
                raise DataError(
                    f"task {rollout.task}: its rollouts were sampled {found} top-p or top-k; "
                    "resume with the rollout.top_p and rollout.top_k of the run's start"
                )
        if self.patterns:
            self.patterns.see(shard.rollouts, self.contexts)
        log_rho = self._log_rho(shard) if algorithm.pass_rates == "corrected" else None
        batch = from_shard(
            shard,
            algorithm,
            responses=self.responses,
            contexts=self.contexts,
            log_rho=log_rho,
            left_out=LeftOut(
                uniform=self.run.learner.skip_uniform and not self.reference,
                cut=self.run.rollout.cut == "mask",
                older=shard.version - self.run.hub.max_lag if self.run.hub.stale == "mask" else 0,
            ),
        )
        return self._scored(batch)

    def accumulate(self, batch: Batch, *, last: bool = True) -> StepMetrics:
        """Add the gradient of the loss, summed over ranks, to that of the parameters. A collective of all ranks.

        `last`: nothing more is added before the optimiser steps. Returns the statistics of the step so far.
        """
        if not self._begun or self.statistics is None:
            max_lag = max(self.run.hub.max_lag, COUNTED_LAGS if self.run.hub.stale == "correct" else 0)
            self.statistics = StepMetrics(max_lag=max_lag, device=self._device)
        statistics, self._begun = self.statistics, not last
        micro_batches, imbalance = self._divide(batch.sequences)
        statistics.add_batch(batch, imbalance)
        states = self._teacher_states([item for part in micro_batches for item in part.distillation])
        ranks = dist.get_world_size()
        for number, part in enumerate(micro_batches, 1):
            self._synchronise(last and number == len(micro_batches))
            loss = self._loss(batch, part, states, statistics)
            (loss * ranks).backward()  # FSDP averages over ranks, but the loss is a sum over ranks
        return statistics

    def _divide(self, sequences: Sequences) -> tuple[list[Sequences], float]:
        """Return this rank's micro-batches of the sequences of all ranks, and the imbalance. A collective."""
        row_tokens = self.run.learner.row_tokens
        bundles = sequences.bundles(row_tokens)
        parts, imbalance = deal(bundles, [self._piece(bundle) for bundle in bundles], row_tokens=row_tokens)
        return [Sequences.of([item for bundle in part for item in bundle]) for part in parts], imbalance

    def _piece(self, bundle: Sequence[Item]) -> Piece:
        """What the division has to know of a bundle; a backward pass costs twice as much as a forward pass."""
        students = [item.student for item in bundle]
        repeated = repeated_tokens(students, self.run.learner.row_tokens)
        forward = sum(map(self._work, students)) - self.cost.body * repeated
        taught = [item.teacher for item in bundle if isinstance(item, Distillation)] if self._teacher_passes else []
        return Piece(sum(own.length for own in students) - repeated, 3 * forward, sum(map(self._work, taught)))

    def _work(self, tokens: Tokens) -> float:
        return self.cost.forward(length=tokens.length, targets=len(tokens.targets))

    def _forwards(self, sequences: Sequence[Tokens]) -> list[list[int]]:
        """Divide this rank's sequences into micro-batches for forwards without gradient, as many as on every rank."""
        pieces = [Piece(tokens.length, self._work(tokens)) for tokens in sequences]
        rounds = divide(pieces, ranks=1, row_tokens=self.run.learner.row_tokens) if pieces else []
        count = torch.tensor(len(rounds))
        dist.all_reduce(count, dist.ReduceOp.MAX)
        return [own for (own,) in rounds] + [[]] * (int(count) - len(rounds))

    def _scored(self, batch: Batch) -> Batch:
        """Add what teacher and reference say of the tokens of the policy gradient. A collective of all ranks."""
        items = batch.sequences.policy_gradient
        scored = 0

        def score(teacher: Teacher, sequences: Sequence[Tokens]) -> list[np.ndarray]:
            nonlocal scored
            scored += sum(own.length for own in sequences)
            forward = partial(teacher.log_probabilities, self.policy)
            return [own.double().cpu().numpy() for own in self._token_log_probabilities(sequences, forward)]

        if self.run.algorithm.objective in CREDITED:
            items = with_evidence(items, partial(score, self.teacher))
        if self.reference:
            items = with_reference(items, partial(score, self.reference))
        sequences = batch.sequences._replace(policy_gradient=items)
        return replace(batch, sequences=sequences, forward_only=batch.forward_only + scored)

    def _log_rho(self, shard: Shard) -> list[float]:
        """Compute log pi/mu of each whole rollout, after the prompt with which it was sampled."""
        sums = self.log_probabilities([rollout_after(rollout.prompt, rollout) for rollout in shard.rollouts])
        return [own - float(r.logprobs.sum(dtype=np.float64)) for own, r in zip(sums, shard.rollouts, strict=True)]

    def log_probabilities(self, sequences: Sequence[Tokens]) -> list[float]:
        """Compute log pi of each completion's trained tokens at the sampling temperature. A collective of all ranks."""
        found = self._token_log_probabilities(sequences, self.policy.log_probabilities)
        return [float(own.double().sum()) for own in found]

    def _token_log_probabilities(
        self, sequences: Sequence[Tokens], forward: Callable[[Packed, float, Kept | None], Tensor]
    ) -> list[Tensor]:
        """Compute the log-probabilities of each sequence's trained tokens by `forward`: [C] each. A collective."""
        found: dict[int, Tensor] = {}
        for order in self._forwards(sequences):
            taken = [sequences[i] for i in order]
            log_p = forward(pack(taken), self.run.rollout.temperature, kept_of(taken))
            found |= dict(zip(order, log_p.split([len(own.targets) for own in taken]), strict=True))
        return [found[i] for i in range(len(sequences))]

    def _teacher_states(self, targets: Sequence[Distillation]) -> dict[Key, Tensor]:
        """Compute the hidden states [C, H] of each target after the teacher's prompt, by its key."""
        if not self._teacher_passes:
            return {}
        states: dict[Key, Tensor] = {}
        for order in self._forwards([item.teacher for item in targets]):
            own = [targets[i] for i in order]
            found = self.teacher.hidden(self.policy, pack([item.teacher for item in own]))
            parts = found.split([len(item.teacher.targets) for item in own])
            states |= {_key(item): part for item, part in zip(own, parts, strict=True)}
        return states

    @property
    def _teacher_passes(self) -> bool:
        """Whether the teacher's values come from a forward pass, not from the engine that sampled the rollouts."""
        return self.run.algorithm.teacher != "behaviour"

    def _loss(self, batch: Batch, part: Sequences, states: dict[Key, Tensor], statistics: StepMetrics) -> Tensor:
        """Compute the loss of one micro-batch; without sequences it is 0, for the collectives of its backward pass."""
        packed = pack(part.students, self.run.learner.row_tokens)
        terms = self._terms(part, batch, packed, states)
        loss, found = self.policy(packed, [term.part for term in terms], self.run.rollout.temperature)
        for term, own in zip(terms, found, strict=True):
            term.record(own, statistics)
        return loss

    def _terms(self, part: Sequences, batch: Batch, packed: Packed, states: dict[Key, Tensor]) -> list[Term]:
        """Return the terms that have sequences, in the order of the kinds and of their divergences."""
        distilled = [list(own) for _, own in groupby(part.distillation, key=lambda item: item.divergence)]
        a, _, n = part.sizes
        sizes = [a, *(sum(len(item.student.targets) for item in own) for own in distilled), n]
        targets = torch.from_numpy(packed.targets).to(self._device).split(sizes)
        dtype = torch.promote_types(next(self.policy.parameters()).dtype, torch.float32)
        like, algorithm = torch.empty(0, dtype=dtype, device=self._device), self.run.algorithm
        terms: list[Term] = []
        if part.policy_gradient:
            terms.append(PolicyGradientTerm(part.policy_gradient, batch, targets[0], algorithm=algorithm, like=like))
        for own, found in zip(distilled, targets[1:-1], strict=True):
            measure = self._divergence(own, found, states)
            terms.append(DistillationTerm(own, batch.version, measure, algorithm=algorithm, like=like))
        if part.likelihood:
            terms.append(LikelihoodTerm(part.likelihood, targets[-1], algorithm=algorithm, like=like))
        return terms

    def _divergence(
        self, items: list[Distillation], targets: Tensor, states: dict[Key, Tensor]
    ) -> TeacherDivergence | TopDivergence:
        """Return the comparison with the teacher: over the vocabulary, or over the tokens that the engine reported.

        The items have one divergence.
        """
        algorithm = self.run.algorithm
        if not self._teacher_passes:
            rollouts, k = [item.rollout for item in items], algorithm.top_logprobs_num
            return top_k_targets(rollouts, k=k, kind=algorithm.divergence, device=self._device)
        own = torch.cat([states[_key(item)] for item in items])
        kept = kept_of([item.teacher for item in items])
        kind = items[0].divergence or algorithm.divergence
        return TeacherDivergence(own, self.teacher.matrix, targets, kind, kept, algorithm.kl_clip)

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
        return self.policy.device


def _key(item: Distillation) -> Key:
    return item.rollout.task, item.rollout.slot, item.divergence
